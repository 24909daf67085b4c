"""A Triton kernel for one row with many zeros times a weight, which reads the weight of nonzero inputs only.

The weight lies transposed, [in, out], so that what one input meets is contiguous. A program takes some outputs and a
share of the inputs; the loads for inputs whose score does not exceed the threshold are switched off and move no
bytes. Shares are small, so that all loads of a program are on their way at once. Sums are in fp32 and in a fixed
order: the program that is the last to finish for its outputs adds the shares::

    y_o = sum over j with |x_j s_j| > t of x_j W_oj
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from methodbench.torchkit.kernels import rows_of


@triton.jit
def _load_input(x_ptr, scale_ptr, threshold_ptr, row, end, SCALED: tl.constexpr, BY_CHANNEL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return inputs [INPUTS] in fp32, zero where their score does not exceed the threshold."""
    x = tl.load(x_ptr + row, mask=row < end, other=0.0).to(tl.float32)
    score = x
    if SCALED:
        scale = tl.load(scale_ptr + row, mask=row < end, other=0.0)
        # Rounded as the product in this precision is.
        score = (x * scale.to(tl.float32)).to(scale.dtype).to(tl.float32)
    if BY_CHANNEL:
        threshold = tl.load(threshold_ptr + row, mask=row < end, other=0.0).to(tl.float32)
    else:
        threshold = tl.load(threshold_ptr).to(tl.float32)
    return tl.where(tl.abs(score) > threshold, x, 0.0)


@triton.jit
def _load_active(weight_ptr, x, row, column, valid, outputs):  # type: ignore[no-untyped-def]
    """Return the weights [INPUTS, OUTPUTS] of the inputs that are not zero, 0 for the others."""
    where = row.to(tl.int64)[:, None] * outputs + column[None, :]
    active = (x != 0)[:, None] & valid[None, :]
    return tl.load(weight_ptr + where, mask=active, other=0.0, eviction_policy="evict_first")


@triton.jit
def _sparse_gemv(  # type: ignore[no-untyped-def]
    x_ptr,
    scale_ptr,
    threshold_ptr,
    weight_ptr,
    bias_ptr,
    parts_ptr,
    done_ptr,
    out_ptr,
    inputs,
    outputs,
    share,
    SCALED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BIASED: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    block = tl.program_id(0)
    part = tl.program_id(1)
    column = block * OUTPUTS + tl.arange(0, OUTPUTS)
    valid = column < outputs
    begin = part * share
    end = tl.minimum(begin + share, inputs)
    row = begin + tl.arange(0, INPUTS)
    # Weights are loaded one step ahead of their use, and the inputs that decide which of them two steps ahead.
    x = _load_input(x_ptr, scale_ptr, threshold_ptr, row, end, SCALED, BY_CHANNEL)
    x_next = _load_input(x_ptr, scale_ptr, threshold_ptr, row + INPUTS, end, SCALED, BY_CHANNEL)
    weight = _load_active(weight_ptr, x, row, column, valid, outputs)
    sums = tl.zeros((INPUTS, OUTPUTS), dtype=tl.float32)
    for start in range(begin, end, INPUTS):
        row = start + INPUTS + tl.arange(0, INPUTS)
        x_later = _load_input(x_ptr, scale_ptr, threshold_ptr, row + INPUTS, end, SCALED, BY_CHANNEL)
        weight_next = _load_active(weight_ptr, x_next, row, column, valid, outputs)
        sums += weight.to(tl.float32) * x[:, None]
        x, x_next, weight = x_next, x_later, weight_next
    total = tl.sum(sums, axis=0)
    if PARTS == 1:
        if BIASED:
            total += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
        tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=valid)
    else:
        tl.store(parts_ptr + part * outputs + column, total, mask=valid)
        # The barrier and the release make every store of this program visible before it counts as done.
        tl.debug_barrier()
        if tl.atomic_add(done_ptr + block, 1, sem="acq_rel") == PARTS - 1:
            where = tl.arange(0, PARTS)[:, None] * outputs + column[None, :]
            # Past the first-level cache, which does not see what other multiprocessors wrote.
            parts = tl.load(parts_ptr + where, mask=valid[None, :], other=0.0, cache_modifier=".cg")
            total = tl.sum(parts, axis=0)
            if BIASED:
                total += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
            tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=valid)
            tl.store(done_ptr + block, 0)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a launch cuts the product: inputs per step, outputs per program, shares of the inputs, warps.

    All but ``warps`` are powers of two, and so is that.
    """

    inputs: int
    outputs: int
    parts: int
    warps: int


#: Shapes worth trying: few steps per program, and enough programs to fill a GPU.
SHAPES = (
    Shape(16, 64, 32, 2),
    Shape(16, 128, 32, 2),
    Shape(32, 64, 16, 2),
    Shape(32, 64, 16, 4),
    Shape(32, 128, 4, 4),
    Shape(32, 256, 4, 8),
    Shape(64, 64, 8, 2),
    Shape(64, 64, 8, 4),
    Shape(64, 128, 2, 4),
    Shape(64, 128, 4, 4),
    Shape(64, 128, 8, 4),
    Shape(64, 256, 4, 8),
    Shape(128, 64, 4, 4),
    Shape(128, 128, 4, 8),
)


class SparseGEMV:
    """``x' @ W.T + bias`` for single rows; ``x'`` is ``x`` with zeros where ``|x scale|`` does not exceed a threshold.

    The mask is that of the same comparison in torch, with its promotion of dtypes. One product at a time: calls on
    several streams would count each other's programs.

    Args:
        transposed: the weight [in, out], contiguous, floating; kept, not copied.
        shape: how to cut the product.
        bias: [out].
        threshold: a scalar, or [in]; 0 where nothing is given, so that inputs that are zero are spared.
        scale: [in]; ones where nothing is given.

    Raises:
        ValueError: the weight is not contiguous.
    """

    def __init__(
        self,
        transposed: Tensor,
        shape: Shape,
        bias: Tensor | None = None,
        *,
        threshold: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        if not transposed.is_contiguous():
            raise ValueError("the transposed weight [in, out] must be contiguous")
        self.transposed = transposed
        self.shape = shape
        self.bias = bias
        dtype, device = transposed.dtype, transposed.device
        self.scale = None
        if scale is not None:
            dtype = torch.promote_types(dtype, scale.dtype)
            self.scale = scale.to(dtype).contiguous()
        limit = torch.zeros((), device=device) if threshold is None else threshold
        # A scalar is compared in the precision of the scores.
        self.threshold = limit.contiguous() if limit.dim() else limit.to(device, dtype)
        blocks = triton.cdiv(transposed.shape[1], shape.outputs)
        self._done = torch.zeros(blocks, dtype=torch.int32, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [..., out] in the dtype of ``x``, which is that of the weight.

        Args:
            x: floating [..., in] with a single row.

        Raises:
            ValueError: more rows than one.
        """
        if rows_of(x) != 1:
            raise ValueError(f"the kernel takes one row at a time, and x has {rows_of(x)}")
        inputs, outputs = self.transposed.shape
        shape = self.shape
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
        parts = out if shape.parts == 1 else torch.empty(shape.parts, outputs, device=x.device)
        _sparse_gemv[(len(self._done), shape.parts)](
            x.reshape(-1),
            self.threshold if self.scale is None else self.scale,
            self.threshold,
            self.transposed,
            self.transposed if self.bias is None else self.bias,
            parts,
            self._done,
            out,
            inputs,
            outputs,
            triton.cdiv(inputs, shape.parts),
            SCALED=self.scale is not None,
            BY_CHANNEL=self.threshold.dim() > 0,
            BIASED=self.bias is not None,
            INPUTS=shape.inputs,
            OUTPUTS=shape.outputs,
            PARTS=shape.parts,
            num_warps=shape.warps,
        )
        return out
