"""A chain of four blocks, and a task that calls it."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import Calibration, LoadedModel


@hyperparameters
class Chain:
    """Random weights under the seed."""

    width: int = 8

    def prepare(self, source, target, ctx):
        generator = torch.Generator().manual_seed(ctx.seed)
        weights = {
            f"{i}.0.weight": torch.randn(self.width, self.width, generator=generator) for i in range(4)
        }
        save_file(weights, target / "model.safetensors")

    def load(self, folder, ctx):
        blocks = [nn.Sequential(nn.Linear(self.width, self.width, bias=False), nn.Tanh()) for _ in range(4)]
        module = nn.Sequential(*blocks)
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return LoadedModel("chain", "chain", module.eval(), Adapter(kind="chain", stages=tuple("0123")))


@hyperparameters
class Mean:
    """Draws inputs from torch's own generator, whose state the engine vouches for."""

    rows: int = 5

    def calibration(self, model, ctx):
        return Calibration.none()

    def evaluate(self, model, ctx):
        width = model.module[0][0].in_features
        with torch.no_grad():
            outputs = model.module(torch.randn(self.rows, width))
        return Evaluation(scores={"mean": Scores(outputs.mean(dim=1).double().numpy())})
