"""NoisyQuant: the theorem behind it, the order of its searches, and whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.vit.noisyquant import (
    Noisy,
    NoisyQuant,
    fold_noise,
    quantize_rows,
    search_clip,
    search_mean,
    search_noise,
    snap,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(model: LoadedModel, data: Calibration, **options: object) -> LoadedModel:
    sizes: dict[str, object] = {
        "calibration_images": 16,
        "clip_steps": 60,
        "mean_steps": 12,
        "noise_steps": 60,
    }
    return NoisyQuant(**(sizes | options)).compress(model, data, Context())  # type: ignore[arg-type]


@pytest.mark.parametrize(("d", "n"), [(0.1, 0.2), (0.1, 0.9), (0.3, 0.5), (0.5, 1.2), (0.8, 1.0)])
def test_expected_error_of_noise_in_one_bin_is_the_theorems(d: float, n: float) -> None:
    """One bin of half-width b = 1 around 0, a value at distance d from its edge, noise U(-n, n)."""
    b, x = 1.0, 1.0 - d
    noise = n * (2 * torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1)
    scale = torch.tensor(2 * b, dtype=torch.float64)
    measured = float((snap(x + noise, scale, 8) - noise - x).square().mean())
    expected = (b**3 - (b - n) ** 3 - 3 * (b - n) * d**2) / (3 * n)
    assert measured == pytest.approx(expected, abs=0.01)
    assert (expected <= (b - d) ** 2 + 1e-12) == (d <= n * (1 - (n / (3 * b)) ** 0.5))


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and inputs as behind a GELU with an outlier channel, for calibration and for a test."""
    gain = torch.ones(24)
    gain[5] = 20.0
    x = nn.functional.gelu(2 * normal(2000, 24, seed=seed)) * gain
    return quantize_rows(normal(16, 24, seed=seed + 99), 6).dequantize(), x[:1000], x[1000:]


def searched(seed: int, bits: int) -> list[tuple[Tensor, Tensor]]:
    """Scale and added vector behind the clip, the mean and the noise."""
    weight, x, _ = layer(seed)
    scale = search_clip(x, weight, bits, 100)
    mean = search_mean(x, weight, scale, bits, 20)
    noise = search_noise(x, weight, scale, mean, (2 * normal(24, seed=seed) - 1) * scale, bits, 100)
    return [(scale, torch.zeros(())), (scale, mean), (scale, noise)]


def error(x: Tensor, weight: Tensor, scale: Tensor, added: Tensor, bits: int) -> float:
    return float(((snap(x + added, scale, bits) - added - x) @ weight.T).square().mean())


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_no_search_makes_the_error_on_calibration_inputs_larger(seed: int, bits: int) -> None:
    weight, x, _ = layer(seed)
    plain = x.abs().max() / (2 ** (bits - 1) - 1)
    errors = [error(x, weight, plain, torch.zeros(()), bits)]
    errors += [error(x, weight, *found, bits) for found in searched(seed, bits)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("bits", [4, 6])
def test_noise_lowers_the_error_on_inputs_that_it_has_not_seen(bits: int) -> None:
    """Where values pile up at one level. On symmetric tails the search fits its own inputs, and unseen ones lose."""
    clip_only, full = 0.0, 0.0
    for seed in range(5):
        weight, _, unseen = layer(seed)
        first, *_, last = searched(seed, bits)
        clip_only += error(unseen, weight, *first, bits)
        full += error(unseen, weight, *last, bits)
    assert full < clip_only


def test_folding_the_noise_into_the_bias_keeps_the_output() -> None:
    torch.manual_seed(0)
    linear, noise = nn.Linear(24, 8), normal(24)
    linear.input_quantizer = Noisy(torch.tensor(0.2), noise, 4)
    x = 3 * normal(50, 24)
    expected = linear(linear.input_quantizer(x))
    fold_noise(linear)
    torch.testing.assert_close(linear(linear.input_quantizer(x)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(linear.input_quantizer(x), snap(x + noise, torch.tensor(0.2), 4))


def test_everything_but_linears_and_the_head_stays(vit: Any, images: Calibration) -> None:
    model = vit()
    result = noisy(model, images, w_bits=4)
    assert type(result.module.get_submodule("head")) is nn.Linear
    assert type(result.module.get_submodule("patch_embed.proj")) is nn.Conv2d
    assert type(result.module.get_submodule("blocks.0.attn")) is type(
        model.module.get_submodule("blocks.0.attn")
    )
    quantizers = [m for m in result.module.modules() if isinstance(m, Noisy)]
    assert len(quantizers) == 8
    assert all(q.noise.ndim == 1 and q.folded for q in quantizers)


def test_without_both_searches_nothing_is_added(vit: Any, images: Calibration) -> None:
    model = vit()
    clip_only = noisy(model, images, search_mean=False, search_noise=False)
    quantizers = [m for m in clip_only.module.modules() if isinstance(m, Noisy)]
    assert not any(bool(q.noise.any()) or q.folded for q in quantizers)
    assert not torch.equal(noisy(model, images).module(images.inputs), clip_only.module(images.inputs))


def test_uniform_noise_lies_within_one_step(vit: Any, images: Calibration) -> None:
    result = noisy(vit(), images, noise="uniform", search_mean=False)
    for quantizer in result.module.modules():
        if isinstance(quantizer, Noisy):
            assert float(quantizer.noise.abs().max()) <= 2 * float(quantizer.scale)


def test_an_input_of_zeros_diverges_with_its_name(vit: Any, images: Calibration) -> None:
    model = vit()
    norm = model.module.blocks[1].norm2
    norm.weight, norm.bias = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(24))
    with pytest.raises(DivergedError, match=r"the normed activation of blocks\.1\.mlp\.fc1 is zero"):
        noisy(model, images)


@pytest.mark.slow
def test_on_digits_six_bits_stay_within_three_points_of_float(digits: Any) -> None:
    method = NoisyQuant(calibration_images=32, clip_steps=100, mean_steps=20, noise_steps=100)
    assert digits.after(method) >= digits.accuracy(digits.model) - 0.03
