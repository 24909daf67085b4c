"""Floating-point quantizers: any split into exponent and mantissa, with a real-valued bias or scale.

A format of ``E`` exponent and ``M`` mantissa bits has ``2^(E+M)`` magnitudes, subnormals and zero included, and
neither infinity nor NaN. Its levels are those of a number with exponent field ``p`` and mantissa ``m``, moved by
one real bias ``B`` per group (LLM-FP4, arXiv 2310.16836)::

    |x| = 2^(p - B) (1 + m / 2^M)  for p = 1 .. 2^E - 1,      2^(1 - B) m / 2^M  for p = 0
    largest level c = (2 - 2^-M) 2^(2^E - 1 - B)

A grid keeps ``scale = 2^(2^E - 1 - B)``, the power of two below ``c``, in place of ``B``: it has the magnitude of
the values and so fits the same storage as the scale of an integer grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methodbench.torchkit.quantizers import Granularity, clamp_ste, groups_of, require_finite


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """One sign bit, ``exponent`` bits and ``mantissa`` bits.

    Raises:
        ValueError: no exponent bit, a negative number of mantissa bits, more than 5 exponent or more than 8
            bits in all.
    """

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if not 1 <= self.exponent <= 5 or self.mantissa < 0 or self.bits > 8:
            raise ValueError(
                f"E{self.exponent}M{self.mantissa} is no format of 2 to 8 bits with 1 to 5 exponent bits"
            )

    @classmethod
    def parse(cls, name: str) -> FloatFormat:
        """Return the format called ``name``, for example ``e2m1``.

        Raises:
            ValueError: another form, or numbers of bits that make no format.
        """
        exponent, _, mantissa = name.lower().removeprefix("e").partition("m")
        if not (name[:1] in "eE" and exponent.isdigit() and mantissa.isdigit()):
            raise ValueError(f"{name!r} does not name a format; write for example e2m1")
        return cls(int(exponent), int(mantissa))

    @property
    def name(self) -> str:
        """For example ``e2m1``."""
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        """Bits of a value, with its sign."""
        return 1 + self.exponent + self.mantissa

    @property
    def highest(self) -> int:
        """The largest code of a magnitude: ``2^(E+M) - 1``."""
        return 2 ** (self.exponent + self.mantissa) - 1

    @property
    def top(self) -> float:
        """The largest level, in units of the scale: ``2 - 2^-M``."""
        return 2 - 2.0**-self.mantissa

    @property
    def lowest_exponent(self) -> int:
        """Exponent of the smallest normal level, in units of the scale: ``2 - 2^E``."""
        return 2 - 2**self.exponent

    def levels(self) -> Tensor:
        """Return the magnitudes in units of the scale, float64 [2^(E+M)], in ascending order."""
        code = torch.arange(self.highest + 1)
        power = (code >> self.mantissa).clamp(min=1)
        steps = (code - ((power - 1) << self.mantissa)).double()
        return torch.ldexp(steps, power - 1 + self.lowest_exponent - self.mantissa)


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """The levels of ``format`` times ``scale``; codes carry the sign: ``-(2^(E+M) - 1)`` to ``2^(E+M) - 1``.

    ``scale`` broadcasts over the values of its group. It may be any positive number: the bias is real.
    ``extra_level`` adds the level ``2 scale`` of code ``2^(E+M)`` above the others, which the bits of the format
    cannot hold; without mantissa bits it adds nothing.
    """

    scale: Tensor
    format: FloatFormat
    extra_level: bool = False

    @classmethod
    def from_bias(cls, bias: Tensor, format: FloatFormat, *, extra_level: bool = False) -> FloatGrid:
        """Return the grid of the exponent bias ``B``, of any shape that broadcasts over the values."""
        return cls(torch.exp2(2**format.exponent - 1 - bias), format, extra_level)

    @property
    def top(self) -> float:
        """The largest level, in units of the scale."""
        return 2.0 if self.extra_level and self.format.mantissa else self.format.top

    @property
    def bias(self) -> Tensor:
        """The exponent bias ``B``, of the shape of ``scale``."""
        return 2**self.format.exponent - 1 - torch.log2(self.scale)

    def encode(self, x: Tensor) -> Tensor:
        """Return the signed codes of ``x``, integer values in float32 or wider."""
        y, exponent = self._normalized(x)
        steps = torch.ldexp(y, self.format.mantissa - exponent).round_()
        below = (exponent - self.format.lowest_exponent) << self.format.mantissa
        return steps + torch.sign(steps) * below

    def decode(self, codes: Tensor) -> Tensor:
        """Return the levels of signed ``codes`` in the dtype of ``scale``."""
        levels = self.format.levels()
        if self.top > self.format.top:
            levels = torch.cat([levels, levels.new_tensor([self.top])])
        levels = levels.to(self.scale)
        return levels[codes.abs().long()].mul_(torch.sign(codes).to(self.scale)) * self.scale

    def snap(self, x: Tensor) -> Tensor:
        """Return the nearest level of every entry of ``x``, in its dtype; ties go to the even mantissa."""
        return self._levels_of(x).mul_(self.scale).to(x.dtype)

    def widened(self) -> FloatGrid:
        """Return a grid of one more exponent bit that has all levels of this one, the extra one included.

        Raises:
            ValueError: the format has 5 exponent bits or 8 bits in all already.
        """
        return FloatGrid(2 * self.scale, FloatFormat(self.format.exponent + 1, self.format.mantissa))

    def pass_through(self, x: Tensor) -> Tensor:
        """Return :meth:`snap` of ``x`` with straight-through gradients for ``x`` and ``scale``."""
        y = clamp_ste(x / self.scale, -self.top, self.top)
        with torch.no_grad():
            levels = self._levels_of(x)
        return (y + (levels - y).detach()) * self.scale

    def _levels_of(self, x: Tensor) -> Tensor:
        """Return the nearest levels in units of the scale."""
        y, exponent = self._normalized(x)
        exponent -= self.format.mantissa
        return torch.ldexp(torch.ldexp(y, -exponent).round_(), exponent)

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` in units of the scale, clipped to the levels, and the exponent of its binade.

        Half precision is widened: its subnormals would lose the smallest levels.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.div(x.to(wide), self.scale.to(wide)).clamp_(-self.top, self.top)
        # frexp has its mantissa in [1/2, 1): one less is the exponent of 1.m; it is exact where log2 is not.
        exponent = torch.frexp(y).exponent.sub_(1).clamp_(min=self.format.lowest_exponent)
        return y, exponent


@dataclass(frozen=True, slots=True)
class FloatQuantized:
    """A matrix on floating-point grids: what a packed layer stores.

    Attributes:
        codes: int16 [rows, columns], signed; see :class:`FloatGrid`.
        scale: [rows, groups], or [1, 1] where the whole matrix shares one.
        format: the split of the bits.
    """

    codes: Tensor
    scale: Tensor
    format: FloatFormat

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """Return the values [rows, columns] in the dtype of ``scale``."""
        codes = self.codes.unflatten(1, (self.scale.shape[1], -1))
        return FloatGrid(self.scale.unsqueeze(-1), self.format).decode(codes).flatten(1)


def maximum_bias(maximum: Tensor, format: FloatFormat) -> Tensor:
    """Return the bias whose largest level is ``maximum`` (the paper's equation of ``B`` from a range).

    A maximum of zero counts as 1e-5, the least that the integer conventions divide by.
    """
    return 2**format.exponent - 1 - torch.log2(maximum.clamp(min=1e-5) / format.top)


def find_float_grid(x: Tensor, format: FloatFormat) -> FloatGrid:
    """Return the grid of every group of ``x`` [..., n] whose largest level is the group's largest magnitude.

    A group is the last axis; ``scale`` is [..., 1].
    """
    return FloatGrid(x.abs().amax(-1, keepdim=True).clamp_(min=1e-5).div_(format.top), format)


def quantize_float(
    weight: Tensor, format: FloatFormat, *, group_size: int = -1, name: str = "the weight"
) -> FloatQuantized:
    """Round ``weight`` [out, in] to the nearest level of every group's grid.

    Args:
        group_size: input columns that share a grid; -1 for one grid per output channel.
        name: the layer, for error messages.

    Raises:
        NotApplicableError: ``in`` is no multiple of ``group_size``.
        DivergedError: ``weight`` holds NaN or infinity.
    """
    require_finite(weight, name)
    grouped = groups_of(weight, group_size, name)
    return on_float_grid(grouped, find_float_grid(grouped, format))


def on_float_grid(x: Tensor, grid: FloatGrid) -> FloatQuantized:
    """Return ``x`` [rows, groups, group_size] rounded to ``grid`` (scale [rows, groups, 1])."""
    return FloatQuantized(grid.encode(x).to(torch.int16).flatten(1), grid.scale.squeeze(-1), grid.format)


def fake_quantize_float(
    x: Tensor, format: FloatFormat, *, granularity: Granularity = "token", group_size: int = -1
) -> Tensor:
    """Return ``x`` [..., features] rounded to a floating-point grid found from ``x`` itself.

    Args:
        granularity: ``token`` for one grid per vector along the last axis, ``tensor`` for one grid in all.
        group_size: features of a token that share a grid; -1 for all of them.

    Raises:
        NotApplicableError: the features are no multiple of ``group_size``.
    """
    if granularity == "tensor":
        grouped = x.reshape(1, -1)
    else:
        grouped = x if group_size == -1 else groups_of(x, group_size, "the activation")
    return find_float_grid(grouped, format).snap(grouped).view_as(x)
