"""Agile-Quant: what is left alone stays, tokens leave in order, and every token gets a prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.llm.agile_quant import (
    ActivationRange,
    AgileQuant,
    Log2Probabilities,
    kept_positions,
    select,
    token_scores,
)
from methodbench_quant.llm.gptq import GPTQ

Tiny = Callable[[str], LoadedModel]

FLOAT: dict[str, Any] = {"a_bits": 16, "low_bits": 16, "softmax_bits": 16}


def compressed(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    options = {"group_size": 16, **options}
    return build(AgileQuant, options, "agile-quant").compress(model, data, Context())


def logits(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(ids).logits


def test_without_rounding_and_thinning_it_is_the_dense_model(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    same = compressed(model, tokens, bits=16, **FLOAT)
    torch.testing.assert_close(
        logits(same, tokens.inputs), logits(model, tokens.inputs), rtol=1e-3, atol=1e-3
    )
    assert same.storage == "simulated"


def test_with_float_activations_it_is_gptq(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    ours = compressed(model, tokens, bits=3, **FLOAT)
    gptq = GPTQ(bits=3, group_size=16, act_order=True, static_groups=True, true_sequential=True)
    theirs = gptq.compress(model, tokens, Context())
    torch.testing.assert_close(
        logits(ours, tokens.inputs), logits(theirs, tokens.inputs), rtol=1e-3, atol=1e-3
    )
    assert ours.storage == "real"
    assert ours.accounted_bits == theirs.accounted_bits


def test_more_activation_bits_are_closer(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("llama")
    errors = [
        error(compressed(model, tokens, bits=16, a_bits=bits, softmax_bits=bits), model) for bits in (4, 8)
    ]
    assert 0 < errors[1] < errors[0]


@pytest.mark.parametrize("importance", ["start", "received"])
def test_the_share_of_tokens_is_removed_and_all_get_a_prediction(
    tiny: Tiny, tokens: Calibration, importance: str
) -> None:
    model = tiny("llama")
    thinned = compressed(model, tokens, bits=16, **FLOAT, remove=0.25, first=0.0, importance=importance)
    given = logits(thinned, tokens.inputs)
    dense = logits(model, tokens.inputs)
    assert given.shape == dense.shape
    assert bool(torch.isfinite(given).all())
    count, share = tokens.inputs.shape[1], 1 - 0.75**0.5
    for _ in range(2):
        count -= int(count * share)
    kept = kept_positions(thinned)
    assert kept.shape == (len(tokens.inputs), count)
    assert bool((kept.diff(dim=1) > 0).all())
    if importance == "start":
        assert bool((kept[:, 0] == 0).all())
    assert not torch.allclose(given, dense)


def test_a_batch_is_thinned_like_its_sequences_one_by_one(tiny: Tiny, tokens: Calibration) -> None:
    model = compressed(tiny("llama"), tokens, bits=16, remove=0.3, low=0.3, first=0.0)
    whole = logits(model, tokens.inputs[:4])
    single = torch.cat([logits(model, row[None]) for row in tokens.inputs[:4]])
    torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-3)


def test_removing_the_least_important_hurts_less_than_the_most_important(
    tiny: Tiny, tokens: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    from methodbench_quant.llm import agile_quant

    model = tiny("llama")
    thinned = compressed(model, tokens, bits=16, **FLOAT, remove=0.3, first=0.0)
    dense = logits(model, tokens.inputs)
    least = (logits(thinned, tokens.inputs) - dense).square().mean()
    monkeypatch.setattr(agile_quant, "token_scores", lambda p, rule: -token_scores(p, rule))
    most = (logits(thinned, tokens.inputs) - dense).square().mean()
    assert float(least) != float(most)


def test_one_token_is_never_removed(tiny: Tiny, tokens: Calibration) -> None:
    model = compressed(tiny("llama"), tokens, bits=16, **FLOAT, remove=0.9, first=0.0)
    assert logits(model, tokens.inputs[:, :1]).shape[1] == 1


def test_low_tokens_cost_accuracy(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"bits": 16, "softmax_bits": 16, "a_bits": 8, "low_bits": 2, "first": 0.0}
    assert error(compressed(model, tokens, **options), model) < error(
        compressed(model, tokens, **options, low=0.8), model
    )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 40),
    remove=st.floats(0, 0.9),
    low=st.floats(0, 1),
)
def test_removed_and_low_tokens_are_disjoint_and_as_many_as_asked(
    seed: int, count: int, remove: float, low: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, count, generator=generator)
    before = torch.rand(3, count, generator=generator) < 0.2
    chosen = select(scores, remove, low, before)
    number = int(count * remove)
    assert bool((chosen.removed.sum(1) == number).all())
    assert not bool((chosen.removed & chosen.low).any())
    assert bool((chosen.low >= (before & ~chosen.removed)).all())
    fresh = select(scores, remove, low)
    assert bool((fresh.low.sum(1) == min(count, int(count * low) + number) - number).all())


def test_the_first_token_scores_as_many_as_there_are_heads() -> None:
    probabilities = torch.rand(2, 3, 8, 8).tril()
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    scores = token_scores(probabilities)
    torch.testing.assert_close(scores[:, 0], torch.full((2,), 3.0))
    assert bool((scores <= 3 + 1e-5).all())


def test_extremes_run_over_batches() -> None:
    watcher = ActivationRange(8, -1)
    watcher(torch.tensor([[[1.0, -2.0]]]))
    watcher(torch.tensor([[[-3.0, 0.5]]]))
    watcher.freeze()
    torch.testing.assert_close(watcher.grid().scale.flatten(), torch.tensor([3.0, 2.0]) / 127.5)


def test_small_probabilities_become_zero() -> None:
    p = torch.tensor([1.0, 0.5, 0.26, 2.0**-16, 0.0])
    assert torch.equal(Log2Probabilities(4)(p), torch.tensor([1.0, 0.5, 0.25, 0.0, 0.0]))


@pytest.mark.parametrize("name", ["opt", "mixture"])
def test_blocks_unlike_llamas_are_refused(tiny: Tiny, tokens: Calibration, name: str) -> None:
    with pytest.raises(NotApplicableError, match=r"Llama|gate, up and down"):
        compressed(tiny(name), tokens)


def test_no_calibration_is_refused(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match="calibration"):
        compressed(tiny("llama"), Calibration.none())


def test_the_dense_model_is_left_alone(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    before = logits(model, tokens.inputs)
    compressed(model, tokens, remove=0.3)
    assert torch.equal(logits(model, tokens.inputs), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"remove": 1.0}, "remove"),
        ({"remove": 0.6, "low": 0.6}, "together"),
        ({"softmax_grid": "log"}, "softmax_grid"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(AgileQuant, options, "agile-quant")
