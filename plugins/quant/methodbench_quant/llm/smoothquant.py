"""SmoothQuant: accurate and efficient post-training quantization for LLMs (Xiao et al., ICML 2023).

Activations have a few channels that are tens of times larger than the rest, weights do not. Dividing a norm's
output by a scale per channel and multiplying the columns of the layers that read it moves part of that range into
the weights, without changing the model's function. With ``a_j`` the largest magnitude of input channel ``j`` over
the calibration tokens and ``w_j`` that of its column over all layers of the set::

    s_j = max( a_j^alpha / max(w_j, 1e-5)^(1 - alpha), 1e-5 )

Weights and activations are then rounded symmetrically (the convention ``absmax``), by default to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import StaticQuantizer, quantize_inputs
from methodbench.torchkit.adapters import ScaleGroup
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedLayer
from methodbench.torchkit.quantizers import quantize, static_grid
from methodbench.torchkit.sequential import walk
from methodbench_quant.llm.calls import ChannelRanges
from methodbench_quant.llm.layers import (
    apply_scale,
    check_calibration,
    finished,
    open_copy,
    replace_linear,
    weight_of,
)
from methodbench_quant.llm.settings import ActivationSettings, Bits

_LEAST = 1e-5


@hyperparameters
class SmoothQuant(ActivationSettings):
    """Smooths the layers behind norms and quantizes every Linear in the blocks and its input."""

    bits: Bits = 8
    a_bits: Annotated[int, Field(ge=2, le=16, description="activation bits; 16 leaves them alone")] = 8
    alpha: Annotated[
        float, Field(ge=0, le=1, description="migration strength: 0 levels the weights, 1 the activations")
    ] = 0.5
    per: Annotated[Literal["channel", "tensor"], Field(description="what shares a scale of the weights")] = (
        "channel"
    )
    static: Annotated[
        bool, Field(description="one activation scale per layer from calibration, as the INT8 engine has")
    ] = False
    quantize_qkv: Annotated[
        bool, Field(description="round the outputs of query, key and value as well, before heads are split")
    ] = False
    smooth: Annotated[bool, Field(description="move the scales; off for plain rounding")] = True

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers and quantized inputs, calibrated on ``data`` (token ids).

        Raises:
            NotApplicableError: no calibration inputs; a layer is quantized already.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        check_calibration(model, data, ctx)
        peaks: dict[str, float] = {}
        smoothed = 0
        ranges = ChannelRanges(model.adapter)
        for step in walk(model, data, propagate="dense", observe=ranges.watch):
            linears = list(model.adapter.linears(step.block))
            for group in norm_groups(model, step.block) if self.smooth else []:
                readers = [name for name in group.linears if name in ranges.highest]
                if not readers:
                    continue
                absmax = ranges.of(readers[0], f"{step.name}.{readers[0]}")
                weights = (weight_of(step.block.get_submodule(name)) for name in group.linears)
                scale = smoothing_scale(absmax, weights, self.alpha)
                apply_scale(step.block, group, scale)
                smoothed += 1
                for name in readers:
                    ranges.highest[name] = absmax / scale
            for name in linears:
                full_name = f"{step.name}.{name}"
                if name in ranges.highest:
                    peaks[full_name] = float(ranges.of(name, full_name).max())
                quantized = quantize(
                    weight_of(step.block.get_submodule(name)),
                    self.bits,
                    convention="absmax",
                    symmetric=True,
                    along="input" if self.per == "channel" else "tensor",
                    name=full_name,
                )
                replace_linear(step.block, name, quantized)
        if self.quantize_qkv and self.a_bits < 16:
            for name, layer in model.adapter.targets(model.module).items():
                if model.adapter.role(name) in ("q", "k", "v", "qkv"):
                    assert isinstance(layer, PackedLayer)
                    layer.output_quantizer = self.input_quantizer()
        facts = self.quantize_activations(model)
        if self.static and self.a_bits < 16:
            quantize_inputs(model, lambda name: static_quantizer(peaks.get(name), self.a_bits))
        return finished(model, {"alpha": self.alpha, "smoothed": smoothed, **facts})


def smoothing_scale(absmax: Tensor, weights: Iterable[Tensor], alpha: float) -> Tensor:
    """Return ``s`` [in] (equation 4 of the paper).

    Args:
        absmax: fp32 [in], the largest magnitude of every input channel.
        weights: fp32 [out, in] each, of all layers that read the channels.
    """
    extremes = (weight.aminmax(dim=0) for weight in weights)
    largest = [torch.maximum(high, low.neg()) for low, high in extremes]
    columns = torch.stack(largest).amax(0).clamp(min=_LEAST)
    return (absmax.pow(alpha) / columns.pow(1 - alpha)).clamp(min=_LEAST)


def norm_groups(model: LoadedModel, block: nn.Module) -> list[ScaleGroup]:
    """Return the sets of layers behind a norm of ``block`` that can take a scale."""
    return [
        group
        for group in model.adapter.scale_groups(block)
        if not isinstance(block.get_submodule(group.previous), nn.Linear)
        and isinstance(getattr(block.get_submodule(group.previous), "weight", None), Tensor)
    ]


def static_quantizer(absmax: float | None, bits: int) -> StaticQuantizer | None:
    """Return the quantizer of one scale ``absmax / (2^(b-1) - 1)``; None for a layer that no token
    reached."""
    if absmax is None:
        return None
    return StaticQuantizer(static_grid(torch.tensor(max(absmax, _LEAST)), bits))
