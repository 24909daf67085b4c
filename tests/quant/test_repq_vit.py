"""RepQ-ViT and the min-max baseline: properties of their parts, and whole models."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedLinear, materialized
from methodbench.torchkit.quantizers import UniformGrid
from methodbench.torchkit.size import bits_per_weight, tensor_bytes
from methodbench_quant.vit.entries import METHODS
from methodbench_quant.vit.minmax import MinMaxViT
from methodbench_quant.vit.repq_vit import (
    LogSqrt2,
    RepQViT,
    log_sqrt2,
    reparameterize,
    search_log_sqrt2,
    search_uniform,
)
from methodbench_quant.vit.sites import PackedConv2d, SimulatedConv2d, SimulatedLinear, Uniform

PERCENTILES = RepQViT().percentiles
BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**16)

Compress = Callable[..., LoadedModel]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(**options: object) -> LoadedModel:
    """A random ViT of two blocks whose norms have gains and biases of different sizes."""
    torch.manual_seed(0)
    module = VisionTransformer(
        **{  # type: ignore[arg-type]
            "img_size": 8,
            "patch_size": 4,
            "embed_dim": 24,
            "num_heads": 3,
            "depth": 2,
            "mlp_ratio": 2,
            "num_classes": 5,
            **options,
        }
    )
    module.eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.add_(0.5 * torch.randn_like(parameter))
            parameter[::7] *= 8
        else:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return LoadedModel("tiny", "vit", module, detect(module))


@pytest.fixture
def model() -> LoadedModel:
    return vit()


@pytest.fixture
def data() -> Calibration:
    return Calibration(normal(8, 3, 8, 8, seed=3), "random images")


def repq(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    return build(RepQViT, {"calibration_images": 8, **options}, "repq-vit").compress(model, data, Context())


def minmax(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    method = build(MinMaxViT, {"calibration_images": 8, **options}, "minmax-vit")
    return method.compress(model, data, Context())


def normed_layers() -> list[str]:
    """The Linears of :func:`vit` that read a LayerNorm."""
    return [f"blocks.{index}.{name}" for index in range(2) for name in ("attn.qkv", "mlp.fc1")]


both = pytest.mark.parametrize("compress", [repq, minmax])


@given(BITS, SEEDS)
@settings(max_examples=25, deadline=None)
def test_log_sqrt2_levels_are_zero_and_powers_of_sqrt2(bits: int, seed: int) -> None:
    x = (3 * normal(4, 50, seed=seed)).softmax(-1)
    scale = search_log_sqrt2(x, bits, PERCENTILES)
    levels = torch.cat([torch.zeros(1), scale * 2 ** (-torch.arange(2**bits) / 2)])
    values = log_sqrt2(x, scale, bits)
    distance = (values.flatten()[:, None] / levels[None] - 1).abs().nan_to_num(0).amin(1)
    assert float(distance.max()) < 1e-5


@given(BITS, SEEDS)
@settings(max_examples=25, deadline=None)
def test_log_sqrt2_quantizing_twice_is_quantizing_once(bits: int, seed: int) -> None:
    x = (3 * normal(4, 50, seed=seed)).softmax(-1)
    scale = search_log_sqrt2(x, bits, PERCENTILES)
    once = log_sqrt2(x, scale, bits)
    torch.testing.assert_close(log_sqrt2(once, scale, bits), once, rtol=1e-6, atol=0)


def test_log_sqrt2_maps_exact_zeros_and_values_beyond_the_scale() -> None:
    values = log_sqrt2(torch.tensor([0.0, 2.0, 1.0, 1e-30]), torch.tensor(0.5), 4)
    assert values.tolist() == [0.0, 0.5, 0.5, 0.0]


def test_log_sqrt2_halves_the_error_of_attention_on_moderate_rows() -> None:
    attention = (1.5 * normal(16, 64, 64)).softmax(-1)
    v = normal(16, 64, 8, seed=1)

    def error(quantized: Tensor) -> float:
        return float((quantized @ v - attention @ v).square().mean())

    flat = attention.flatten()
    uniform = search_uniform(flat, 4, PERCENTILES).snap(flat).view_as(attention)
    log = log_sqrt2(attention, search_log_sqrt2(attention, 4, PERCENTILES), 4)
    assert error(log) < error(uniform) / 2


@given(BITS, SEEDS, st.sampled_from([(0.9,), (0.999, 0.99), PERCENTILES]))
@settings(max_examples=25, deadline=None)
def test_search_takes_the_range_with_the_least_error(bits: int, seed: int, shares: tuple[float, ...]) -> None:
    x = normal(3, 200, seed=seed).pow(3) + 1
    grid = search_uniform(x, bits, shares)
    error = (grid.snap(x) - x).square().mean(-1)
    for row in range(len(x)):
        tried = []
        for share in shares:
            low, high = np.quantile(x[row].double(), [1 - share, share])
            scale = (high - low) / (2**bits - 1)
            codes = np.clip(np.round(x[row].double() / scale) + np.round(-low / scale), 0, 2**bits - 1)
            tried.append(float(((codes - np.round(-low / scale)) * scale - x[row].double()).square().mean()))
        assert float(error[row]) == pytest.approx(min(tried), rel=1e-2)


@given(BITS, SEEDS, st.sampled_from([0.125, 4.0, 1024.0]))
@settings(max_examples=15, deadline=None)
def test_codes_do_not_depend_on_the_unit_of_the_tensor(bits: int, seed: int, factor: float) -> None:
    x = normal(3, 200, seed=seed) + 1
    grid, scaled = (search_uniform(y, bits, PERCENTILES) for y in (x, factor * x))
    assert torch.equal(scaled.encode(factor * x), grid.encode(x))
    assert torch.equal(scaled.scale, factor * grid.scale)


def test_percentiles_of_huge_tensors_agree_with_those_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2, 5000)
    small = search_uniform(x, 4, PERCENTILES)
    monkeypatch.setattr("methodbench_quant.vit.repq_vit._EXACT_RANKS", 1000)
    huge = search_uniform(x, 4, PERCENTILES)
    torch.testing.assert_close(huge.scale, small.scale, rtol=1e-4, atol=0)
    assert torch.equal(huge.zero, small.zero)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_constant_and_non_finite_tensors_have_no_scale(value: float) -> None:
    with pytest.raises(DivergedError, match="the input is constant or not finite"):
        search_uniform(torch.full((2, 9), value), 4, PERCENTILES, "the input")


def layers(seed: int, bias: bool = True) -> tuple[nn.LayerNorm, nn.Linear, Tensor]:
    """A LayerNorm of 12 channels of very different sizes, a Linear that reads it, and an input."""
    torch.manual_seed(seed)
    norm, linear = nn.LayerNorm(12, bias=bias), nn.Linear(12, 5, bias=bias)
    norm.weight = nn.Parameter(torch.exp(1.5 * torch.randn(12)))
    if bias:
        norm.bias = nn.Parameter(torch.randn(12) * norm.weight)
    return norm.requires_grad_(False), linear.requires_grad_(False), torch.randn(40, 12)


def apply_folded(norm: nn.LayerNorm, linear: nn.Linear, x: Tensor, folded: object) -> tuple[Tensor, Tensor]:
    """Return the LayerNorm's and the Linear's output with folded parameters."""
    f = folded
    y = nn.functional.layer_norm(x, norm.normalized_shape, f.gamma, f.beta, norm.eps)  # type: ignore[attr-defined]
    return y, y @ f.weight.T + f.bias  # type: ignore[attr-defined]


@given(SEEDS, st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_folding_keeps_the_function_of_layernorm_and_linear(seed: int, bias: bool, round_zero: bool) -> None:
    norm, linear, x = layers(seed, bias)
    scale, zero = torch.rand(12) + 0.05, torch.randint(-3, 19, (12,)).float()
    folded = reparameterize(norm, linear, scale, zero, round_zero=round_zero)
    _, output = apply_folded(norm, linear, x, folded)
    torch.testing.assert_close(output, linear(norm(x)), rtol=1e-4, atol=1e-3)


@given(SEEDS, st.booleans(), BITS)
@settings(max_examples=25, deadline=None)
def test_folded_codes_are_the_channels_codes_moved_by_the_difference_of_zeros(
    seed: int, round_zero: bool, bits: int
) -> None:
    norm, linear, x = layers(seed)
    y = norm(x)
    channels = search_uniform(y.T, bits, PERCENTILES)
    assert channels.zero is not None
    scale, zero = channels.scale.squeeze(-1), channels.zero.squeeze(-1)
    folded = reparameterize(norm, linear, scale, zero, round_zero=round_zero)
    moved, _ = apply_folded(norm, linear, x, folded)
    codes = UniformGrid(folded.scale, folded.zero, 0, 2**bits - 1).encode(moved)
    exact = y / scale + zero - folded.zero
    expected = (exact.round() + folded.zero).clamp(0, 2**bits - 1)
    # Where the value lies on the edge between two codes, rounding noise decides.
    clear = ((exact - exact.floor()) - 0.5).abs() > 1e-3
    torch.testing.assert_close(codes[clear], expected[clear], rtol=0, atol=1e-4)
    if round_zero:
        assert torch.equal(codes[clear], channels.encode(y.T).T[clear])


def test_reparameterizing_a_whole_model_keeps_its_logits(model: LoadedModel) -> None:
    changed = model.clone()
    torch.manual_seed(1)
    for block in changed.adapter.blocks(changed.module):
        for norm_name, name in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            norm, linear = block.get_submodule(norm_name), block.get_submodule(name)
            scale, zero = torch.rand(24) + 0.1, torch.randint(0, 16, (24,)).float()
            folded = reparameterize(norm, linear, scale, zero)  # type: ignore[arg-type]
            norm.weight, norm.bias = nn.Parameter(folded.gamma), nn.Parameter(folded.beta)
            linear.weight, linear.bias = nn.Parameter(folded.weight), nn.Parameter(folded.bias)
    x = normal(4, 3, 8, 8)
    torch.testing.assert_close(changed.module(x), model.module(x), rtol=1e-4, atol=1e-4)


@both
def test_every_layer_and_every_operand_of_attention_is_quantized(
    compress: Compress, model: LoadedModel, data: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("methodbench_quant.vit.sites.WIDTHS", ())
    result = compress(model, data, w_bits=6, a_bits=5)
    dense = [name for name, m in model.module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert result.storage == "simulated"
    assert result.facts["layers"] == len(dense) == 10
    for name in dense:
        layer = result.module.get_submodule(name)
        assert isinstance(layer, SimulatedLinear | SimulatedConv2d), name
        assert layer.input_quantizer.bits == (8 if isinstance(layer, nn.Conv2d) else 5)
        assert all(len(row.unique()) <= 2**6 for row in layer.weight.flatten(1))
    for block in result.adapter.blocks(result.module):
        for name in ("matmul1.left", "matmul1.right", "matmul2.left", "matmul2.right"):
            assert block.get_submodule(f"attn.{name}").bits == 5


@both
def test_weights_are_packed_and_their_bits_measured(
    compress: Compress, model: LoadedModel, data: Calibration
) -> None:
    result = compress(model, data, w_bits=4, a_bits=8)
    assert result.storage == "real"
    assert result.accounted_bits == bits_per_weight(result)
    assert isinstance(result.module.get_submodule("patch_embed.proj"), PackedConv2d)
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in result.module.modules())
    assert tensor_bytes(result.module) < tensor_bytes(model.module) / 2
    for layer in result.module.modules():
        if isinstance(layer, PackedLinear):
            assert int(layer.integers().max()) <= 15


@both
@pytest.mark.parametrize("w_bits", [2, 3, 4, 6, 8])
def test_packing_changes_nothing_but_the_storage(
    compress: Compress, w_bits: int, model: LoadedModel, data: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = compress(model, data, w_bits=w_bits, a_bits=6)
    monkeypatch.setattr("methodbench_quant.vit.sites.WIDTHS", ())
    simulated = compress(model, data, w_bits=w_bits, a_bits=6)
    assert (packed.storage, simulated.storage) == ("real", "simulated")
    x = normal(4, 3, 8, 8)
    assert torch.equal(packed.module(x), simulated.module(x))
    # Measured bits also count the two numbers of each input quantizer.
    assert packed.accounted_bits == pytest.approx(simulated.accounted_bits, rel=0.1)


@both
@pytest.mark.parametrize("w_bits", [4, 6])
def test_state_dict_round_trip(
    compress: Compress, w_bits: int, model: LoadedModel, data: Calibration
) -> None:
    result = compress(model, data, w_bits=w_bits, a_bits=6)
    state = {name: tensor.clone() for name, tensor in result.module.state_dict().items()}
    other = copy.deepcopy(result.module)
    for tensor in other.state_dict().values():
        tensor.zero_()
    x = normal(4, 3, 8, 8)
    assert not torch.equal(other(x), result.module(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), result.module(x))


@both
def test_materialized_weights_give_the_same_logits(
    compress: Compress, model: LoadedModel, data: Calibration
) -> None:
    module = compress(model, data, w_bits=4, a_bits=6).module
    x = normal(4, 3, 8, 8)
    expected = module(x)
    with materialized(module):
        assert torch.equal(module(x), expected)


@both
def test_the_dense_model_is_left_alone(compress: Compress, model: LoadedModel, data: Calibration) -> None:
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    parts = [type(m) for m in model.module.modules()]
    compress(model, data, w_bits=3, a_bits=4)
    assert [type(m) for m in model.module.modules()] == parts
    assert model.storage == "dense"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


@both
def test_eight_bits_stay_close_to_the_float_logits(
    compress: Compress, model: LoadedModel, data: Calibration
) -> None:
    x = normal(16, 3, 8, 8)
    expected = model.module(x)
    error = compress(model, data, w_bits=8, a_bits=8).module(x) - expected
    assert float(error.square().mean()) < 0.05 * float(expected.var())


@both
def test_only_the_first_images_calibrate(compress: Compress, model: LoadedModel, data: Calibration) -> None:
    few = Calibration(data.inputs[:5])
    x = normal(4, 3, 8, 8)
    expected = compress(model, few, calibration_images=5).module(x)
    assert torch.equal(compress(model, data, calibration_images=5).module(x), expected)
    assert not torch.equal(compress(model, data, calibration_images=8).module(x), expected)


def test_fewer_images_than_asked_for_are_remarked_and_none_refused(
    model: LoadedModel, data: Calibration
) -> None:
    ctx = Context()
    RepQViT(a_bits=8).compress(model, data, ctx)
    assert ctx.warnings == ["calibrated on 8 images; the method asks for 32"]
    with pytest.raises(NotApplicableError, match="calibration images"):
        RepQViT().compress(model, Calibration.none(), ctx)


def test_layernorm_outputs_end_with_one_scale_per_tensor(model: LoadedModel, data: Calibration) -> None:
    for options in ({}, {"reparameterize": False}):
        module = repq(model, data, a_bits=6, **options).module
        grids = [m for m in module.modules() if isinstance(m, Uniform)]
        assert grids
        assert all(grid.scale.shape == grid.zero.shape == () for grid in grids)


def test_options_change_what_they_name(model: LoadedModel, data: Calibration) -> None:
    default, uniform = repq(model, data), repq(model, data, softmax="uniform")
    assert isinstance(default.module.get_submodule("blocks.0.attn.matmul2.left"), LogSqrt2)
    assert isinstance(uniform.module.get_submodule("blocks.0.attn.matmul2.left"), Uniform)
    rounded = repq(model, data, round_zero=True)
    zeros = [
        torch.stack([result.module.get_submodule(name).input_quantizer.zero for name in normed_layers()])
        for result in (default, rounded)
    ]
    assert torch.equal(zeros[1], zeros[0].round())
    assert not torch.equal(zeros[1], zeros[0])


def test_layernorm_and_linears_without_bias_get_one(data: Calibration) -> None:
    model = vit(qkv_bias=False)
    for block in model.module.blocks:
        block.norm1.bias = None
    expected = model.module(normal(16, 3, 8, 8))
    result = repq(model, data, w_bits=8, a_bits=8).module
    assert result.get_submodule("blocks.0.attn.qkv").bias is not None
    error = result(normal(16, 3, 8, 8)) - expected
    assert float(error.square().mean()) < 0.05 * float(expected.var())


def test_outlier_channels_cost_the_per_tensor_variant_more(model: LoadedModel, data: Calibration) -> None:
    for block in model.module.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            ratio = torch.ones(24)
            ratio[[3, 11]] = 64.0
            norm.weight *= ratio
            norm.bias *= ratio
            linear.weight /= ratio
    x = normal(64, 3, 8, 8)
    expected = model.module(x)

    def error(**options: object) -> float:
        result = repq(model, data, w_bits=8, a_bits=5, **options)
        return float((result.module(x) - expected).square().mean())

    assert error() < error(reparameterize=False) / 2


def test_blocks_that_normalize_afterwards_are_refused(data: Calibration) -> None:
    model = vit(block_fn=ResPostBlock)
    with pytest.raises(NotApplicableError, match=r"does not read the output of blocks\.0\.norm1"):
        repq(model, data)


def test_layers_that_the_model_never_calls_are_refused(model: LoadedModel, data: Calibration) -> None:
    model.module.unused = nn.Linear(3, 3)
    with pytest.raises(NotApplicableError, match=r"no activation reaches unused\.input_quantizer"):
        minmax(model, data)


@both
def test_a_compressed_model_is_refused(compress: Compress, model: LoadedModel, data: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="compressed already"):
        compress(compress(model, data), data)


@both
def test_images_that_are_not_finite_diverge_with_the_name_of_the_site(
    compress: Compress, model: LoadedModel
) -> None:
    images = torch.full((8, 3, 8, 8), float("nan"))
    with pytest.raises(DivergedError, match=r"the image activation of patch_embed\.proj"):
        compress(model, Calibration(images))


def test_a_constant_activation_diverges_with_the_name_of_the_site(
    model: LoadedModel, data: Calibration
) -> None:
    norm = model.module.blocks[1].norm2
    norm.weight, norm.bias = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.ones(24))
    with pytest.raises(DivergedError, match=r"the normed activation of blocks\.1\.mlp\.fc1 is constant"):
        repq(model, data)


def test_a_row_far_from_zero_whose_zero_point_cannot_be_packed_diverges(
    model: LoadedModel, data: Calibration
) -> None:
    model.module.head.weight = nn.Parameter(1000 + 1e-3 * normal(5, 24))
    with pytest.raises(DivergedError, match="head has an almost constant row"):
        repq(model, data)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"w_bits": 1}, "w_bits"),
        ({"a_bits": 9}, "a_bits"),
        ({"percentiles": [0.4]}, "percentiles"),
        ({"percentiles": []}, "percentiles"),
        ({"softmax": "log2"}, "softmax"),
    ],
)
def test_bad_hyperparameters_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ParameterError, match=named):
        build(RepQViT, options, "repq-vit")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_preset_is_valid(method: object) -> None:
    module, _, attribute = method.impl.partition(":")  # type: ignore[attr-defined]
    implementation = getattr(import_module(module), attribute)
    for preset in method.presets.values():  # type: ignore[attr-defined]
        build(implementation, preset, method.name)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_at_w6a6_outliers_cost_repq_vit_three_points_and_per_tensor_over_twenty_more(tmp_path: Path) -> None:
    from methodbench_vision.models.digits_vit import DigitsViT
    from methodbench_vision.tasks.accuracy import ImageAccuracy

    ctx = Context()
    loader, task = DigitsViT(outlier_scale=1.0), ImageAccuracy(data="digits")
    loader.prepare(None, tmp_path, ctx)
    model = loader.load(tmp_path, ctx)
    data = task.calibration(model, ctx)

    def accuracy(model: LoadedModel) -> float:
        return float(task.evaluate(model, ctx).scores["accuracy"].values.mean())

    reparameterized = accuracy(RepQViT(w_bits=6, a_bits=6).compress(model, data, ctx))
    baseline = RepQViT(w_bits=6, a_bits=6, reparameterize=False, softmax="uniform")
    assert reparameterized >= accuracy(model) - 0.03
    assert reparameterized >= accuracy(baseline.compress(model, data, ctx)) + 0.20


@pytest.mark.slow
def test_on_cifar10_w6a6_costs_repq_vit_two_points_at_most(tmp_path: Path) -> None:
    from methodbench_vision.models.cifar10 import ViTTinyCifar10
    from methodbench_vision.tasks.accuracy import ImageAccuracy

    weights = Path(os.environ.get("METHODBENCH_MODELS", "")) / "vit_tiny_cifar10.safetensors"
    images = Path(os.environ.get("METHODBENCH_DATA", "")) / "cifar10"
    if not (
        weights.is_file() and (images / "test.parquet").is_file() and (images / "train.parquet").is_file()
    ):
        pytest.skip("METHODBENCH_MODELS and METHODBENCH_DATA do not hold the CIFAR-10 ViT and its images")
    ctx = Context()
    loader, task = ViTTinyCifar10(), ImageAccuracy(data="cifar10", images=400)
    loader.prepare(weights, tmp_path, ctx)
    model = loader.load(tmp_path, ctx)
    data = task.calibration(model, ctx)

    def accuracy(model: LoadedModel) -> float:
        return float(task.evaluate(model, ctx).scores["accuracy"].values.mean())

    assert accuracy(RepQViT(w_bits=6, a_bits=6).compress(model, data, ctx)) >= accuracy(model) - 0.02
