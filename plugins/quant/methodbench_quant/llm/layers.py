"""What every weight quantizer does before and after its own algorithm."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import ScaleGroup, unfuse_experts
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule, set_weight
from methodbench.torchkit.packed import PackedLayer, dense_linear, pack_linear, packed_layers
from methodbench.torchkit.quantizers import require_finite
from methodbench.torchkit.size import bits_per_weight


def open_copy(model: LoadedModel) -> LoadedModel:
    """Return a clone of ``model`` with experts as Linears of their own, every target checked to be dense and finite.

    Raises:
        NotApplicableError: the blocks hold no Linear, or a layer that is quantized already.
        DivergedError: a weight holds NaN or infinity; names the layer.
    """
    opened = model.clone()
    unfuse_experts(opened.module)
    targets = opened.adapter.targets(opened.module)
    if not targets:
        raise NotApplicableError(f"{model.name} has no Linear in its blocks to quantize")
    for name, layer in targets.items():
        require_finite(weight_of(dense_linear(layer, name)), name)
    return opened


def single_precision(model: LoadedModel) -> tuple[LoadedModel, torch.dtype]:
    """Return ``model``, in fp32 for methods that learn, and the dtype that :func:`in_dtype` takes the result back to.

    A model in half precision is copied; any other is returned as it is.
    """
    dtype = next(p.dtype for p in model.module.parameters() if p.is_floating_point())
    if dtype not in (torch.float16, torch.bfloat16):
        return model, dtype
    return dataclasses.replace(
        model, module=copy.deepcopy(model.module).float(), facts=dict(model.facts)
    ), dtype


def in_dtype(model: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """Convert ``model``, which the caller owns, to ``dtype``; what packed layers store of a weight stays."""
    model.module.to(dtype)
    for layer in packed_layers(model.module).values():
        layer.dtype = dtype
    return model


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a Linear, fp32 [out, in], detached; shared with the layer where that is fp32."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().float()


def replace_linear(block: nn.Module, name: str, quantized: Any, **options: Any) -> PackedLayer:
    """Put the packed form of ``quantized`` in the place of the Linear called ``name`` in ``block``.

    Args:
        quantized: a weight of a type that a packed layer stores.
        options: passed to :func:`methodbench.torchkit.packed.pack_linear`.
    """
    packed = pack_linear(dense_linear(block.get_submodule(name), name), quantized, **options)
    set_submodule(block, name, packed)
    return packed


def finished(model: LoadedModel, facts: dict[str, Any]) -> LoadedModel:
    """Return ``model`` with its storage declared real, its bits per weight measured, and ``facts`` noted."""
    model.storage = "real"
    model.accounted_bits = bits_per_weight(model)
    model.facts.update({"layers": len(model.adapter.targets(model.module)), **facts})
    return model


#: Calibration tokens per input column below which what is fitted follows the calibration text too closely.
TOKENS_PER_COLUMN = 4


def check_calibration(model: LoadedModel, data: Calibration, ctx: Context) -> None:
    """Warn where ``data`` has fewer than :data:`TOKENS_PER_COLUMN` tokens per input column of a layer."""
    if not len(data) or data.inputs.ndim != 2:
        return
    tokens = data.inputs.numel()
    widths = [int(layer.in_features) for layer in model.adapter.targets(model.module).values()]  # type: ignore[arg-type]
    warn_of_short_calibration(((tokens, width) for width in widths), ctx)


def warn_of_short_calibration(seen: Iterable[tuple[int, int]], ctx: Context) -> None:
    """Warn where layers saw too little: ``seen`` has the calibration tokens and the input columns of each."""
    short = [(tokens, width) for tokens, width in seen if tokens < TOKENS_PER_COLUMN * width]
    if short:
        tokens, width = min(short, key=lambda pair: pair[0] / pair[1])
        ctx.warn(
            f"calibration is short for {len(short)} layers (worst: {tokens} tokens for {width} "
            f"inputs; {TOKENS_PER_COLUMN} per input are advisable): it may be fitted to them alone"
        )


def apply_scale(block: nn.Module, group: ScaleGroup, scale: Tensor) -> None:
    """Move ``scale`` [in] from the layer before into the Linears of ``group``; the block's function stays."""
    previous = block.get_submodule(group.previous)
    if isinstance(previous, nn.Linear):
        divisor = torch.ones(previous.out_features, device=scale.device)
        divisor[-len(scale) :] = scale
        set_weight(previous, weight_of(previous) / divisor.unsqueeze(1))
    elif isinstance(getattr(previous, "weight", None), Tensor):
        divisor = scale
        set_weight(previous, weight_of(previous) / divisor)
    else:
        set_submodule(block, group.previous, ScaledActivation(previous, scale))
    bias = getattr(previous, "bias", None)
    if isinstance(bias, Tensor):
        set_weight(previous, bias.detach().float() / divisor, "bias")
    for name in group.linears:
        layer = block.get_submodule(name)
        set_weight(layer, weight_of(layer) * scale)


class ScaledActivation(nn.Module):
    """An activation function whose output is divided by ``scale`` [features]."""

    def __init__(self, activation: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.activation = activation
        self.scale: Tensor
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``activation(x) / scale`` for ``x`` [..., features]."""
        return self.activation(x) / self.scale
