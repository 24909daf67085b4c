"""Loaders of the toy models."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel


@hyperparameters
class ToyLoader:
    """Makes a linear layer."""

    width: int = 4

    def prepare(self, source, target, ctx):
        generator = torch.Generator().manual_seed(ctx.seed)
        save_file(
            {"0.0.weight": torch.randn(self.width, self.width, generator=generator)},
            target / "model.safetensors",
        )

    def load(self, folder, ctx):
        module = nn.Sequential(nn.Sequential(nn.Linear(self.width, self.width, bias=False)))
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return LoadedModel("toy", "toy-net", module.eval(), Adapter(kind="toy-net", stages=("0",)))


@hyperparameters
class BrokenLoader(ToyLoader):
    """Cannot prepare anything."""

    def prepare(self, source, target, ctx):
        raise ValueError("the recipe is wrong")
