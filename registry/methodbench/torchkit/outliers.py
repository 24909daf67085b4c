"""Activation outliers planted into a model without changing its function.

Large language models have a few channels whose activations are tens of times larger than the rest; small
models often lack them, and with them the reason for methods that look at activations. Scaling a norm's gain
(and bias) on a channel by r, and dividing that column of every Linear that reads the norm by r, gives such
channels to any model whose adapter knows its norms: the outputs stay, the activations in between do not.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import LoadedModel, set_weight


def inject_outliers(
    model: LoadedModel, *, factor: float = 16.0, channels: int = 4, seed: int = 0
) -> LoadedModel:
    """Return ``model`` with ``channels`` outlier channels behind every norm of its blocks.

    Args:
        model: left as it is; untouched tensors are shared with it.
        factor: how much larger the activations of these channels become. Powers of two keep the outputs bit
            for bit, since no product changes its mantissa.
        channels: how many; the same ones throughout the model, as in large language models.
        seed: draws the channels.

    Returns:
        A model whose name ends in ``+outliers`` and whose facts list factor and channels.

    Raises:
        NotApplicableError: no norm of the blocks can take a scale.
        ValueError: ``factor`` is not positive, or there are fewer than ``channels`` channels.
    """
    if factor <= 0:
        raise ValueError(f"factor must be positive, not {factor}")
    changed = dataclasses.replace(model.clone(), name=f"{model.name}+outliers")
    scales: dict[int, torch.Tensor] = {}
    for block in changed.adapter.blocks(changed.module):
        for group in changed.adapter.scale_groups(block):
            norm = block.get_submodule(group.previous)
            if not _is_norm(norm):
                continue
            width = norm.get_parameter("weight").shape[0]
            scales.setdefault(width, _scale(width, factor, channels, seed))
            scale = scales[width].to(norm.get_parameter("weight"))
            for name, parameter in list(norm.named_parameters(recurse=False)):
                set_weight(norm, parameter * scale, name)
            for name in group.linears:
                reader = block.get_submodule(name)
                set_weight(reader, reader.get_parameter("weight") / scale)
    if not scales:
        raise NotApplicableError(
            f"{model.name} has no norm whose gain can be moved into the layers behind it",
            "Outliers can be planted in pre-norm transformers with a gain per channel.",
        )
    planted = {str(width): (scale != 1).nonzero().flatten().tolist() for width, scale in scales.items()}
    changed.facts |= {"outlier_factor": factor, "outlier_channels": planted}
    return changed


def _scale(width: int, factor: float, channels: int, seed: int) -> torch.Tensor:
    if not 0 < channels <= width:
        raise ValueError(f"channels must be 1 to {width}, the width of the norm, not {channels}")
    scale = torch.ones(width)
    scale[torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:channels]] = factor
    return scale


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1
