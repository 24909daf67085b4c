"""How dense a trained network is: its weights, and what its activation functions give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from methodbench.torchkit.nonlinearities import nonlinearities


@torch.no_grad()
def densities(module: nn.Module, inputs: Any) -> dict[str, float]:
    """Return the share of weights that are not zero, and of activations, as facts.

    ``weight_density`` counts parameters of two and more dimensions. ``activation_density`` is the mean over activation
    functions, which must be modules, of the share of their outputs on ``inputs`` that is not exactly zero;
    ``dead_units`` the share of units (positions count apart) that are zero on every input. A network without
    such modules has neither.
    """
    weights = [p for p in module.parameters() if p.ndim >= 2]
    found = {"weight_density": share([int((p != 0).sum()) for p in weights], [p.numel() for p in weights])}
    seen: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda _, __, output: seen.append(output))
        for part in nonlinearities(module).values()
    ]
    module.eval()
    try:
        module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        alive = [output.flatten(1) != 0 for output in seen]
        found["activation_density"] = sum(float(part.double().mean()) for part in alive) / len(alive)
        dead = [int((~part.any(0)).sum()) for part in alive]
        found["dead_units"] = share(dead, [part.shape[1] for part in alive])
    return found


def share(counts: list[int], totals: list[int]) -> float:
    """Return the sum of ``counts`` over that of ``totals``; 0 of nothing is 0."""
    return sum(counts) / max(1, sum(totals))
