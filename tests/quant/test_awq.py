"""AWQ: scales keep the function, searches never lose, and without them it is plain rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.quantizers import quantize
from methodbench_quant.llm.awq import (
    AWQ,
    candidate_scale,
    clamp_groups,
    clip_thresholds,
    round_to_nearest,
    search_scale,
)
from methodbench_quant.llm.calls import sample_tokens, squared_error, subset
from methodbench_quant.llm.layers import apply_scale
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]


def compressed(
    model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: object
) -> LoadedModel:
    options = {"group_size": 16, **options}
    return build(AWQ, options, "awq").compress(model, data, ctx or Context())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), ratio=st.floats(0, 1))
def test_scales_are_normalized_and_rise_with_the_activations(seed: int, ratio: float) -> None:
    saliency = torch.rand(16, generator=torch.Generator().manual_seed(seed)) * 10
    scale = candidate_scale(saliency, ratio)
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-4)
    assert bool((scale[saliency.argsort()].diff() >= 0).all())
    assert torch.equal(candidate_scale(saliency, 0.0), torch.ones(16))


def test_a_silent_channel_gets_the_floor_instead_of_no_scale() -> None:
    scale = candidate_scale(torch.tensor([0.0, 1.0, 4.0]), 0.5)
    torch.testing.assert_close(scale, torch.tensor([1e-4, 1.0, 2.0]) / (1e-4 * 2.0) ** 0.5)


def test_the_first_of_equal_losses_wins() -> None:
    search = search_scale(torch.tensor([1.0, 2.0]), lambda scale: 3.0, 20)
    assert search.ratio == 0
    assert len(search.losses) == 20


def test_losses_that_are_not_finite_never_win() -> None:
    losses = iter([float("nan"), 5.0, float("inf"), 4.0])
    search = search_scale(torch.tensor([1.0, 2.0]), lambda scale: next(losses), 4, name="fc1")
    assert search.ratio == 0.75
    with pytest.raises(DivergedError, match="no scale of fc1 has a finite error"):
        search_scale(torch.tensor([1.0, 2.0]), lambda scale: float("nan"), 4, name="fc1")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([5, 16, 60]), groups=st.sampled_from([1, 3]))
def test_the_squared_error_is_that_of_the_outputs(seed: int, tokens: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, tokens, 16, generator=generator)
    delta = torch.randn(groups, 7, 16, generator=generator)
    expected = torch.einsum("gtk,gok->gto", x, delta).square().sum(1)
    torch.testing.assert_close(squared_error(x)(delta), expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), group_size=st.sampled_from([-1, 8]))
def test_thresholds_are_candidates_and_none_hurts(seed: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=generator) ** 3
    x = torch.randn(40, 32, generator=generator)
    ratios = [1 - i / 20 for i in range(10)]
    found = clip_thresholds(weight, x, ratios, 3, group_size)
    size = 32 if group_size == -1 else group_size
    largest = weight.unflatten(1, (-1, size)).abs().amax(-1, keepdim=True)
    assert bool(torch.isclose(found / largest, torch.tensor(ratios), rtol=1e-5).any(-1).all())

    def errors(w: torch.Tensor) -> torch.Tensor:
        delta = (round_to_nearest(w, 3, group_size) - weight).unflatten(1, (-1, size))
        return torch.einsum("tgk,ogk->tog", x.unflatten(1, (-1, size)), delta).square().sum(0)

    assert bool((errors(clamp_groups(weight, found)) <= errors(weight) * (1 + 1e-4) + 1e-6).all())


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_scaling_alone_keeps_the_logits(tiny: Tiny, tokens: Calibration, name: str) -> None:
    model = tiny(name)
    copy = model.clone()
    generator = torch.Generator().manual_seed(0)
    moved = 0
    for block in copy.adapter.blocks(copy.module):
        for group in copy.adapter.scale_groups(block):
            width = block.get_submodule(group.linears[-1]).in_features
            apply_scale(block, group, torch.rand(int(width), generator=generator) * 4 + 0.25)
            moved += 1
    assert moved >= 2
    with torch.no_grad():
        before, after = model.module(tokens.inputs).logits, copy.module(tokens.inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
def test_without_searches_it_is_rounding_bit_for_bit(tiny: Tiny, tokens: Calibration, name: str) -> None:
    model = tiny(name)
    plain = compressed(model, tokens, bits=3, auto_scale=False, clip=False).module.state_dict()
    nearest = RTN(bits=3, group_size=16).compress(model, tokens, Context()).module.state_dict()
    assert plain.keys() == nearest.keys()
    assert all(torch.equal(plain[key], nearest[key]) for key in plain)


@pytest.mark.parametrize("name", ["llama", "opt", "mixture"])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_models_with_outlier_channels_come_out_closer_to_dense_than_rounded(
    tiny: Tiny,
    tokens: Calibration,
    error: Callable[[LoadedModel, LoadedModel], float],
    name: str,
    group_size: int,
) -> None:
    model = tiny(name)
    nearest = RTN(bits=3, group_size=group_size).compress(model, tokens, Context())
    ours = compressed(model, tokens, bits=3, group_size=group_size)
    assert error(ours, model) < error(nearest, model)
    assert ours.storage == "real"
    assert all(isinstance(m, PackedLinear) for m in ours.adapter.targets(ours.module).values())
    assert max(ours.facts["ratios"].values()) > 0


def test_the_search_looks_at_all_tokens_or_some(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    whole = compressed(model, tokens, search_tokens=0).facts["ratios"]
    assert whole == compressed(model, tokens, search_tokens=10**6).facts["ratios"]
    assert whole.keys() == compressed(model, tokens, search_tokens=24).facts["ratios"].keys()


def test_a_subset_is_spread_evenly() -> None:
    assert subset(list(range(10)), lambda part: 100, 500) == [0, 2, 4, 6, 8]
    assert subset(list(range(10)), lambda part: 100, 1) == [0]
    assert subset(list(range(3)), lambda part: 100, 0) == [0, 1, 2]


def test_sampled_tokens_have_equal_distances() -> None:
    parts = [torch.arange(12.0).view(2, 6, 1), torch.arange(12.0, 20.0).view(8, 1)]
    assert sample_tokens(parts, 5).flatten().tolist() == [0, 4, 8, 12, 16]
    assert len(sample_tokens(parts, 100)) == 20


def test_query_and_key_are_not_clipped(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    clipped = compressed(model, tokens, bits=3, auto_scale=False)
    targets = clipped.adapter.targets(clipped.module)
    dense = model.adapter.targets(model.module)
    unchanged = {
        model.adapter.role(name)
        for name, layer in targets.items()
        if torch.equal(layer.integers(), quantize(dense[name].weight, 3, group_size=16).codes)
    }
    assert unchanged == {"q", "k"}


def test_the_dense_model_is_left_alone(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("opt")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    compressed(model, tokens)
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_result_is_the_same_every_time(tiny: Tiny, tokens: Calibration) -> None:
    first, second = (compressed(tiny("llama"), tokens, bits=3).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_experts_that_no_token_reaches_are_named(tiny: Tiny) -> None:
    ctx = Context()
    compressed(tiny("mixture"), Calibration(torch.zeros(2, 1, dtype=torch.int64)), ctx)
    assert any("no calibration token reached" in warning for warning in ctx.warnings)


def test_activations_that_are_not_finite_are_an_error(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    norm = model.adapter.blocks(model.module)[0].get_submodule("input_layernorm")
    set_weight(norm, torch.full_like(norm.weight, torch.nan))
    with pytest.raises(DivergedError, match="NaN"):
        compressed(model, tokens)
    with pytest.raises(DivergedError, match="NaN"):
        compressed(model, tokens, auto_scale=False)


def test_no_calibration_is_refused(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match="calibration"):
        compressed(tiny("llama"), Calibration.none())


def test_a_quantized_model_is_not_quantized_again(tiny: Tiny, tokens: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(compressed(tiny("llama"), tokens), tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 16}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"n_grid": 0}, "n_grid"),
        ({"max_shrink": 0.01}, "clip_grid"),
        ({"clip_tokens": 0}, "clip_tokens"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(AWQ, options, "awq")
