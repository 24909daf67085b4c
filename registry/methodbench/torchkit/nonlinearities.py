"""Activation functions as modules: where a network has them, and ReLUs with a shift or a threshold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_OTHERS = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)


class ShiftedReLU(nn.Module):
    """``ReLU(x - shift)``; or with a threshold T, x itself where ``x >= T`` and 0 elsewhere (FATReLU).

    Args:
        shift: b, subtracted before the ReLU (arXiv 2310.04564, section 5.3).
        threshold: T, where values pass unchanged from (arXiv 2402.13516, section 3.2); 0 is the ReLU.

    Raises:
        ValueError: both are given.
    """

    def __init__(self, shift: float = 0.0, threshold: float = 0.0) -> None:
        super().__init__()
        if shift and threshold:
            raise ValueError("a ReLU is shifted, or it has a threshold")
        self.shift = shift
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified ``x``, of its shape."""
        if self.threshold:
            return torch.where(x >= self.threshold, x, 0)
        return torch.relu(x - self.shift) if self.shift else torch.relu(x)

    def extra_repr(self) -> str:
        return f"shift={self.shift}, threshold={self.threshold}"


def nonlinearities(module: nn.Module) -> dict[str, nn.Module]:
    """Return the elementwise activation functions inside ``module`` that are modules of their own, by dotted name.

    Those of torch and of transformers, and :class:`ShiftedReLU`. A function that is called without a module is not
    found; a module that stands at several places comes once.
    """
    return {
        name: part
        for name, part in module.named_modules()
        if name
        and not isinstance(part, _OTHERS)
        and (isinstance(part, ShiftedReLU) or type(part).__module__ in _HOMES)
    }
