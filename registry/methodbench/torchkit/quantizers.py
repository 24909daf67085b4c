"""Uniform quantizers: the conventions that papers' numbers depend on, by name.

A quantizer fixes a grid for every group of values (a tensor, a row, a run of ``group_size`` input columns)
and maps values to integer codes on it and back. Four conventions are in use; with ``b`` bits, ``mn`` and
``mx`` the extremes of a group, round half to even:

============ ==========================================================================================
``awq_asym`` raw extremes; ``s = max(mx - mn, 1e-5) / (2^b - 1)``,
             ``z = clamp(-round(mn / s), 0, 2^b - 1)`` (AWQ)
``gptq``     extremes widened to include 0, an all-zero group takes [-1, 1];
             ``s = (mx - mn) / (2^b - 1)``, ``z = round(-mn / s)`` (GPTQ)
``absmax``   symmetric only: ``s = max(max|x|, 1e-5) / (2^(b-1) - 1)`` (SmoothQuant)
``omni``     extremes times a clipping factor; ``s = (mx - mn) / (2^b - 1)`` in [1e-5, 1e4],
             ``z = round(-mn / s)`` not limited to the grid (OmniQuant)
============ ==========================================================================================

Grids of another shape have the same four methods (:class:`Grid`): floating point in
:mod:`methodbench.torchkit.floats`, powers of two in :mod:`methodbench.torchkit.logarithmic`. Whatever snaps
weights column by column, trains through a quantizer or packs codes needs nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from methodbench.errors import DivergedError, NotApplicableError

Convention = Literal["awq_asym", "gptq", "absmax", "omni"]
Granularity = Literal["token", "tensor"]
#: What a group of weights runs along: the input columns of one row, the output rows of one column, or both.
Along = Literal["input", "output", "tensor"]
Factor = Tensor | float

#: Weights that are rounded at a time: bounds what is held in floating point beside them.
_ENCODED_AT_ONCE = 1 << 22


class Grid(Protocol):
    """Levels that values are rounded to, each with an integer code."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of ``x``, integer values in ``x``'s floating dtype."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Return the levels of ``codes``."""
        ...

    def snap(self, x: Tensor) -> Tensor:
        """Return the level of every entry of ``x``."""
        ...

    def pass_through(self, x: Tensor) -> Tensor:
        """Return :meth:`snap` of ``x`` with the gradient of the identity inside the grid's range."""
        ...


def round_ste(x: Tensor) -> Tensor:
    """Return ``x`` rounded half to even, with the gradient of the identity (straight-through estimator)."""
    return x + (x.round() - x).detach()


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Return ``x`` limited to ``[low, high]``, with gradient 1 inside, the bounds included, and 0 outside.

    ``torch.clamp`` gives no gradient on the bounds, where the codes of the outermost levels lie.
    """
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


@dataclass(frozen=True, slots=True)
class UniformGrid:
    """Equally spaced levels ``(code - zero) * scale`` for integer codes from ``low`` to ``high``.

    ``scale`` has size 1 along the last axis, so that it broadcasts over the values of its group. ``zero`` has
    the same shape and integer values, or is None where zero maps to code 0.
    """

    scale: Tensor
    zero: Tensor | None
    low: int
    high: int

    def rows(self, rows: slice) -> UniformGrid:
        """Return the grid of some rows of the values; one that all rows share is that of each."""
        if len(self.scale) == 1:
            return self
        zero = None if self.zero is None else self.zero[rows]
        return UniformGrid(self.scale[rows], zero, self.low, self.high)

    def columnwise(self) -> UniformGrid:
        """Return a grid of [rows, 1] as one that broadcasts over a column [rows]."""
        zero = None if self.zero is None else self.zero.squeeze(-1)
        return UniformGrid(self.scale.squeeze(-1), zero, self.low, self.high)

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of ``x`` [..., n], integer values in ``x``'s floating dtype."""
        codes = torch.div(x, self.scale).round_()
        if self.zero is not None:
            codes.add_(self.zero)
        return codes.clamp_(self.low, self.high)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of ``codes`` [..., n] in the dtype of ``scale``."""
        if self.zero is None:
            return codes * self.scale
        return (codes - self.zero).mul_(self.scale)

    def snap(self, x: Tensor) -> Tensor:
        """Return the level that the convention assigns to every entry of ``x`` [..., n]."""
        codes = self.encode(x)
        if self.zero is not None:
            codes.sub_(self.zero)
        return codes.mul_(self.scale)

    def pass_through(self, x: Tensor, *, bounds: bool = True) -> Tensor:
        """Return :meth:`snap` of ``x`` [..., n] with straight-through gradients.

        ``x`` receives the gradient where its code is not clamped; without ``bounds`` not at the outermost codes
        either, as from ``torch.clamp``. ``scale`` receives that of
        ``(code - zero) * scale`` with rounding taken as the identity, as in LSQ (arXiv 1902.08153), and
        ``zero``, where it is learned, the part of the clamped entries.
        """
        clamp = clamp_ste if bounds else torch.clamp
        steps = round_ste(x / self.scale)
        if self.zero is None:
            return clamp(steps, self.low, self.high) * self.scale
        return (clamp(steps + self.zero, self.low, self.high) - self.zero) * self.scale


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix on a uniform grid: what a packed layer stores.

    Attributes:
        codes: int16 [rows, columns], from ``low`` to ``high``.
        scale: [rows, groups], floating; [1, 1] where the whole matrix shares one.
        zero: of the shape of ``scale``, integer values in its dtype; None for a symmetric grid.
        low: smallest code: 0, or negative for a symmetric grid.
        bits: bits per code; ``high`` is ``low + 2**bits - 1``.
        transposed: whether ``codes`` are those of the transposed weight, so that groups run along its
            outputs.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    low: int
    bits: int
    transposed: bool = False

    @property
    def group_size(self) -> int:
        """Columns of ``codes`` that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """Return the weight in the dtype of ``scale``: [rows, columns], [columns, rows] if transposed."""
        codes = self.codes.unflatten(1, (self.scale.shape[1], -1)).to(self.scale.dtype)
        zero = None if self.zero is None else self.zero.unsqueeze(-1)
        grid = UniformGrid(self.scale.unsqueeze(-1), zero, self.low, self.low + 2**self.bits - 1)
        values = grid.decode(codes).flatten(1)
        return values.T.contiguous() if self.transposed else values


class FindGrid(Protocol):
    """How a convention fixes a grid from the extremes of a group."""

    def __call__(self, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> UniformGrid: ...


def _awq_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> UniformGrid:
    if symmetric:
        scale = torch.maximum(-low, high).clamp_(min=1e-5).div_(2 ** (bits - 1) - 1)
        return UniformGrid(scale, None, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    top = 2**bits - 1
    scale = (high - low).clamp_(min=1e-5).div_(top)
    return UniformGrid(scale, (low / scale).round_().neg_().clamp_(0, top), 0, top)


def _gptq_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> UniformGrid:
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        # A group without negative values keeps its lower end at zero, as in the authors' code, and is
        # clipped.
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    top = 2**bits - 1
    scale = (high - low) / top
    if symmetric:
        return UniformGrid(scale, None, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return UniformGrid(scale, (-low / scale).round_(), 0, top)


def _absmax_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> UniformGrid:
    if not symmetric:
        raise ValueError("the convention absmax is symmetric only")
    return _awq_grid(low, high, bits, symmetric=True)


def _omni_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> UniformGrid:
    if symmetric:
        middle = 2 ** (bits - 1) - 1
        scale = torch.maximum(low.abs(), high.abs()).div_(middle).clamp_(1e-5, 1e4)
        return UniformGrid(scale, None, -middle, 2**bits - 1 - middle)
    scale = ((high - low) / (2**bits - 1)).clamp_(1e-5, 1e4)
    return UniformGrid(scale, (-low / scale).clamp_(-1e4, 1e4).round_(), 0, 2**bits - 1)


#: The conventions by name; see the module's table and the papers named there.
CONVENTIONS: Mapping[str, FindGrid] = {
    "awq_asym": _awq_grid,
    "gptq": _gptq_grid,
    "absmax": _absmax_grid,
    "omni": _omni_grid,
}


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of every group of ``x`` [..., n], each [..., 1]; differentiable."""
    if x.requires_grad:
        # Not every torch that is supported differentiates aminmax, which reads x only once.
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return low, high


def find_grid(
    x: Tensor,
    bits: int,
    convention: Convention,
    *,
    symmetric: bool = False,
    clip: tuple[Factor, Factor] = (1.0, 1.0),
) -> UniformGrid:
    """Return the grid of every group of ``x``.

    Args:
        x: floating [..., n]; a group is the last axis.
        bits: 2 to 16.
        convention: a key of :data:`CONVENTIONS`.
        symmetric: zero maps to code 0 and no zero point is kept.
        clip: factors on the minimum and on the maximum (OmniQuant's learnable clipping, after the sigmoid).

    Returns:
        A grid whose ``scale`` is [..., 1].

    Raises:
        ValueError: ``absmax`` without ``symmetric``.
    """
    low, high = extremes(x)
    if isinstance(clip[0], Tensor) or isinstance(clip[1], Tensor) or clip != (1.0, 1.0):
        low, high = low * clip[0], high * clip[1]
    return CONVENTIONS[convention](low, high, bits, symmetric)


def find_grid_by_mse(
    x: Tensor,
    bits: int,
    convention: Convention = "gptq",
    *,
    symmetric: bool = False,
    candidates: int = 100,
    shrink: float = 0.8,
    norm: float = 2.4,
) -> UniformGrid:
    """Return a convention's grid after a search over clipped ranges (the ``mse`` option of GPTQ's code).

    Both ends are multiplied by ``1 - i / candidates`` for ``i < shrink * candidates``; a range wins where the
    sum of ``|q(x) - x| ** norm`` over the group is strictly smaller.

    Args:
        x: floating [..., n]; a group is the last axis.

    Returns:
        A grid whose ``scale`` is [..., 1].
    """
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    grid = CONVENTIONS[convention](low, high, bits, symmetric)
    scale, zero = grid.scale, grid.zero
    least = torch.full_like(scale, torch.inf)
    for i in range(int(shrink * candidates)):
        share = 1 - i / candidates
        tried = CONVENTIONS[convention](share * low, share * high, bits, symmetric)
        error = tried.snap(x).sub_(x).abs_().pow_(norm).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, tried.scale, scale)
        if zero is not None and tried.zero is not None:
            zero = torch.where(better, tried.zero, zero)
    return UniformGrid(scale, zero, grid.low, grid.high)


def groups_of(
    x: Tensor, group_size: int, name: str = "the weight", along: Literal["input", "output"] = "input"
) -> Tensor:
    """Return ``x`` [rows, columns] as a view [rows, groups, group_size]; -1 makes a row one group.

    ``along`` says for error messages what the columns of ``x`` are.

    Raises:
        NotApplicableError: the width is no multiple of ``group_size``; names ``name``, width and group.
    """
    width = x.shape[-1]
    size = width if group_size == -1 else group_size
    if width % size:
        raise NotApplicableError(
            f"{name} has {width} {'input columns' if along == 'input' else 'output rows'}, "
            f"which is no multiple of the group size {size}",
            "Choose a group size that divides every layer's width, or -1 for one group along the whole axis.",
        )
    return x.unflatten(-1, (width // size, size))


def finite(x: Tensor) -> bool:
    """Return whether ``x`` holds neither NaN nor infinity, without a tensor of its size beside it."""
    return not x.numel() or bool(torch.stack(x.detach().aminmax()).isfinite().all())


def require_finite(x: Tensor, name: str = "the weight") -> None:
    """Check that ``x`` holds numbers only.

    Raises:
        DivergedError: it holds NaN or infinity; names ``name``.
    """
    if not finite(x):
        raise DivergedError(f"{name} holds NaN or infinity and cannot be quantized")


def on_grid(x: Tensor, grid: UniformGrid, bits: int, name: str = "the weight") -> Quantized:
    """Return ``x`` [rows, groups, group_size] rounded to ``grid`` (scale [rows, groups, 1]).

    Raises:
        DivergedError: the grid is not finite, because ``x`` holds NaN or infinity.
    """
    require_finite(grid.scale, name)
    zero = None if grid.zero is None else grid.zero.squeeze(-1)
    codes = torch.empty(x.shape, dtype=torch.int16, device=x.device)
    step = max(1, _ENCODED_AT_ONCE * len(x) // max(1, x.numel()))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        codes[rows] = grid.rows(rows).encode(x[rows])
    return Quantized(codes.flatten(1), grid.scale.squeeze(-1), zero, grid.low, bits)


def quantize(
    weight: Tensor,
    bits: int,
    *,
    group_size: int = -1,
    convention: Convention = "awq_asym",
    symmetric: bool = False,
    clip: tuple[Factor, Factor] = (1.0, 1.0),
    along: Along = "input",
    name: str = "the weight",
) -> Quantized:
    """Round ``weight`` to the nearest level of every group's grid.

    Args:
        weight: floating [out, in].
        group_size: entries that share a grid; -1 for all along the axis (with ``along="input"`` one grid per
            output channel).
        clip: see :func:`find_grid`; tensors broadcast against [rows, groups, 1].
        along: ``input`` for groups of consecutive columns of a row, ``output`` for groups of consecutive rows
            of a column, ``tensor`` for one grid in all, which leaves no choice of ``group_size``.
        name: the layer, for error messages.

    Raises:
        NotApplicableError: the axis is no multiple of ``group_size``.
        DivergedError: ``weight`` holds NaN or infinity.
        ValueError: ``along="tensor"`` with a ``group_size``.
    """
    require_finite(weight, name)
    if along == "tensor":
        if group_size != -1:
            raise ValueError("one grid for the whole tensor leaves no group size to choose")
        grouped, found = weight.unsqueeze(1), weight.reshape(1, 1, -1)
    else:
        grouped = found = groups_of(weight if along == "input" else weight.T, group_size, name, along)
    grid = find_grid(found, bits, convention, symmetric=symmetric, clip=clip)
    return dataclasses.replace(on_grid(grouped, grid, bits, name), transposed=along == "output")


def fake_quantize(
    x: Tensor,
    bits: int,
    *,
    granularity: Granularity = "token",
    group_size: int = -1,
    convention: Convention = "absmax",
    symmetric: bool = True,
    clip: tuple[Factor, Factor] = (1.0, 1.0),
) -> Tensor:
    """Return ``x`` rounded to a grid found from ``x`` itself: dynamic activation quantization.

    Where ``x`` needs gradients they pass rounding as if it were the identity, and reach the extremes that the grid
    follows from.

    Args:
        x: floating [..., features].
        granularity: ``token`` for one grid per vector along the last axis, ``tensor`` for one grid in all.
        group_size: features of a token that share a grid; -1 for all of them.
        clip: see :func:`find_grid`.

    Returns:
        A tensor of ``x``'s shape and dtype.

    Raises:
        NotApplicableError: the features are no multiple of ``group_size``.
    """
    if granularity == "tensor":
        grouped = x.reshape(1, -1)
    else:
        grouped = x if group_size == -1 else groups_of(x, group_size, "the activation")
    grid = find_grid(grouped, bits, convention, symmetric=symmetric, clip=clip)
    needs_gradients = grouped.requires_grad and torch.is_grad_enabled()
    return (grid.pass_through(grouped) if needs_gradients else grid.snap(grouped)).view_as(x)


def static_grid(absmax: Tensor | float, bits: int) -> UniformGrid:
    """Return the symmetric grid that a calibrated ``absmax`` fixes, of ``2^b - 1`` levels.

    Codes run from ``-(2^(b-1) - 1)`` to ``2^(b-1) - 1`` (DGQ's static activation quantizer). ``absmax`` is a
    number, [] or anything that broadcasts against the values.
    """
    top = 2 ** (bits - 1) - 1
    return UniformGrid(torch.as_tensor(absmax) / top, None, -top, top)


def quantize_static(x: Tensor, absmax: Tensor | float, bits: int) -> Tensor:
    """Return ``x`` on the grid :func:`static_grid`, clamped to it, in ``x``'s dtype."""
    return static_grid(torch.as_tensor(absmax, dtype=x.dtype, device=x.device), bits).snap(x)
