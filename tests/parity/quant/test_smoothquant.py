"""SmoothQuant against the authors' code: smoothing behind a LayerNorm and behind an RMSNorm, and its outputs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.testing.parity import Vectors
from methodbench.torchkit.adapters import ScaleGroup
from methodbench.torchkit.quantizers import fake_quantize, quantize
from methodbench_quant.llm.layers import apply_scale
from methodbench_quant.llm.smoothquant import smoothing_scale

pytestmark = pytest.mark.vectors("quant", "smoothquant")


def close(actual: Tensor, vectors: Vectors, name: str) -> None:
    torch.testing.assert_close(actual, vectors.tensor(name), **vectors.meta["tolerance"])


def linears(vectors: Vectors) -> list[str]:
    return sorted({match[1] for name in vectors if (match := re.fullmatch(r"(fc\d+)_weight", name))})


def eps(vectors: Vectors) -> list[float]:
    return [float(number) for number in re.findall(r"eps ([\d.e-]+)", vectors.meta["notes"])]


def block(vectors: Vectors, norm: nn.Module, names: list[str], *, bias: bool = True) -> nn.Module:
    built = nn.Module()
    built.add_module("norm", norm)
    for name in names:
        out_features, in_features = vectors[f"{name}_weight"].shape
        linear = nn.Linear(in_features, out_features, bias=bias)
        linear.weight = nn.Parameter(vectors.tensor(f"{name}_weight"), False)
        if bias:
            linear.bias = nn.Parameter(vectors.tensor(f"{name}_bias"), False)
        built.add_module(name, linear)
    return built


def behind_layer_norm(vectors: Vectors) -> nn.Module:
    width = len(vectors["ln_weight"])
    norm = nn.LayerNorm(width, eps=eps(vectors)[0])
    norm.weight = nn.Parameter(vectors.tensor("ln_weight"), False)
    norm.bias = nn.Parameter(vectors.tensor("ln_bias"), False)
    return block(vectors, norm, linears(vectors))


def smooth(built: nn.Module, names: list[str], absmax: Tensor, alpha: float) -> None:
    weights = [built.get_submodule(name).weight for name in names]
    apply_scale(built, ScaleGroup("norm", tuple(names), ""), smoothing_scale(absmax, weights, alpha))


def smoothed(vectors: Vectors) -> nn.Module:
    built = behind_layer_norm(vectors)
    smooth(built, linears(vectors), vectors.tensor("act_absmax"), vectors.meta["alpha"])
    return built


def test_norm_and_weights_are_those_of_the_authors(vectors: Vectors) -> None:
    built = smoothed(vectors)
    close(built.norm.weight, vectors, "ln_weight_smooth")
    close(built.norm.bias, vectors, "ln_bias_smooth")
    found = [name for name in linears(vectors) if f"{name}_weight_smooth" in vectors]
    assert found
    for name in found:
        close(built.get_submodule(name).weight, vectors, f"{name}_weight_smooth")


def test_an_rms_norm_is_smoothed_alike(vectors: Vectors) -> None:
    names = linears(vectors)[:2]
    norm = nn.RMSNorm(len(vectors["ln_weight"]), eps=eps(vectors)[1])
    norm.weight = nn.Parameter(vectors.tensor("ln_weight"), False)
    built = block(vectors, norm, names, bias=False)
    x = vectors.tensor("X")
    absmax = norm(x).abs().flatten(0, -2).amax(0)
    close(absmax, vectors, "rms_act_absmax")
    smooth(built, names, absmax, vectors.meta["alpha"])
    close(built.norm.weight, vectors, "rms_weight_smooth")
    close(built.get_submodule(names[1]).weight, vectors, "rms_fc1_weight_smooth")


def test_calibration_sees_the_authors_magnitudes(vectors: Vectors) -> None:
    x = behind_layer_norm(vectors).norm(vectors.tensor("X"))
    close(x.abs().flatten(0, -2).amax(0), vectors, "act_absmax")


@pytest.mark.parametrize(
    ("output", "along", "granularity"),
    [
        ("y0_w8a8_tensor_nosmooth", "input", "tensor"),
        ("y0_w8a8_per_channel_per_token", "input", "token"),
        ("y0_w8a8_per_tensor_per_tensor", "tensor", "tensor"),
        ("y1_w8a8_outquant", "input", "token"),
    ],
)
def test_outputs_are_those_of_the_authors(
    vectors: Vectors, output: str, along: str, granularity: str
) -> None:
    plain = output.endswith("nosmooth")
    built = behind_layer_norm(vectors) if plain else smoothed(vectors)
    match = re.fullmatch(r"y(\d)_w(\d)a(\d).*", output)
    assert match is not None
    layer, bits, a_bits = built.get_submodule(f"fc{match[1]}"), int(match[2]), int(match[3])
    weight = quantize(layer.weight, bits, convention="absmax", symmetric=True, along=along).dequantize()
    x = fake_quantize(built.norm(vectors.tensor("X")), a_bits, granularity=granularity)
    y = F.linear(x, weight, layer.bias)
    if output.endswith("outquant"):
        y = fake_quantize(y, a_bits, granularity=granularity)
    expected = vectors.tensor(output)
    # One activation that rounds the other way moves every output of its token by a fraction of a step.
    equal = torch.isclose(y, expected, **vectors.meta["tolerance"]).all(-1)
    assert int((~equal).sum()) <= 1


def test_smoothing_keeps_the_function(vectors: Vectors) -> None:
    before, after, x = behind_layer_norm(vectors), smoothed(vectors), vectors.tensor("X")
    close(after.fc0(after.norm(x)), vectors, "y0_smooth_fp")
    ours, dense = after.fc0(after.norm(x)), before.fc0(before.norm(x))
    torch.testing.assert_close(ours, dense, **vectors.meta["tolerance"])
    close(before.fc0(before.norm(x)), vectors, "y_fp")
