"""Learned rounding (AdaRound, arXiv 2004.10568): every weight may go to the level below or above it.

A relaxed variable ``D`` in [0, 1] says how far a weight is rounded up; a regularizer drives it to 0 or 1::

    D = clamp(1.2 sigmoid(v) - 0.1, 0, 1),    W_q = s (clamp(floor(W / s) + D + z, 0, 2^b - 1) - z)
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Ends of the stretched sigmoid (the authors' constants).
_GAMMA, _ZETA = -0.1, 1.1


def stretched_sigmoid(v: Tensor) -> Tensor:
    """Return ``D = clamp(1.2 sigmoid(v) - 0.1, 0, 1)``: how far each weight is rounded up."""
    return (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def nearest_offset(steps: Tensor) -> Tensor:
    """Return ``v`` with which ``D`` is the fraction of ``steps = W / s``, so that learning starts from nearest."""
    fraction = steps - steps.floor()
    return -torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1)


def commitment(d: Tensor, beta: float) -> Tensor:
    """Return ``sum (1 - |2 D - 1|^beta)``: zero where every rounding is decided."""
    return (1 - (2 * d - 1).abs().pow(beta)).sum()


def rounded(steps: Tensor, d: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Return codes ``clamp(floor(steps) + D (+ z))`` (less ``z`` again), with gradient 1 for ``steps`` inside."""
    down = steps + (steps.floor() - steps).detach()
    if zero is None:
        return (down + d).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (down + d + zero).clamp(0, 2**bits - 1) - zero
