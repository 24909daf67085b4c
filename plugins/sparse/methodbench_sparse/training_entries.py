"""Entries of the methods that train models to be sparse."""

from __future__ import annotations

from methodbench.entries import Method, Paper

METHODS: tuple[Method, ...] = (
    Method(
        name="ap",
        kind="training",
        family="sparse",
        impl="methodbench_sparse.ap:AP",
        summary="Prunes in cycles by magnitude, and negative weights that hardly move, so that ReLUs stay alive.",
        paper=Paper(
            title="AP: Selective Activation for De-sparsifying Pruned Networks",
            arxiv="2212.06145",
            venue="TMLR",
            year=2023,
            authors="Liu and Ghosh and Tan and Motani",
            code="Martin1937/Activate-While-Pruning",
        ),
        presets={
            "magnitude": {"base": 20.0, "ap": 0.0},
            "strong": {"base": 15.0, "ap": 5.0},
            "reinit": {"restart": "reinit"},
        },
        claims="ap.toml",
        fidelity="authors-code",
        parity="Martin1937/Activate-While-Pruning@95a063b263708eed6b1320c20b4f43303e6233f4",
        vectors=("sparse/ap",),
        properties=("deterministic", "no-input-mutation"),
    ),
)
