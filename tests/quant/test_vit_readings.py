"""RepQuant, DopQ-ViT and LRP-QViT: readings of abstracts, held against RepQ-ViT and against what their cards ask."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.vit.dopq_vit import DopQViT, Tangent
from methodbench_quant.vit.lrp_qvit import LRPQViT, allocate_bits, clipped
from methodbench_quant.vit.relevance import relevance, through_linear, through_product, through_sum
from methodbench_quant.vit.repq_vit import (
    LogSqrt2,
    RepQViT,
    reparameterize,
    search_log_sqrt2,
    search_uniform,
)
from methodbench_quant.vit.repquant import RepQuant, learn_bounds, least_squares
from methodbench_quant.vit.sites import Uniform

PERCENTILES = RepQViT().percentiles


@pytest.fixture(scope="module")
def vit() -> LoadedModel:
    return planted.build("vit")


@pytest.fixture(scope="module")
def images() -> Calibration:
    return planted.inputs("vit", 48, 1)


def compress(kind: type, model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    return build(kind, hyper, kind.__name__).compress(model, data, Context(seed=0))


def output(model: LoadedModel, data: Calibration) -> Tensor:
    return planted.output(model.module, data.inputs)


def hidden(tokens: int, width: int, seed: int) -> Tensor:
    """Outputs of a LayerNorm with channels of very different ranges and off-centre means."""
    draw = planted.generator(seed)
    spread = torch.exp(torch.randn(width, generator=draw))
    return torch.randn(tokens, width, generator=draw) * spread + torch.randn(width, generator=draw)


# ---- what is left when every addition is off ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3])
def test_without_its_additions_each_is_repq_vit(vit: LoadedModel, images: Calibration, bits: int) -> None:
    base = output(compress(RepQViT, vit, images, w_bits=bits, a_bits=bits), images)
    width = {"w_bits": bits, "a_bits": bits}
    repquant = compress(RepQuant, vit, images, **width, clip_steps=0, recon="none")
    dopq = compress(DopQViT, vit, images, **width, softmax="log-sqrt2", shared="mean")
    assert torch.equal(output(repquant, images), base)
    assert torch.equal(output(dopq, images), base)


def test_equal_bits_without_clipping_are_repq_vit(vit: LoadedModel, images: Calibration) -> None:
    base = output(compress(RepQViT, vit, images, image_bits=4), images)
    flat = {"target_bits": 4, "candidates": [4], "edge_bits": 4, "kappa": float("inf")}
    assert torch.equal(output(compress(LRPQViT, vit, images, **flat), images), base)
    clipping = compress(LRPQViT, vit, images, **{**flat, "kappa": 0.5})
    assert not torch.equal(output(clipping, images), base)


# ---- RepQuant -----------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), bits=st.sampled_from([3, 4]))
def test_learned_bounds_lie_within_the_observed_ranges_and_lose_less(seed: int, bits: int) -> None:
    x, weight = hidden(200, 12, seed), torch.randn(24, 12, generator=planted.generator(seed + 1))
    grid = search_uniform(x.T, bits, PERCENTILES)
    assert grid.zero is not None
    start = Uniform(grid.scale.squeeze(-1), grid.zero.squeeze(-1), bits)
    learned, first, last = learn_bounds(x, weight, start, steps=100, lr=5e-2, start=4.0)
    direct = ((start(x) - x) @ weight.T).square().sum(-1).mean()
    assert first == pytest.approx(float(direct), rel=1e-4)
    direct = ((learned(x) - x) @ weight.T).square().sum(-1).mean()
    assert last == pytest.approx(float(direct), rel=1e-4)
    assert last < first
    width = learned.scale * (2**bits - 1)
    assert bool((width < x.amax(0).clamp(min=0) - x.amin(0).clamp(max=0)).all())
    assert torch.equal(learned.zero, learned.zero.round())


def test_no_step_is_accepted_that_loses_more() -> None:
    x, weight = hidden(200, 12, 0), torch.randn(24, 12, generator=planted.generator(1))
    grid = search_uniform(x.T, 4, PERCENTILES)
    assert grid.zero is not None
    start = Uniform(grid.scale.squeeze(-1), grid.zero.squeeze(-1), 4)
    kept, first, last = learn_bounds(x, weight, start, steps=3, lr=5e-2, start=-6.0)
    assert kept is start
    assert first == last


@pytest.mark.parametrize("bits", [4, 3])
def test_weights_answer_for_what_their_inputs_lost(bits: int) -> None:
    exact, weight = hidden(600, 16, 2), torch.randn(24, 16, generator=planted.generator(3))
    grid = search_uniform(exact.flatten(), 4, PERCENTILES)
    x, target = grid.snap(exact), exact @ weight.T
    found = least_squares(x, target, bits=bits, percentiles=PERCENTILES).dequantize()
    rows = search_uniform(weight, bits, PERCENTILES)
    nearest = rows.snap(weight)
    assert (x @ found.T - target).square().mean() < 0.9 * (x @ nearest.T - target).square().mean()


def test_additions_are_switches_and_each_brings_the_output_nearer(vit: LoadedModel) -> None:
    data = planted.inputs("vit", 128, 1)
    exact = output(vit, data)

    def error(**hyper: Any) -> float:
        found = compress(
            RepQuant,
            vit,
            data,
            w_bits=3,
            a_bits=4,
            calibration_images=128,
            recon_steps=300,
            recon_lr=0.05,
            **hyper,
        )
        return float(planted.relative_errors(output(found, data), exact).mean())

    neither = error(clip_steps=0, recon="none")
    assert error(clip_steps=0, recon="gptq") < 0.9 * neither
    assert error(clip_steps=0, recon="adaround") < neither
    both = compress(RepQuant, vit, data, clip_steps=50, calibration_images=128)
    assert both.facts["clip_loss_last"] < 0.95 * both.facts["clip_loss_first"]
    assert both.storage == "real"


# ---- DopQ-ViT -----------------------------------------------------------------------------------------------------


def attention(temperature: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = planted.generator(seed)
    logits = temperature * torch.randn(16, 64, 64, generator=draw)
    return logits.softmax(-1), torch.randn(16, 64, 32, generator=draw)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("temperature", [1.5, 3.0, 6.0])
def test_tangent_levels_lose_less_of_what_attention_returns(temperature: float, bits: int) -> None:
    x, values = attention(temperature)

    def error(y: Tensor) -> float:
        return float((y @ values - x @ values).square().mean())

    ours = error(Tangent.searched(x, bits)(x))
    uniform = error(search_uniform(x.flatten(), bits, PERCENTILES).snap(x.flatten()).view_as(x))
    root = error(LogSqrt2(search_log_sqrt2(x, bits, PERCENTILES), bits)(x))
    assert ours < uniform
    assert ours < root


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), temperature=st.floats(0.5, 6), bits=st.integers(2, 6))
def test_tangent_levels_are_few_rise_with_the_value_and_stay(
    seed: int, temperature: float, bits: int
) -> None:
    x, _ = attention(temperature, seed)
    x = x[0]
    quantizer = Tangent.searched(x, bits)
    y = quantizer(x)
    assert len(y.unique()) <= 2**bits
    assert bool((y.flatten()[x.flatten().argsort()].diff() >= 0).all())
    torch.testing.assert_close(quantizer(y), y, rtol=0, atol=1e-6)


def test_a_flat_tangent_is_the_uniform_grid() -> None:
    x, _ = attention(1.5)
    high = x.amax()
    flat = Tangent(torch.tensor(1e-2), high, 0.5, 4)
    step = high / 15
    torch.testing.assert_close(flat(x), (x / step).round() * step, rtol=0, atol=float(step) * 1e-2)


def test_the_shared_scale_is_a_gauge_and_its_zero_point_is_not() -> None:
    draw = planted.generator(0)
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 6)
    scale = torch.rand(8, generator=draw) + 0.1
    zero = torch.randint(0, 16, (8,), generator=draw).float()
    x = torch.randn(20, 8, generator=draw)
    normed = nn.functional.layer_norm(x, (8,)) * norm.weight + norm.bias
    codes = (normed / scale).round() + zero
    for shared in ("mean", "median"):
        folded = reparameterize(norm, linear, scale, zero, shared=shared)
        y = nn.functional.layer_norm(x, (8,)) * folded.gamma + folded.beta
        torch.testing.assert_close(y @ folded.weight.T + folded.bias, linear(normed), rtol=1e-4, atol=1e-4)
    whole = reparameterize(norm, linear, scale, zero, shared="median", round_zero=True)
    y = nn.functional.layer_norm(x, (8,)) * whole.gamma + whole.beta
    assert torch.equal(whole.scale, scale.median())
    assert ((y / whole.scale).round() + whole.zero == codes).float().mean() > 0.98


def test_blocks_are_learned_as_in_is_vit(vit: LoadedModel, images: Calibration) -> None:
    learned = compress(DopQViT, vit, images, iterations=40, batch=48, w_bits=3)
    for stage in ("per_channel", "per_tensor"):
        assert learned.facts[f"loss_{stage}_last"] < learned.facts[f"loss_{stage}_first"], stage


# ---- LRP-QViT -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_rules_keep_the_sum_of_relevance(seed: int) -> None:
    draw = planted.generator(seed)
    x = torch.randn(3, 5, 32, generator=draw).double()
    linear = nn.Linear(32, 6).double()
    above = torch.rand(3, 5, 6, generator=draw).double()
    below = through_linear(linear, x, above)
    torch.testing.assert_close(below.sum(), above.sum(), rtol=1e-4, atol=0)
    a, b = through_sum(x, torch.randn_like(x), x.abs())
    torch.testing.assert_close((a + b).sum((1, 2)), x.abs().sum((1, 2)))
    p, q = torch.randn(3, 2, 5, 4, generator=draw).double(), torch.randn(3, 2, 4, 7, generator=draw).double()
    above = torch.rand(3, 2, 5, 7, generator=draw).double()
    a, b = through_product(p, q, p @ q, above)
    torch.testing.assert_close(a.sum((1, 2, 3)) + b.sum((1, 2, 3)), above.sum((1, 2, 3)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg", "class_token": False},
        {"init_values": 0.1, "qk_norm": True},
        {"reg_tokens": 2},
    ],
    ids=["class token", "mean of tokens", "layer scale and norms of queries", "registers"],
)
def test_every_block_passes_all_relevance_on(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        num_classes=7,
        **options,
    )
    for parameter in module.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model = LoadedModel("vit", "vit", module.eval().requires_grad_(False), detect(module))
    pictures = planted.inputs("vit", 6, 2).inputs
    before = {key: value.clone() for key, value in module.state_dict().items()}
    found = relevance(model, pictures)
    assert len(found.boundaries) == 3
    for sums in found.boundaries:
        torch.testing.assert_close(sums, torch.ones(6), rtol=0, atol=1e-3)
    assert set(found.layers) == {*model.adapter.targets(module), "head"}
    assert all(bool((scores > 0).all()) for scores in found.layers.values())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(module_._forward_hooks for module_ in module.modules())


def test_scores_do_not_see_scales_that_leave_the_function(vit: LoadedModel, images: Calibration) -> None:
    other = vit.clone()
    for block in other.adapter.blocks(other.module):
        ratio = torch.exp(torch.randn(block.norm1.weight.shape, generator=planted.generator(0)))
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight = nn.Parameter(norm.weight * ratio, requires_grad=False)
            norm.bias = nn.Parameter(norm.bias * ratio, requires_grad=False)
            linear.weight = nn.Parameter(linear.weight / ratio, requires_grad=False)
    expected, actual = (relevance(model, images.inputs).layers for model in (vit, other))
    for name, scores in expected.items():
        torch.testing.assert_close(actual[name].mean(), scores.mean(), rtol=1e-2, atol=0)


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.floats(1e-3, 10), min_size=2, max_size=8),
    target=st.sampled_from([2.5, 3.0, 4.0, 4.3]),
    seed=st.integers(0, 99),
)
def test_bits_keep_the_budget_and_leave_no_step_that_fits(
    scores: list[float], target: float, seed: int
) -> None:
    sizes = torch.randint(1, 50, (len(scores),), generator=planted.generator(seed)).tolist()
    candidates = [2, 3, 4, 5, 6]
    bits = allocate_bits(scores, sizes, candidates, target)
    spent = sum(b * n for b, n in zip(bits, sizes, strict=True))
    assert spent <= target * sum(sizes) + 1e-9
    left = target * sum(sizes) - spent
    assert all(n > left or b == candidates[-1] for b, n in zip(bits, sizes, strict=True))


def test_equal_layers_and_a_whole_target_get_equal_bits() -> None:
    assert allocate_bits([1.0] * 6, [100] * 6, [2, 3, 4, 5, 6], 4) == [4] * 6
    assert allocate_bits([1.0, 50.0], [100, 100], [2, 3, 4, 5, 6], 4) == [3, 5]


def test_only_the_ends_that_lie_far_off_are_moved() -> None:
    bounds = torch.tensor([[1.0], [1.1], [0.9], [1.05], [30.0]])
    found = clipped(bounds, 6.0)
    assert torch.equal(found[:4], bounds[:4])
    assert 1.1 < float(found[4]) < 3
    assert torch.equal(clipped(bounds, float("inf")), bounds)


def test_bits_differ_between_layers_and_are_said(vit: LoadedModel, images: Calibration) -> None:
    found = compress(LRPQViT, vit, images, target_bits=3, candidates=[2, 3, 4, 5, 6])
    bits = found.facts["bits"]
    sizes = {n: layer.weight.numel() for n, layer in vit.adapter.targets(vit.module).items()}
    assert set(bits) == set(sizes)
    assert len(set(bits.values())) > 1
    assert sum(bits[name] * size for name, size in sizes.items()) <= 3 * sum(sizes.values())
    blocks = compress(
        LRPQViT, vit, images, target_bits=3, candidates=[2, 3, 4, 5, 6], granularity="block"
    ).facts["bits"]
    for prefix in vit.adapter.block_names(vit.module):
        assert len({width for name, width in blocks.items() if name.startswith(prefix)}) == 1


# ---- all three ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RepQuant, DopQViT, LRPQViT])
def test_hostile_input_is_refused(kind: type, vit: LoadedModel, images: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="calibration images"):
        compress(kind, vit, Calibration.none())
    with pytest.raises((DivergedError, NotApplicableError), match="not finite"):
        compress(kind, vit, Calibration(images.inputs * torch.nan))
    constant = vit.clone()
    for block in constant.adapter.blocks(constant.module):
        for norm in (block.norm1, block.norm2):
            norm.weight = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=False)
    with pytest.raises(DivergedError, match="constant"):
        compress(kind, constant, images)
    with pytest.raises(NotApplicableError):
        compress(kind, planted.build("cnn", outliers=False), planted.inputs("cnn", 8, 1))
    one = compress(kind, vit, Calibration(images.inputs[:1]))
    assert torch.isfinite(output(one, images)).all()


@pytest.mark.parametrize(
    ("kind", "hyper", "named"),
    [
        (RepQuant, {"recon": "none "}, "recon"),
        (RepQuant, {"clip_steps": -1}, "clip_steps"),
        (RepQuant, {"damp": 0.0}, "damp"),
        (DopQViT, {"tan_center": 1.5}, "tan_center"),
        (DopQViT, {"shared": "mode"}, "shared"),
        (DopQViT, {"percentiles": [0.3]}, "percentiles"),
        (LRPQViT, {"candidates": [4, 3]}, "candidates"),
        (LRPQViT, {"candidates": [1, 3]}, "candidates"),
        (LRPQViT, {"target_bits": 2.0}, "target_bits"),
        (LRPQViT, {"kappa": 0.0}, "kappa"),
    ],
)
def test_a_bad_hyperparameter_is_named(kind: type, hyper: dict[str, Any], named: str) -> None:
    with pytest.raises(ParameterError, match=named):
        build(kind, hyper, "method")
