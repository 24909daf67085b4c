"""EAQuant: smoothing and rotations keep the function, searches choose among candidates, no expert is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.sequential import walk
from methodbench_quant.llm.eaquant import (
    CLIP_RATIOS,
    Block,
    EAQuant,
    Transform,
    find_transform,
    greedy_rotation,
    merge_scales,
    outlier_factor,
    router_divergence,
    search_clip,
    spreading_rotation,
    zigzag,
)
from methodbench_quant.llm.layers import open_copy
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]


def compressed(
    model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: object
) -> LoadedModel:
    options = {"block_size": 16, "rotation_steps": 16, **options}
    return build(EAQuant, options, "eaquant").compress(model, data, ctx or Context())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [2, 8, 16])
def test_the_first_coordinate_is_spread_evenly(n: int) -> None:
    rotation = spreading_rotation(n, generator())
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(n, dtype=torch.float64))
    spread = torch.full((n,), n**-0.5, dtype=torch.float64)
    # The random turn of the other coordinates leaves the share that stays in coordinate 0.
    torch.testing.assert_close(rotation[0, 0].abs(), spread[0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), extreme=st.sampled_from(["row", "column"]))
def test_rotations_narrow_the_spread_and_stay_orthogonal(seed: int, extreme: Any) -> None:
    x = torch.randn(40, 16, generator=generator(seed))
    x[:, 3] *= 30
    rotation = greedy_rotation(x, 24, extreme, generator(seed))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), rtol=0, atol=1e-5)
    turned = x @ rotation
    assert float(turned.max() - turned.min()) <= float(x.max() - x.min()) + 1e-4
    if extreme == "column":
        assert float(turned.abs().max()) < 0.7 * float(x.abs().max())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), blocks=st.integers(1, 5), size=st.integers(1, 9))
def test_the_zigzag_is_a_permutation_that_deals_evenly(seed: int, blocks: int, size: int) -> None:
    x = torch.randn(7, blocks * size, generator=generator(seed))
    order = zigzag(x, size)
    assert order.sort().values.tolist() == list(range(blocks * size))
    peaks = x.abs().amax(0)[order].view(blocks, size)
    assert bool((peaks.diff(dim=1) <= 0).all())
    largest = x.abs().amax(0).topk(blocks).values
    assert bool(torch.isin(peaks[:, 0], largest).all())


def test_a_transform_leaves_products_as_they_are() -> None:
    x, weight = torch.randn(30, 32), torch.randn(6, 32)
    transform = find_transform(
        x, block_size=8, steps=10, permutations=1, extreme="row", generator=generator()
    )
    torch.testing.assert_close(transform(x) @ transform(weight).T, x @ weight.T, rtol=1e-4, atol=1e-4)
    again = Transform([torch.zeros(8, 8), torch.zeros(8, 8)], [torch.zeros(32)])
    again.load_state_dict(transform.state_dict())
    assert torch.equal(again(x), transform(x))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_merged_scales_keep_their_bounds(seed: int) -> None:
    g = generator(seed)
    scales = torch.rand(5, 12, generator=g) + 0.1
    shares = torch.rand(5, generator=g).softmax(0)
    known: dict[str, Any] = {
        "counts": torch.randint(1, 50, (5,), generator=g).float(),
        "weight_scores": torch.rand(5, generator=g) + 1,
        "router_shares": shares,
    }
    highest = merge_scales(scales, "max", **known)
    assert bool((highest >= scales).all())
    for strategy in ("sum1", "sum2_0", "sum2_1", "sum2_2", "sum2_3", "sum3"):
        merged = merge_scales(scales, strategy, **known)  # type: ignore[arg-type]
        assert bool((merged <= scales.amax(0) + 1e-5).all())
        assert bool((merged >= scales.amin(0) - 1e-5).all())
    router = torch.rand(12, generator=g) * 3
    assert bool((merge_scales(scales, "sum1", router_scale=router, **known) >= router).all())
    assert bool((merge_scales(scales, "all-weights", **known) >= merge_scales(scales, "all", **known)).all())


def test_ordinary_channels_have_no_factor() -> None:
    high = torch.linspace(1, 2, 40)
    assert torch.equal(outlier_factor(high, -high, 0.65, 0.7), torch.ones(40))
    high[7] = 50
    factor = outlier_factor(high, -torch.linspace(1, 2, 40), 0.65, 0.7)
    assert factor.argmax() == 7
    assert float(factor[7]) == pytest.approx(float((50 / high[high < 50].max()) ** 0.7), rel=1e-4)
    assert int((factor != 1).sum()) == 1
    assert torch.equal(outlier_factor(torch.ones(8), torch.zeros(8), 0.65, 0.7), torch.ones(8))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    criterion=st.sampled_from(["weight", "output", "router", "output-router"]),
)
def test_clipping_is_one_of_the_ratios_and_no_worse_than_none(seed: int, bits: int, criterion: Any) -> None:
    g = generator(seed)
    weight, x = torch.randn(6, 24, generator=g), torch.randn(50, 24, generator=g)
    found = search_clip(weight, bits, criterion, x=x, first=2)
    ratios = torch.tensor(CLIP_RATIOS)
    assert bool(torch.isclose(found.ratio, ratios).any(1).all())
    if criterion == "router":
        assert len(found.ratio.unique()) == 1
    if criterion == "weight":
        widest = search_clip(weight, bits, "weight").score
        torch.testing.assert_close((found.weight - weight).square().sum(1, keepdim=True), widest)


def test_equal_routings_have_no_divergence() -> None:
    z = torch.randn(20, 8)
    assert float(router_divergence(z, z, 2)) == pytest.approx(0, abs=1e-6)
    assert float(router_divergence(z, torch.randn(20, 8), 8)) > 0


def test_the_router_keeps_more_of_its_ranking_than_by_weight_error() -> None:
    kept = {"router": 0.0, "weight": 0.0}
    for seed in range(6):
        g = generator(seed)
        weight = torch.randn(8, 64, generator=g)
        weight[:, 0] *= 6
        x = torch.randn(400, 64, generator=g)
        before = (x @ weight.T).topk(2).indices.sort(1).values
        for criterion in kept:
            after = search_clip(weight, 3, criterion, x=x, first=2).weight  # type: ignore[arg-type]
            same = ((x @ after.T).topk(2).indices.sort(1).values == before).all(1).float().mean()
            kept[criterion] += float(same)
    assert kept["router"] > kept["weight"]


@pytest.mark.parametrize("merge", ["max", "sum1", "sum2_3", "sum3", "all"])
def test_smoothing_alone_keeps_the_logits(tiny: Tiny, tokens: Calibration, merge: str) -> None:
    model = tiny("mixture")
    copy = open_copy(model)
    method = build(EAQuant, {"block_size": 16, "merge": merge}, "eaquant")
    moved = 0
    for step in walk(copy, tokens, propagate="dense", batch_size=1):
        before = step.block.get_submodule("post_attention_layernorm").weight.clone()
        method._smooth(step, Block.of(copy.adapter, step.block))
        moved += not torch.equal(step.block.get_submodule("post_attention_layernorm").weight, before)
    assert moved == 2
    with torch.no_grad():
        dense, smoothed = model.module(tokens.inputs).logits, copy.module(tokens.inputs).logits
    torch.testing.assert_close(smoothed, dense, rtol=1e-3, atol=1e-4 * float(dense.abs().max()))


def test_many_bits_are_nearly_the_dense_model(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("mixture")
    fine = compressed(model, tokens, bits=8, a_bits=16, kv_bits=16, router_a_bits=16)
    coarse = compressed(model, tokens, bits=3, a_bits=16, kv_bits=16)
    with torch.no_grad():
        scale = float(model.module(tokens.inputs).logits.square().mean())
    assert error(fine, model) < 0.02 * scale
    assert error(fine, model) < error(coarse, model)
    assert all(isinstance(m, PackedLinear) for m in fine.adapter.targets(fine.module).values())
    assert fine.storage == "real"


def test_outlier_channels_hurt_less_than_with_rounding(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("mixture")
    ours = compressed(model, tokens)
    nearest = RTN(bits=4, convention="omni", a_bits=4, a_convention="omni", kv_bits=4).compress(
        model, Calibration.none(), Context()
    )
    assert error(ours, model) < error(nearest, model)


def test_experts_that_no_token_reaches_still_get_finite_weights(tiny: Tiny) -> None:
    ctx = Context()
    result = compressed(tiny("mixture"), Calibration(torch.zeros(2, 4, dtype=torch.int64)), ctx)
    assert any("no calibration token reached" in warning for warning in ctx.warnings)
    layers = result.adapter.targets(result.module).values()
    assert all(bool(torch.isfinite(layer.dequantize()).all()) for layer in layers)


def test_the_result_is_the_same_every_time_and_follows_the_seed(tiny: Tiny, tokens: Calibration) -> None:
    first, second = (compressed(tiny("mixture"), tokens).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = compressed(tiny("mixture"), tokens, Context(seed=1)).module.state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_dense_model_is_left_alone(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("mixture")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    compressed(model, tokens)
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_bad_input_is_told(tiny: Tiny, tokens: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="router"):
        compressed(tiny("llama"), tokens)
    with pytest.raises(NotApplicableError, match="calibration"):
        compressed(tiny("mixture"), Calibration.none())
    with pytest.raises(NotApplicableError, match="block_size 48"):
        compressed(tiny("mixture"), tokens, block_size=48)
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(compressed(tiny("mixture"), tokens), tokens)
    model = tiny("mixture")
    layer = model.adapter.blocks(model.module)[0].get_submodule("self_attn.q_proj")
    set_weight(layer, torch.full_like(layer.weight, torch.nan))
    with pytest.raises(DivergedError, match="NaN"):
        compressed(model, tokens, smooth=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"alpha": 2.0}, "alpha"),
        ({"merge": "mean"}, "merge"),
        ({"block_size": 7}, "block_size"),
        ({"outlier_ratio": 0.5}, "outlier_ratio"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(EAQuant, options, "eaquant")
