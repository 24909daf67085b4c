"""Low-rank updates of Linears that are trained and merged (Hu et al., "LoRA", arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from methodbench.torchkit.model import set_submodule, set_weight


class LowRankUpdate(nn.Module):
    """``y = linear(x) + B A x``: A is drawn as a Linear's weight would be, and B begins at zero.

    Args:
        linear: a Linear or its like; its own parameters stay as they are.
        rank: of the update.
        generator: draws A, on the CPU.
    """

    def __init__(self, linear: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = linear.get_parameter("weight")
        bound = 1 / math.sqrt(weight.shape[1])
        down = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
        self.linear = linear
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank], float32: what is trained."""
        return self.down, self.up

    def forward(self, x: Tensor) -> Tensor:
        """Return the updated output for ``x`` [..., in]."""
        out: Tensor = self.linear(x)
        return out + (x.to(self.down.dtype) @ self.down.T @ self.up.T).to(out.dtype)


def merge_updates(module: nn.Module, updates: Mapping[str, LowRankUpdate]) -> None:
    """Put ``W + B A`` in place of every update, by its name in ``module``; its Linear gets a weight of its own."""
    for name, update in updates.items():
        weight = update.linear.get_parameter("weight").detach()
        set_weight(update.linear, weight.float() + (update.up @ update.down).detach())
        set_submodule(module, name, update.linear)
