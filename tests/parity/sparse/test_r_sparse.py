"""R-Sparse against the authors' layer: scales, budgets, thresholds and outputs of a toy of three Linears."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.activation_sparsity import Site, Threshold, score
from methodbench_sparse.r_sparse import (
    RankAwareLinear,
    column_scale,
    low_rank_factors,
    split_budget,
    threshold,
)

pytestmark = pytest.mark.vectors("sparse", "r_sparse")


def limit(vectors: Vectors, pattern: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], pattern + r" ?([\d.]+(?:e-\d+)?)")


NAMES = ("q", "gate", "down")


def close(vectors: Vectors) -> dict[str, float]:
    return {"rtol": limit(vectors, "outputs rtol"), "atol": limit(vectors, r"outputs rtol \S+ atol")}


class FromToken(Site):
    """Touches what comes after a share of the sequence, as the vectors' ``prefill_ratio`` says."""

    def __init__(self, prefill_ratio: float) -> None:
        super().__init__("input", "all", {"": 1.0})
        self.prefill_ratio = prefill_ratio

    def split(self, x: Tensor) -> tuple[Tensor, int]:
        return x, int(x.shape[1] * (1 - self.prefill_ratio)) if self.prefill_ratio != 1 else 0


class Toy(nn.Module):
    """``meta["toy"]``: x = x + q(x); y = x + down(silu(gate(x)))."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers["q"](x)
        return x + self.layers["down"](nn.functional.silu(self.layers["gate"](x)))


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def settings_of(vectors: Vectors) -> dict[str, dict[str, Any]]:
    """Name of a run -> sparsity, alpha and budget floor of each Linear."""
    runs = {name: hyper for name, hyper in vectors.meta["hyper"].items() if re.fullmatch(r"r\d+", name)}
    found: dict[str, dict[str, Any]] = {
        name: dict.fromkeys(NAMES, (hyper["s"], hyper["alpha"], False)) for name, hyper in runs.items()
    }
    recipe = vectors["recipe"].reshape(-1, 2).tolist()
    found["recipe"] = {layer: (s, alpha, True) for layer, (alpha, s) in zip(NAMES, recipe, strict=True)}
    return found


def inputs_of(vectors: Vectors) -> dict[str, Tensor]:
    """What enters each Linear of the dense toy on the calibration data."""
    toy = Toy({name: linear(vectors.tensor(f"W_{name}")) for name in NAMES})
    seen: dict[str, Tensor] = {}
    for name, layer in toy.layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        toy(vectors.tensor("calib"))
    return seen


def split(vectors: Vectors, run: str, name: str, site: Site) -> RankAwareLinear:
    weight = vectors.tensor(f"W_{name}")
    s, alpha, floor = settings_of(vectors)[run][name]
    rank = split_budget(weight.shape[1], weight.shape[0], s, alpha, at_least_one=floor)[1]
    scale = None if alpha == 1 else column_scale(weight)
    rule = Threshold(threshold(score(inputs_of(vectors)[name], scale).flatten(), s, alpha), scale)
    if alpha == 1:
        rank = 0
    return RankAwareLinear(linear(weight), rule, *low_rank_factors(weight, rank), site)


def test_scales_ranks_and_thresholds_equal_the_reference(vectors: Vectors) -> None:
    inputs = inputs_of(vectors)
    for run, layers in settings_of(vectors).items():
        for name, (s, alpha, floor) in layers.items():
            weight = vectors.tensor(f"W_{name}")
            if f"{run}_{name}_scale" in vectors:
                expected = vectors.tensor(f"{run}_{name}_scale")
                torch.testing.assert_close(
                    column_scale(weight), expected, rtol=limit(vectors, "thresholds/scale rtol"), atol=0
                )
            rank = split_budget(weight.shape[1], weight.shape[0], s, alpha, at_least_one=floor)[1]
            assert rank == int(vectors[f"{run}_{name}_rank"]), f"{run} {name}"
            scores = score(inputs[name], None if alpha == 1 else column_scale(weight)).flatten()
            got = threshold(scores, s, alpha)
            assert got == pytest.approx(
                float(vectors[f"{run}_{name}_thr"]), rel=limit(vectors, "thresholds/scale rtol")
            ), f"{run} {name}"


def test_outputs_of_sequences_equal_the_reference(vectors: Vectors) -> None:
    noted = float(re.search(r"prefill_ratio (\d*\.?\d+)", vectors.meta["note"].split("recipe")[1])[1])
    compared = 0
    for run in settings_of(vectors):
        ratio = vectors.meta["hyper"].get(run, {}).get("prefill_ratio", noted)
        layers = {name: split(vectors, run, name, FromToken(ratio)) for name in NAMES}
        x = vectors.tensor("x_seq")
        near: list[Tensor] = []
        for layer in layers.values():
            layer.register_forward_pre_hook(
                lambda layer, args, near=near: near.append(borderline(vectors, layer, args[0]))
            )
        with torch.no_grad():
            got = Toy(layers)(x)
        clear = ~torch.stack(near).any(0)
        dense = int(x.shape[1] * (1 - ratio))
        clear[:, :dense] = True
        compared += int(clear[:, dense:].sum())
        torch.testing.assert_close(got[clear], vectors.tensor(f"{run}_y_seq")[clear], **close(vectors))
    assert compared > 0


def test_outputs_of_a_single_token_equal_the_reference(vectors: Vectors) -> None:
    token = vectors.tensor("x_seq")[:, :1]
    for run in settings_of(vectors):
        if f"{run}_q_tok" not in vectors:
            continue
        layer = split(vectors, run, "q", FromToken(1))
        if not borderline(vectors, layer, token).any():
            expected = vectors.tensor(f"{run}_q_tok")
            torch.testing.assert_close(layer(token), expected, **close(vectors))


def borderline(vectors: Vectors, layer: nn.Module, x: Tensor) -> Tensor:
    """Tokens with an input so near to the threshold that rounded factors may decide otherwise."""
    assert isinstance(layer, RankAwareLinear)
    scores, t = score(x, layer.rule.scale), layer.rule.threshold
    return ((scores - t).abs() <= limit(vectors, "within") * t).any(-1)
