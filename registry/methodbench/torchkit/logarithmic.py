"""Quantizers on powers of two: multiplications become shifts.

:class:`Log2Grid` has the levels ``scale * 2^-k``, dense near zero, as attention probabilities want it.
:func:`power_of_two` rounds numbers themselves: scales, so that a uniform grid needs no multiplier, or weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methodbench.torchkit.quantizers import clamp_ste, round_ste


def power_of_two(x: Tensor) -> Tensor:
    """Return ``sign(x) * 2^round(log2 |x|)``: the nearest power of two on a logarithmic axis; zero stays
    zero."""
    return torch.sign(x) * torch.exp2(torch.log2(x.abs().clamp(min=torch.finfo(x.dtype).tiny)).round())


def power_of_two_ste(x: Tensor) -> Tensor:
    """Return :func:`power_of_two` of positive ``x`` with a straight-through gradient through its exponent."""
    return torch.exp2(round_ste(torch.log2(x)))


#: What becomes of values below the last level ``scale * 2^-(n-1)``: they take it (``clamp``), or become zero
#: from half an octave below it on, either beside ``n = 2^bits`` levels (``extra``, as FQ-ViT and its followers
#: do; one code more than the bits have) or in place of the last of them (``zero``).
Floor = Literal["clamp", "extra", "zero"]


@dataclass(frozen=True, slots=True)
class Log2Grid:
    """Levels ``scale * 2^-k`` for integers ``k`` from 0 on, for values that are not negative.

    Codes are ``k``; the code after the last level is zero. Negative values count as zero.
    """

    scale: Tensor
    """Broadcasts over the values; the largest level."""
    bits: int
    floor: Floor = "zero"

    @property
    def levels(self) -> int:
        """How many levels there are beside zero."""
        return 2**self.bits - (self.floor == "zero")

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of ``x``, integer values in its floating dtype."""
        k = torch.log2(x.clamp(min=0) / self.scale).neg_().round_()
        return k.clamp_(0, self.levels - (self.floor == "clamp"))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the levels of ``codes`` in the dtype of ``scale``."""
        return torch.where(codes == self.levels, 0.0, self.scale * torch.exp2(-codes.to(self.scale.dtype)))

    def snap(self, x: Tensor) -> Tensor:
        """Return the level of every entry of ``x``: the nearest on a logarithmic axis."""
        return self.decode(self.encode(x))

    def pass_through(self, x: Tensor) -> Tensor:
        """Return :meth:`snap` of ``x`` with the gradient of the identity from zero to the largest level."""
        y = clamp_ste(x / self.scale, 0.0, 1.0) * self.scale
        return y + (self.snap(x) - y).detach()
