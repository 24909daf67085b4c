"""Outlier channels put into a vision transformer without changing its function."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import Adapter, detect


@hyperparameters
class OutlierChannels:
    """Options of loaders whose model also exists with activations as hostile as those of large networks."""

    outlier_scale: Annotated[
        float, Field(ge=0, le=3, description="spread s of the injected channel scales; 0 injects nothing")
    ] = 0.0
    outlier_channels: Annotated[
        int, Field(ge=0, le=48, description="channels per norm that are made 30 times larger")
    ] = 2
    outlier_seed: Annotated[int, Field(ge=0, description="of the channels and their scales")] = 1

    def spread(self, module: nn.Module) -> None:
        """Put the outlier channels into ``module``, in place; nothing at a scale of 0."""
        if self.outlier_scale:
            generator = torch.Generator().manual_seed(self.outlier_seed)
            spread_channels(module, detect(module), self.outlier_scale, self.outlier_channels, generator)


def spread_channels(
    module: nn.Module, adapter: Adapter, scale: float, channels: int, generator: torch.Generator
) -> None:
    """Spread the channels of every norm that a block's layers read, and undo it in those layers, in place.

    Args:
        module: keeps its function up to rounding.
        adapter: finds the norms and the layers that read them.
        scale: standard deviation of the channels' log scales.
        channels: how many channels per norm become 30 times larger still.
        generator: draws scales and channels, on the CPU.
    """
    for block in adapter.blocks(module):
        for group in adapter.scale_groups(block):
            norm = block.get_submodule(group.previous)
            if not isinstance(norm, nn.LayerNorm):
                continue
            width = norm.weight.numel()
            ratio = torch.exp(scale * torch.randn(width, generator=generator))
            ratio[torch.randperm(width, generator=generator)[:channels]] *= 30
            with torch.no_grad():
                norm.weight.mul_(ratio)
                norm.bias.mul_(ratio)
                for name in group.linears:
                    weight = block.get_submodule(name).weight
                    assert isinstance(weight, Tensor)
                    weight.div_(ratio)
