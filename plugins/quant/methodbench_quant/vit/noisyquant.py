"""NoisyQuant: noisy bias-enhanced activation quantization for vision transformers (Liu et al., CVPR 2023).

A fixed vector ``N`` is added to the input of a Linear before it is rounded, and taken off again behind the
product, where it is part of the bias::

    y = Q(x + N) W^T + B',    B' = B - W N

``N`` moves values of a heavy-tailed input away from, or onto, the edges between two levels, and is chosen such
that the layer's output error falls. Per Linear, in this order:

1. the clip ``c = max|x| i / 1000`` of the activation grid, ``s = c / (2^(b-1) - 1)``,
2. the mean ``m = s i / 200`` of ``N``,
3. the length of its noise, ``N = m + d i / 1000`` for one drawn direction ``d``,

each by ``||(Q(x + N) - N - x) W^T||^2`` on the calibration batch with rounded weights, so that weight errors are not
compensated. Clips of all layers come first, in one forward pass through quantized predecessors; noise in a second.

The paper draws ``d`` uniformly from ``[-s, s]``; the authors' code draws ``d = (2 g - 1) s`` with normal ``g``, which
is the default here (``noise="code"``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized, UniformGrid
from methodbench_quant.vit.sites import Draft, Site, calibration_images

Steps = Annotated[int, Field(ge=1, le=100_000)]


@hyperparameters
class NoisyQuant:
    """Quantizes weight and input of every Linear but the head; everything else stays in floating point."""

    w_bits: Annotated[int, Field(ge=2, le=8, description="weight bits; packed at 2, 3, 4 and 8")] = 6
    a_bits: Annotated[int, Field(ge=2, le=8, description="bits of the inputs, simulated")] = 6
    search_clip: Annotated[
        bool, Field(description="search the activation clip; false: the largest value")
    ] = True
    search_mean: Annotated[bool, Field(description="search the mean of the added vector")] = True
    search_noise: Annotated[bool, Field(description="search the noise of the added vector")] = True
    noise: Annotated[
        Literal["code", "uniform"], Field(description="direction: (2 g - 1) s as in the code, or U(-s, s)")
    ] = "code"
    clip_steps: Annotated[Steps, Field(description="clips that are tried")] = 1000
    mean_steps: Annotated[Steps, Field(description="means that are tried on either side of 0")] = 200
    noise_steps: Annotated[
        Steps, Field(description="lengths that are tried per unit of the direction; twice this")
    ] = 1000
    search_tokens: Annotated[
        int, Field(ge=0, description="tokens that a search looks at, drawn by the seed; 0: all")
    ] = 0
    calibration_images: Annotated[int, Field(ge=1, le=4096, description="images in the one batch")] = 256

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized, its weights packed where their width allows.

        Raises:
            NotApplicableError: no calibration images, or no Linear besides the head.
            DivergedError: an activation that is not finite, or zero everywhere.
        """
        images = calibration_images(model, data, self.calibration_images, ctx)
        head = model.adapter.head_name
        draft = Draft(
            model,
            lambda weight, _name: quantize_rows(weight, self.w_bits),
            None,
            layers=lambda name, layer: isinstance(layer, nn.Linear) and name != head,
            attention=False,
        )
        if not draft.layers:
            raise NotApplicableError(f"{model.name} has no Linear besides its head")
        generator = torch.Generator().manual_seed(ctx.seed)
        scales: dict[str, Tensor] = {}

        def fit_clip(x: Tensor, site: Site) -> nn.Module:
            weight, tokens = weight_of(site), self._tokens(x, generator)
            scales[site.name] = search_clip(
                tokens, weight, self.a_bits, self.clip_steps if self.search_clip else 1
            )
            if not bool(torch.isfinite(scales[site.name]) & (scales[site.name] > 0)):
                raise DivergedError(f"{site} is zero or not finite, so that it has no scale")
            return Noisy(scales[site.name], x.new_zeros(x.shape[-1]), self.a_bits)

        def fit_noise(x: Tensor, site: Site) -> nn.Module:
            weight, scale, tokens = weight_of(site), scales[site.name], self._tokens(x, generator)
            added = x.new_zeros(x.shape[-1])
            if self.search_mean:
                added = added + search_mean(tokens, weight, scale, self.a_bits, self.mean_steps)
            if self.search_noise:
                direction = self._direction(x.shape[-1], generator).to(x) * scale
                added = search_noise(tokens, weight, scale, added, direction, self.a_bits, self.noise_steps)
            return Noisy(scale, added, self.a_bits)

        def weight_of(site: Site) -> Tensor:
            return cast(Tensor, draft.model.module.get_submodule(site.name).weight).detach().float()

        with torch.no_grad():
            with ctx.phase("clips"):
                draft.refit(fit_clip)
                draft.calibrate(images)
            if self.search_mean or self.search_noise:
                with ctx.phase("noise"):
                    draft.refit(fit_noise)
                    draft.calibrate(images)
            for name in draft.layers:
                fold_noise(cast(nn.Linear, draft.model.module.get_submodule(name)))
        return draft.finish({"activations": f"{self.a_bits} bits in front of Linears, simulated"})

    def _tokens(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the rows of ``x`` [..., C] that a search looks at, [tokens, C]."""
        flat = x.flatten(0, -2)
        if not self.search_tokens or len(flat) <= self.search_tokens:
            return flat
        chosen = torch.randperm(len(flat), generator=generator)[: self.search_tokens]
        return flat[chosen.to(flat.device)]

    def _direction(self, channels: int, generator: torch.Generator) -> Tensor:
        """Return the noise of every channel in units of the scale, float32 [channels]."""
        if self.noise == "uniform":
            return 2 * torch.rand(channels, generator=generator) - 1
        return 2 * torch.randn(channels, generator=generator) - 1


class Noisy(nn.Module):
    """``Q(x + N) - N`` on a symmetric grid; without the last term once the bias holds it.

    Args:
        scale: float32 [].
        noise: float32 [C].
    """

    scale: Tensor
    noise: Tensor

    def __init__(self, scale: Tensor, noise: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("noise", noise)
        self.bits = bits
        self.folded = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized input for ``x`` [..., C], in its dtype."""
        noise = self.noise.float()
        levels = snap(x.float() + noise, self.scale.float(), self.bits)
        return (levels if self.folded else levels - noise).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def fold_noise(layer: nn.Linear) -> None:
    """Move ``-W N`` into the bias of a layer whose quantizer is a :class:`Noisy`, in place."""
    quantizer = cast(Noisy, layer.input_quantizer)
    if not bool(quantizer.noise.any()):
        return
    shift = layer.weight.detach().float() @ quantizer.noise
    bias = -shift if layer.bias is None else layer.bias.detach().float() - shift
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)
    quantizer.folded = True


def quantize_rows(weight: Tensor, bits: int) -> Quantized:
    """Return ``weight`` [rows, n] on symmetric grids, ``s = max|w| / (2^(b-1) - 1)`` per row (step 1 of the code)."""
    top = 2 ** (bits - 1) - 1
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0) / top
    codes = UniformGrid(scale, None, -top - 1, top).encode(weight)
    return Quantized(codes.to(torch.int16), scale, None, -top - 1, bits)


def snap(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return ``x`` on the symmetric grid of ``scale``, codes from ``-2^(b-1)`` to ``2^(b-1) - 1``."""
    top = 2 ** (bits - 1) - 1
    return UniformGrid(scale, None, -top - 1, top).snap(x)


def search_clip(x: Tensor, weight: Tensor, bits: int, steps: int) -> Tensor:
    """Return the scale [] whose clip ``max|x| i / steps``, i = steps ... 1, has the least output error.

    Args:
        x: float32 [tokens, C].
        weight: the rounded weight, float32 [out, C].
    """
    top = 2 ** (bits - 1) - 1
    largest = x.abs().max()

    def clips() -> Iterable[Tensor]:
        return (largest * i / steps for i in range(steps, 0, -1))

    def rounded(clip: Tensor) -> Tensor:
        return snap(x.clamp(-clip, clip), clip / top, bits)

    return _least(clips(), lambda clip: _error(rounded(clip) - x, weight)) / top


def search_mean(x: Tensor, weight: Tensor, scale: Tensor, bits: int, steps: int) -> Tensor:
    """Return ``m = s i / steps``, i = -steps ... steps - 1, of the least output error, []."""
    means = (scale * i / steps for i in range(-steps, steps))
    return _least(means, lambda m: _error(snap(x + m, scale, bits) - m - x, weight))


def search_noise(
    x: Tensor, weight: Tensor, scale: Tensor, mean: Tensor, direction: Tensor, bits: int, steps: int
) -> Tensor:
    """Return ``N = m + d i / steps``, i = 0 ... 2 steps - 1, of the least output error.

    Args:
        mean: float32 [] or [C].
        direction: float32 [C], in units of ``x``.

    Returns:
        float32 [C].
    """
    candidates = (mean + direction * i / steps for i in range(2 * steps))
    return _least(candidates, lambda n: _error(snap(x + n, scale, bits) - n - x, weight))


def _error(error: Tensor, weight: Tensor) -> Tensor:
    return (error @ weight.T).square_().mean()


def _least(candidates: Iterable[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the first candidate of the strictly smallest loss."""
    best, least = torch.tensor(torch.nan), torch.inf
    for candidate in candidates:
        value = float(loss(candidate))
        if value < least:
            best, least = candidate, value
    return best
