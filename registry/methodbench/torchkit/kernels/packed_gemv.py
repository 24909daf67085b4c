"""A Triton kernel for one row times a weight of packed integers, read as :class:`PackedLinear` stores them.

Codes lie plane by plane: with ``P`` planes, one byte (three at 3 bits) holds the codes of the rows ``r``,
``r + rows / P``, ``r + 2 rows / P`` ... in one column. A program takes a few of those byte rows, walks along the
columns and keeps one sum for every plane, so that a weight is read once and decoded in registers. With codes ``q``,
zero points ``z``, scales ``s`` and groups ``g``::

    y_r = sum_g s_rg ( sum_(c in g) q_rc x_c  -  z_rg sum_(c in g) x_c )

Sums are in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from methodbench.torchkit.kernels import rows_of

if TYPE_CHECKING:
    from methodbench.torchkit.packed import PackedLinear

#: Widths that the kernel decodes.
WIDTHS = (2, 3, 4, 8)
#: Columns that share a scale inside the kernel, at most and at the least.
_WIDEST, _NARROWEST = 128, 16


@triton.jit
def _field(first, second, third, plane: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of one plane, int32, from the bytes that hold them (see ``packed.pack``)."""
    if BITS == 3:
        if plane < 2:
            code = (first >> (3 * plane)) & 7
        elif plane < 4:
            code = (second >> (3 * (plane - 2))) & 7
        elif plane < 6:
            code = (third >> (3 * (plane - 4))) & 7
        elif plane == 6:
            code = (first >> 6) | ((third >> 4) & 4)
        else:
            code = (second >> 6) | ((third >> 5) & 4)
    elif BITS == 8:
        code = first
    else:
        code = (first >> (BITS * plane)) & ((1 << BITS) - 1)
    return code


@triton.jit
def _shifted(first, second, third, plane: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of one plane as fp32, times 2 to the power of the bit that their field starts at.

    Or-ed into the mantissa of 2^23 a field becomes a float by one subtraction, which takes half the time of a
    conversion; a field that is left where it lies in its byte saves the shift.
    """
    if BITS == 3:
        if plane < 2:
            field = first & (7 << (3 * plane))
        elif plane < 4:
            field = second & (7 << (3 * (plane - 2)))
        elif plane < 6:
            field = third & (7 << (3 * (plane - 4)))
        else:
            field = _field(first, second, third, plane, BITS)
    elif BITS == 8:
        field = first
    else:
        field = first & (((1 << BITS) - 1) << (BITS * plane))
    return (field | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _load_field(ptr, where, kept, stride, plane: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of one plane, int32, whose bytes lie at ``where`` (and one and two ``stride`` further)."""
    if BITS == 3:
        first = tl.load(ptr + where, mask=kept, other=0).to(tl.int32)
        second = tl.load(ptr + stride + where, mask=kept, other=0).to(tl.int32)
        third = tl.load(ptr + 2 * stride + where, mask=kept, other=0).to(tl.int32)
        return _field(first, second, third, plane, BITS)
    else:
        first = tl.load(ptr + where, mask=kept, other=0).to(tl.int32)
        return _field(first, first, first, plane, BITS)


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    first,
    second,
    third,
    x,
    x_sum,
    scale_ptr,
    zero_ptr,
    of_group,
    kept,
    grids,
    low,
    plane: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Return what the loaded columns add to the rows of one plane, fp32 [ROWS, TILES]."""
    part = tl.sum(_shifted(first, second, third, plane, BITS) * x[None, :, :], axis=2)
    if BITS == 3:
        if plane < 6 and plane % 2 == 1:
            part *= 0.125
    elif plane > 0:
        part *= 1.0 / (1 << (BITS * plane))
    if ZERO == "packed":
        offset = _load_field(zero_ptr, of_group, kept, grids, plane, BITS).to(tl.float32)
    elif ZERO == "int16":
        offset = tl.load(zero_ptr + plane * grids + of_group, mask=kept, other=0).to(tl.float32)
    else:
        offset = -low.to(tl.float32)
    part -= offset * x_sum[None, :]
    return part * tl.load(scale_ptr + plane * grids + of_group, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def _store(sums, out_ptr, bias_ptr, row, valid, plane_rows, plane: tl.constexpr, BIASED: tl.constexpr):  # type: ignore[no-untyped-def]
    place = plane * plane_rows + row
    total = tl.sum(sums, axis=1)
    if BIASED:
        total += tl.load(bias_ptr + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _load_codes(codes_ptr, row, at, within, valid, tiles, columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    column = at[:, None] * TILE + within[None, :]
    where = row.to(tl.int64)[:, None, None] * columns + column[None, :, :]
    loaded = valid[:, None, None] & (at < tiles)[None, :, None]
    return tl.load(codes_ptr + where, mask=loaded, other=0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["plane_rows", "low"])
def _packed_gemv(  # type: ignore[no-untyped-def]
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    perm_ptr,
    bias_ptr,
    out_ptr,
    plane_rows,
    columns,
    groups,
    tiles_per_group,
    low,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    TILE: tl.constexpr,
    ZERO: tl.constexpr,
    PERMUTED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < plane_rows
    within = tl.arange(0, TILE)
    plane_bytes = plane_rows.to(tl.int64) * columns
    grids = plane_rows * groups
    tiles = columns // TILE

    # Triton keeps no list of sums through a loop.
    sums0 = tl.zeros((ROWS, TILES), dtype=tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    sums4, sums5, sums6, sums7 = sums0, sums0, sums0, sums0
    ahead = tl.arange(0, TILES)
    if AHEAD:
        next_first = _load_codes(codes_ptr, row, ahead, within, valid, tiles, columns, TILE)
        next_second, next_third = next_first, next_first
        if BITS == 3:
            next_second = _load_codes(
                codes_ptr + plane_bytes, row, ahead, within, valid, tiles, columns, TILE
            )
            next_third = _load_codes(
                codes_ptr + 2 * plane_bytes, row, ahead, within, valid, tiles, columns, TILE
            )
    for start in range(0, tiles, TILES):
        at = start + tl.arange(0, TILES)
        there = at < tiles
        column = at[:, None] * TILE + within[None, :]
        if PERMUTED:
            source = tl.load(perm_ptr + column, mask=there[:, None], other=0).to(tl.int32)
        else:
            source = column
        x = tl.load(x_ptr + source, mask=there[:, None], other=0.0).to(tl.float32)
        x_sum = tl.sum(x, axis=1)
        if AHEAD:
            first, second, third = next_first.to(tl.int32), next_second.to(tl.int32), next_third.to(tl.int32)
            ahead = at + TILES
            next_first = _load_codes(codes_ptr, row, ahead, within, valid, tiles, columns, TILE)
            next_second, next_third = next_first, next_first
            if BITS == 3:
                next_second = _load_codes(
                    codes_ptr + plane_bytes, row, ahead, within, valid, tiles, columns, TILE
                )
                next_third = _load_codes(
                    codes_ptr + 2 * plane_bytes, row, ahead, within, valid, tiles, columns, TILE
                )
        else:
            first = _load_codes(codes_ptr, row, at, within, valid, tiles, columns, TILE).to(tl.int32)
            second, third = first, first
            if BITS == 3:
                second = _load_codes(
                    codes_ptr + plane_bytes, row, at, within, valid, tiles, columns, TILE
                ).to(tl.int32)
                third = _load_codes(
                    codes_ptr + 2 * plane_bytes, row, at, within, valid, tiles, columns, TILE
                ).to(tl.int32)
        of_group = row[:, None] * groups + (at // tiles_per_group)[None, :]
        kept = valid[:, None] & there[None, :]
        sums0 += _part(
            first, second, third, x, x_sum, scale_ptr, zero_ptr, of_group, kept, grids, low, 0, BITS, ZERO
        )
        if PLANES > 1:
            sums1 += _part(
                first, second, third, x, x_sum, scale_ptr, zero_ptr, of_group, kept, grids, low, 1, BITS, ZERO
            )
        if PLANES > 2:
            sums2 += _part(
                first, second, third, x, x_sum, scale_ptr, zero_ptr, of_group, kept, grids, low, 2, BITS, ZERO
            )
            sums3 += _part(
                first, second, third, x, x_sum, scale_ptr, zero_ptr, of_group, kept, grids, low, 3, BITS, ZERO
            )
        if PLANES > 4:
            sums4 += _part(
                first, second, third, x, x_sum, scale_ptr, zero_ptr, of_group, kept, grids, low, 4, BITS, ZERO
            )
            sums5 += _part(
                first, second, third, x, x_sum, scale_ptr, zero_ptr, of_group, kept, grids, low, 5, BITS, ZERO
            )
            sums6 += _part(
                first, second, third, x, x_sum, scale_ptr, zero_ptr, of_group, kept, grids, low, 6, BITS, ZERO
            )
            sums7 += _part(
                first, second, third, x, x_sum, scale_ptr, zero_ptr, of_group, kept, grids, low, 7, BITS, ZERO
            )
    _store(sums0, out_ptr, bias_ptr, row, valid, plane_rows, 0, BIASED)
    if PLANES > 1:
        _store(sums1, out_ptr, bias_ptr, row, valid, plane_rows, 1, BIASED)
    if PLANES > 2:
        _store(sums2, out_ptr, bias_ptr, row, valid, plane_rows, 2, BIASED)
        _store(sums3, out_ptr, bias_ptr, row, valid, plane_rows, 3, BIASED)
    if PLANES > 4:
        _store(sums4, out_ptr, bias_ptr, row, valid, plane_rows, 4, BIASED)
        _store(sums5, out_ptr, bias_ptr, row, valid, plane_rows, 5, BIASED)
        _store(sums6, out_ptr, bias_ptr, row, valid, plane_rows, 6, BIASED)
        _store(sums7, out_ptr, bias_ptr, row, valid, plane_rows, 7, BIASED)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a launch cuts the weight: byte rows per program, column tiles per step, warps, and whether the codes of a
    step are loaded during the one before."""

    rows: int
    tiles: int
    warps: int
    ahead: bool = False


#: Shapes worth trying, by the columns that a step takes: short rows leave wide steps idle.
SHAPES = (
    Shape(1, 8, 2, True),
    Shape(1, 16, 4),
    Shape(2, 8, 4),
    Shape(2, 8, 4, True),
    Shape(2, 16, 4),
    Shape(2, 16, 8),
    Shape(4, 8, 4),
    Shape(4, 8, 8),
    Shape(4, 8, 8, True),
    Shape(4, 16, 8),
)


def fits(layer: PackedLinear) -> bool:
    """Whether the kernel reads the format of ``layer``: a width of :data:`WIDTHS`, groups along the inputs that are
    multiples of 16 columns, rows that fill the planes."""
    planes = _planes(layer.bits)
    return (
        layer.bits in WIDTHS
        and not layer.transposed
        and layer.scale.shape[0] == layer.out_features
        and layer.out_features % planes == 0
        and layer.group_size % _NARROWEST == 0
    )


def packed_gemv(layer: PackedLinear, x: Tensor, shape: Shape) -> Tensor:
    """Return ``x @ W.T + bias`` [..., out] in the dtype of ``x``.

    Args:
        layer: for which :func:`fits` holds, on the device of ``x``.
        x: floating [..., in] with a single row.

    Raises:
        ValueError: more rows than one.
    """
    if rows_of(x) != 1:
        raise ValueError(f"the kernel takes one row at a time, and x has {rows_of(x)}")
    flat = x.reshape(-1).contiguous()
    out = torch.empty(*x.shape[:-1], layer.out_features, dtype=x.dtype, device=x.device)
    planes = _planes(layer.bits)
    plane_rows = layer.out_features // planes
    tile = min(_WIDEST, layer.group_size & -layer.group_size)
    # The format of an argument that is not read does not matter.
    none: Any = layer.codes
    _packed_gemv[(triton.cdiv(plane_rows, shape.rows),)](
        flat,
        layer.codes,
        layer.scale,
        none if layer.zero is None else layer.zero,
        none if layer.perm is None else layer.perm,
        none if layer.bias is None else layer.bias,
        out,
        plane_rows,
        layer.in_features,
        layer.scale.shape[1],
        layer.group_size // tile,
        layer.low,
        BITS=layer.bits,
        PLANES=planes,
        TILE=tile,
        ZERO=layer.zero_storage,
        PERMUTED=layer.perm is not None,
        BIASED=layer.bias is not None,
        ROWS=shape.rows,
        TILES=shape.tiles,
        AHEAD=shape.ahead,
        num_warps=shape.warps,
    )
    return out


class PackedGEMV:
    """:func:`packed_gemv` for one layer; see :class:`methodbench.torchkit.kernels.packed.Kernel`."""

    def __init__(self, layer: PackedLinear, shape: Shape) -> None:
        self.layer = layer
        self.shape = shape
        ahead = ", loads ahead" if shape.ahead else ""
        self.name = f"Triton, {shape.rows} x {shape.tiles} tiles, {shape.warps} warps{ahead}"

    def __call__(self, x: Tensor) -> Tensor:
        return packed_gemv(self.layer, x, self.shape)


def _planes(bits: int) -> int:
    return 8 if bits == 3 else 8 // bits
