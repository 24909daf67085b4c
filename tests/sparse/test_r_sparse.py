"""R-Sparse: budgets, what the low-rank part repairs, the search, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.activation_sparsity import Site, Threshold, forget, measured
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.r_sparse import (
    RankAwareLinear,
    RSparse,
    column_scale,
    evolve,
    low_rank_factors,
    split_budget,
    threshold,
)


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def sparsify(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return RSparse(**{"positions": "all", **hyper}).compress(model, data, Context())


def layer(weight: Tensor, x: Tensor, sparsity: float, alpha: float) -> RankAwareLinear:
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    rank = split_budget(weight.shape[1], weight.shape[0], sparsity, alpha)[1]
    scale = None if alpha == 1 else column_scale(weight)
    scores = (x.abs() if scale is None else x.abs() * scale).flatten()
    rule = Threshold(threshold(scores, sparsity, alpha), scale)
    return RankAwareLinear(linear, rule, *low_rank_factors(weight, rank), Site("input", "all", {"": 1.0}))


@given(
    width=st.integers(8, 4096),
    out=st.integers(8, 4096),
    sparsity=st.floats(0.05, 0.95),
    alpha=st.floats(0, 1),
)
def test_columns_and_rank_stay_within_the_budget(width: int, out: int, sparsity: float, alpha: float) -> None:
    channels, rank = split_budget(width, out, sparsity, alpha)
    assert channels * out + rank * (width + out) <= width * out * (1 - sparsity) + 1e-6
    assert channels >= 0
    assert 0 <= rank <= min(width, out)


def test_a_weight_of_low_rank_is_computed_whatever_the_threshold() -> None:
    draw = planted.generator(0)
    weight = torch.randn(48, 4, generator=draw) @ torch.randn(4, 64, generator=draw)
    x = torch.randn(1, 50, 64, generator=draw)
    got = layer(weight, x, 0.5, 0.5)
    assert 0.6 < float((~got.rule(x)).float().mean()) < 0.9
    torch.testing.assert_close(got(x), x @ weight.T, rtol=1e-3, atol=1e-3)


def test_rank_pays_where_the_spectrum_decays_and_not_where_it_is_flat() -> None:
    draw = planted.generator(0)
    bases = [torch.linalg.qr(torch.randn(128, 128, generator=draw)).Q for _ in range(2)]
    x = torch.randn(1, 300, 128, generator=draw) / torch.rand(1, 300, 128, generator=draw).sqrt()

    def errors(spectrum: Tensor) -> dict[float, float]:
        weight = bases[0] * spectrum @ bases[1].T
        return {alpha: float((layer(weight, x, 0.5, alpha)(x) - x @ weight.T).norm()) for alpha in (1.0, 0.8)}

    decaying, flat = errors((1 + torch.arange(128.0)) ** -0.8), errors(torch.ones(128))
    assert decaying[0.8] < 0.9 * decaying[1.0]
    assert flat[1.0] < flat[0.8]


def test_at_sparsity_zero_the_output_is_bit_identical_to_the_dense_one(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    for hyper in ({}, {"search": True}, {"alpha": 0.0}):
        assert torch.equal(logits(sparsify(llama, data, sparsity=0, **hyper), tokens), logits(llama, tokens))


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.5, 0.0])
def test_what_is_read_is_counted_with_its_factors(
    llama: LoadedModel, data: Calibration, tokens: Tensor, alpha: float
) -> None:
    sparse = sparsify(llama, data, sparsity=0.5, alpha=alpha)
    forget(sparse)
    logits(sparse, tokens)
    # Whole columns and ranks only: narrow layers cannot spend all of their budget.
    assert measured(sparse)["sparsity_model"] == pytest.approx(0.5, abs=0.06)
    ranks = {
        module.right.shape[0] for module in sparse.module.modules() if isinstance(module, RankAwareLinear)
    }
    assert (ranks == {0}) == (alpha == 1)


def test_the_search_is_no_worse_than_its_start_and_counts_its_tries() -> None:
    tries: list[tuple[float, ...]] = []

    def loss(recipe: tuple[float, ...]) -> float:
        tries.append(recipe)
        return sum((alpha - 0.3) ** 2 for alpha in recipe)

    options: dict[str, Any] = {"population": 12, "generations": 6, "mutation": 0.3}
    choices = [index / 10 for index in range(11)]
    start = (0.9,) * 4
    best = evolve(loss, start, choices, draw=planted.generator(0), **options)
    assert loss(best) < 0.3 * loss(start)
    assert best == evolve(loss, start, choices, draw=planted.generator(0), **options)
    assert evolve(loss, (0.3,) * 4, choices, draw=planted.generator(1), **options) == (0.3,) * 4
    assert len(set(tries)) < 3 * (12 + 6 * 6) + 3


def test_a_found_recipe_is_no_worse_on_the_text_of_the_search(llama: LoadedModel, data: Calibration) -> None:
    hyper: dict[str, Any] = {"sparsity": 0.6, "search_sequences": 6}

    def loss(model: LoadedModel) -> float:
        out = logits(model, data.inputs)[:, :-1].flatten(0, 1)
        return float(nn.functional.cross_entropy(out, data.inputs[:, 1:].flatten()))

    found = sparsify(llama, data, search=True, population=6, generations=2, **hyper)
    assert loss(found) <= loss(sparsify(llama, data, **hyper)) + 1e-6
    assert found.facts["alpha_by_role"].keys() == {"q", "k", "v", "o", "gate", "up", "down"}


def test_it_needs_calibration_inputs(llama: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="r-sparse calibrates on activations"):
        sparsify(llama, Calibration.none())


@pytest.mark.parametrize("passed", [{"sparsity": 1}, {"alpha": 1.5}, {"population": 1}])
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(passed))):
        build(RSparse, passed, "r-sparse")
