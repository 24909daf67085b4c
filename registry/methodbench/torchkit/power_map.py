"""Grids that are uniform after the power map ``x -> sign(x) |x|^a``, and their packed storage.

The power maps are the automorphisms of the positive reals under multiplication: a product of mapped numbers
is the mapped product, so that integer products stay meaningful. Exponents below 1 put fine steps near zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from methodbench.errors import DivergedError
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.quantizers import Quantized


def power_map(x: Tensor, exponent: float) -> Tensor:
    """Return ``sign(x) |x|^exponent``."""
    return x.clone() if exponent == 1 else x.abs().pow_(exponent).copysign_(x)


@dataclass(frozen=True, slots=True)
class PowerGrid:
    """Levels ``sign(k) (|k| scale)^(1/exponent)`` for integers k from ``-(2^(bits-1) - 1)`` to its opposite.

    ``scale`` broadcasts over the values; with ``exponent`` 1 this is the symmetric absmax grid.
    """

    scale: Tensor
    exponent: float
    bits: int

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of ``x``, integer values in its dtype: nearest after the map, not before it."""
        top = 2 ** (self.bits - 1) - 1
        return power_map(x, self.exponent).div_(self.scale).round_().clamp_(-top, top)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of ``codes``."""
        return power_map(codes * self.scale, 1 / self.exponent)

    def snap(self, x: Tensor) -> Tensor:
        """Return the level of every entry of ``x``."""
        return self.decode(self.encode(x))


def find_power_grid(x: Tensor, bits: int, exponent: float) -> PowerGrid:
    """Return the grid of every group (the last axis of ``x``) whose outermost level is its largest magnitude.

    A group of zeros has scale 1.
    """
    scale = x.abs().amax(-1, keepdim=True).pow(exponent) / (2 ** (bits - 1) - 1)
    return PowerGrid(scale.masked_fill(scale == 0, 1.0), exponent, bits)


@dataclass(frozen=True, slots=True)
class PowerQuantized:
    """A matrix on a :class:`PowerGrid`: codes and scales of its mapped values, and the exponent."""

    mapped: Quantized
    exponent: float

    def dequantize(self) -> Tensor:
        """Return the values [rows, columns] in the dtype of the scales."""
        return power_map(self.mapped.dequantize(), 1 / self.exponent)


def on_power_grid(weight: Tensor, grid: PowerGrid, name: str = "the weight") -> PowerQuantized:
    """Return ``weight`` [rows, columns] rounded to ``grid`` (scale [rows, 1]).

    Raises:
        DivergedError: ``weight`` holds NaN or infinity; names ``name``.
    """
    if not bool(torch.isfinite(grid.scale).all()):
        raise DivergedError(f"{name} holds NaN or infinity and cannot be quantized")
    codes = grid.encode(weight).to(torch.int16)
    return PowerQuantized(
        Quantized(codes, grid.scale, None, -(2 ** (grid.bits - 1)), grid.bits), grid.exponent
    )


class PackedPower(PackedLinear):
    """Integer codes of mapped weights: ``W = sign(c) (|c| scale)^(1 / exponent)``."""

    format = "power"
    stores: ClassVar[type] = PowerQuantized

    def __init__(self, *sizes: Any, exponent: float = 1.0, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.exponent = exponent

    @classmethod
    def from_quantized(cls, quantized: Any, **options: Any) -> Self:
        """Pack a :class:`PowerQuantized`; ``options`` as for :class:`PackedLinear`."""
        layer = super().from_quantized(quantized.mapped, **options)
        layer.exponent = quantized.exponent
        return layer

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "exponent": self.exponent}

    @property
    def summary(self) -> str:
        return f"{super().summary}, exponent {self.exponent:.3g}"

    def dequantize(self) -> Tensor:
        return power_map(super().dequantize().float(), 1 / self.exponent).to(self.dtype)
