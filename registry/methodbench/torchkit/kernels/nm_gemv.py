"""A Triton kernel for one row times a weight pruned 2:4, which reads the stored values and their places only.

Two values of every four inputs are stored, and two bits for the place of each: 9 bits for a weight at 16 bits. A byte
of places serves four outputs, a quarter of the weight apart (planes), and a program takes some of these fours with all
of their values. Which of its four inputs a value meets is a selection among registers, since all lanes of a step look
at the same inputs. Sums are in fp32 and in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from methodbench.torchkit.compressed import NMLinear
from methodbench.torchkit.kernels import rows_of, runs_triton

_PLANES = 4


@triton.jit
def _plane(values_ptr, byte, first, second, third, fourth, where, kept, stride, plane: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the products [ROWS, COLUMNS] of one plane."""
    value = tl.load(values_ptr + where + plane * stride, mask=kept, other=0.0, eviction_policy="evict_first")
    place = (byte >> (2 * plane)) & 3
    low = tl.where(place == 0, first[None, :], second[None, :])
    high = tl.where(place == 2, third[None, :], fourth[None, :])
    return value.to(tl.float32) * tl.where(place < 2, low, high)


@triton.jit
def _store(sums, out_ptr, bias_ptr, row, valid, rows, plane: tl.constexpr, BIASED: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.sum(sums, axis=1)
    at = row + plane * rows
    if BIASED:
        total += tl.load(bias_ptr + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _nm_gemv(  # type: ignore[no-untyped-def]
    x_ptr,
    values_ptr,
    places_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    stride,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    a = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    b = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    c = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    d = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        group = (column >> 1) * 4
        first = tl.load(x_ptr + group, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + group + 1, mask=inside, other=0.0).to(tl.float32)
        third = tl.load(x_ptr + group + 2, mask=inside, other=0.0).to(tl.float32)
        fourth = tl.load(x_ptr + group + 3, mask=inside, other=0.0).to(tl.float32)
        where = row.to(tl.int64)[:, None] * columns + column[None, :]
        kept = valid[:, None] & inside[None, :]
        byte = tl.load(places_ptr + where, mask=kept, other=0).to(tl.int32)
        a += _plane(values_ptr, byte, first, second, third, fourth, where, kept, stride, 0)
        b += _plane(values_ptr, byte, first, second, third, fourth, where, kept, stride, 1)
        c += _plane(values_ptr, byte, first, second, third, fourth, where, kept, stride, 2)
        d += _plane(values_ptr, byte, first, second, third, fourth, where, kept, stride, 3)
    _store(a, out_ptr, bias_ptr, row, valid, rows, 0, BIASED)
    _store(b, out_ptr, bias_ptr, row, valid, rows, 1, BIASED)
    _store(c, out_ptr, bias_ptr, row, valid, rows, 2, BIASED)
    _store(d, out_ptr, bias_ptr, row, valid, rows, 3, BIASED)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a launch cuts the product: fours of outputs per program, values per step, warps; all powers of two."""

    rows: int
    columns: int
    warps: int


#: Shapes worth trying: enough programs to fill a GPU, and loads of 16 bytes in every lane.
SHAPES = (
    Shape(1, 256, 1),
    Shape(1, 512, 2),
    Shape(1, 1024, 4),
    Shape(1, 2048, 8),
    Shape(2, 256, 2),
    Shape(2, 512, 4),
    Shape(2, 1024, 8),
    Shape(4, 256, 4),
    Shape(4, 128, 2),
)


def fits(layer: NMLinear) -> bool:
    """Whether the kernel takes the format of ``layer`` where it lies."""
    return (
        (layer.zeros, layer.group) == (2, 4)
        and layer.out_features % _PLANES == 0
        and runs_triton(layer.values.device)
    )


class NMGEMV:
    """``x @ W.T + bias`` for single rows of the layer's dtype.

    Raises:
        ValueError: the layer is not 2:4, or has outputs that four does not divide.
    """

    def __init__(self, layer: NMLinear, shape: Shape) -> None:
        if not fits(layer):
            raise ValueError(f"the kernel takes 2:4 weights whose outputs four divides, not {layer.config}")
        self.layer = layer
        self.shape = shape
        self.name = f"triton 2:4 {shape.rows}x{shape.columns}, {shape.warps} warps"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [..., out] for ``x`` [..., in] with a single row.

        Raises:
            ValueError: more rows than one.
        """
        if rows_of(x) != 1:
            raise ValueError(f"the kernel takes one row at a time, and x has {rows_of(x)}")
        layer, shape = self.layer, self.shape
        rows = layer.out_features // _PLANES
        out = torch.empty(*x.shape[:-1], layer.out_features, dtype=x.dtype, device=x.device)
        _nm_gemv[(triton.cdiv(rows, shape.rows),)](
            x.reshape(-1),
            layer.values,
            layer.places,
            layer.values if layer.bias is None else layer.bias,
            out,
            rows,
            layer.in_features // 2,
            rows * layer.in_features // 2,
            BIASED=layer.bias is not None,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            num_warps=shape.warps,
        )
        return out
