"""Batch normalization folded into the convolutions before it, as integer arithmetic needs it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import LoadedModel, set_submodule, set_weight
from methodbench.torchkit.tracing import traced


def fold_batchnorms(model: LoadedModel, images: Tensor) -> LoadedModel:
    """Return a clone of ``model`` with every BatchNorm2d that reads a convolution folded into it.

    ``W <- W gamma / sqrt(var + eps)`` per output channel, ``b <- (b - mean) gamma / sqrt(var + eps) + beta``. An
    activation that is part of the norm's module stays in its place. A model without such norms is only cloned.

    Args:
        model: in eval mode; left alone.
        images: [B, C, H, W] to find out which norm reads which convolution, and that the function stays.

    Raises:
        NotApplicableError: the outputs change, so that a convolution has other readers than its norm.
    """
    folded = model.clone()
    pairs = _pairs(folded.module, images)
    if not pairs:
        return folded
    for norm_name, conv_name in pairs.items():
        norm = cast(nn.BatchNorm2d, folded.module.get_submodule(norm_name))
        conv = cast(nn.Conv2d, folded.module.get_submodule(conv_name))
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        gain = (variance + norm.eps).rsqrt()
        gain = gain if norm.weight is None else gain * norm.weight.detach()
        bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.detach()
        bias = (bias - mean) * gain + (0 if norm.bias is None else norm.bias.detach())
        set_weight(conv, conv.weight * gain.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
        set_submodule(folded.module, norm_name, getattr(norm, "act", nn.Identity()))
    with torch.no_grad():
        expected, actual = model.module(images), folded.module(images)
    atol = 1e-3 * float(expected.nan_to_num().abs().max())
    if not torch.allclose(actual, expected, rtol=1e-3, atol=atol, equal_nan=True):
        raise NotApplicableError(f"the batch norms of {model.name} cannot be folded into its convolutions")
    return folded


def batchnorms_behind(model: LoadedModel, images: Tensor) -> dict[str, nn.BatchNorm2d]:
    """Return the BatchNorm2d that reads each convolution, by the convolution's name.

    Args:
        images: [B, C, H, W] to find out which norm reads which convolution.
    """
    return {
        conv: cast(nn.BatchNorm2d, model.module.get_submodule(norm))
        for norm, conv in _pairs(model.module, images).items()
    }


def _pairs(module: nn.Module, images: Tensor) -> dict[str, str]:
    """Return the convolution whose output each BatchNorm2d reads, by the norm's name."""
    return traced(
        module,
        images,
        writers=lambda _, part: isinstance(part, nn.Conv2d),
        readers=lambda _, part: isinstance(part, nn.BatchNorm2d),
    ).writer_of
