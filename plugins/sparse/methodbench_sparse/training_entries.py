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
    Method(
        name="deft",
        kind="training",
        family="sparse",
        impl="methodbench_sparse.deft:DEFT",
        summary="Fine-tunes low-rank updates, with the density of activations in the loss.",
        paper=Paper(
            title="From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers",
            arxiv="2402.01911",
            year=2024,
            code="IBM/DEFT",
        ),
        presets={"peft": {"weight": 0.0}, "full": {"rank": 0}},
        # Near zero the density is steeper than the large steps of the check's plain SGD stand.
        check_params={"weight": 0.01},
        claims="deft.toml",
        fidelity="authors-code",
        parity="IBM/DEFT@193cdefa23331da6df9cce744d373e4a65971e6a",
        vectors=("sparse/deft",),
        properties=("deterministic", "no-input-mutation"),
    ),
    Method(
        name="prosparse",
        kind="training",
        family="sparse",
        impl="methodbench_sparse.prosparse:ProSparse",
        summary="ReLUs, a penalty on activations that rises in stages, and a threshold at the end.",
        paper=Paper(
            title="ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models",
            arxiv="2402.13516",
            venue="COLING",
            year=2025,
        ),
        presets={
            "relu": {"lambdas": (0.0,), "ends": (1,), "threshold": 0.0},
            "fixed": {"lambdas": (0.2,), "ends": (1,)},
            "no-threshold": {"threshold": 0.0},
        },
        claims="prosparse.toml",
        fidelity="partial",
        parity="the schedule of thunlp/BlockFFN@69055457bd91c7461b27f58b01181d5ccebe0d43; a reference of the formulas",
        vectors=("sparse/prosparse",),
        properties=("deterministic", "no-input-mutation"),
    ),
)
