"""Triton kernels that take one step of a rule over many tensors in one launch.

A launch has one program per chunk of :data:`CHUNK` elements. Tables in device memory say which tensor a chunk belongs
to, where it starts, and where that tensor, its gradient and its state lie, so that the count of tensors costs nothing.
Every tensor is read once and written once where it changes. Arithmetic follows torch's foreach kernels operation by
operation, in fp32: a sign that comes out differently would move a parameter by twice the learning rate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Elements per program.
CHUNK = 2048
_WARPS = 8


@triton.jit
def _locate(owner_ptr, start_ptr, size_ptr):  # type: ignore[no-untyped-def]
    """Return the tensor of this program's chunk, where the chunk starts, and the tensor's elements."""
    chunk = tl.program_id(0)
    owner = tl.load(owner_ptr + chunk)
    return owner, tl.load(start_ptr + chunk), tl.load(size_ptr + owner)


@triton.jit
def _tensor(pointers_ptr, index):  # type: ignore[no-untyped-def]
    """Return entry ``index`` of a table of pointers to fp32, all multiples of 16 bytes."""
    return tl.multiple_of(tl.load(pointers_ptr + index), 16).to(tl.pointer_type(tl.float32))


@triton.jit
def _lerp(start, end, weight):  # type: ignore[no-untyped-def]
    """torch's ``lerp``, which takes the form that is exact at the nearer end."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def _lion_chunk(p_ptr, g_ptr, m_ptr, at, mask, lr, keep, share1, share2, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    if MASKED:
        p = tl.load(p_ptr + at, mask=mask)
        g = tl.load(g_ptr + at, mask=mask)
        m = tl.load(m_ptr + at, mask=mask)
    else:
        p = tl.load(p_ptr + at)
        g = tl.load(g_ptr + at)
        m = tl.load(m_ptr + at)
    mixed = _lerp(m, g, share1)
    sign = (mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32)
    p = p * keep - lr * sign
    m = _lerp(m, g, share2)
    if MASKED:
        tl.store(p_ptr + at, p, mask=mask)
        tl.store(m_ptr + at, m, mask=mask)
    else:
        tl.store(p_ptr + at, p)
        tl.store(m_ptr + at, m)


@triton.jit
def _lion(  # type: ignore[no-untyped-def]
    pointers_ptr,
    owner_ptr,
    start_ptr,
    size_ptr,
    tensors,
    lr,
    keep,
    share1,
    share2,
    CHUNK: tl.constexpr,
):
    owner, start, size = _locate(owner_ptr, start_ptr, size_ptr)
    p_ptr = _tensor(pointers_ptr, owner)
    g_ptr = _tensor(pointers_ptr, tensors + owner)
    m_ptr = _tensor(pointers_ptr, 2 * tensors + owner)
    at = tl.multiple_of(start, CHUNK) + tl.arange(0, CHUNK)
    if start + CHUNK <= size:
        _lion_chunk(p_ptr, g_ptr, m_ptr, at, at < size, lr, keep, share1, share2, False)
    else:
        _lion_chunk(p_ptr, g_ptr, m_ptr, at, at < size, lr, keep, share1, share2, True)


@triton.jit
def _diffgrad_chunk(  # type: ignore[no-untyped-def]
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    old_ptr,
    at,
    mask,
    length,
    decay,
    share1,
    beta2,
    share2,
    eps,
    MASKED: tl.constexpr,
):
    if MASKED:
        p = tl.load(p_ptr + at, mask=mask)
        g = tl.load(g_ptr + at, mask=mask)
        m = tl.load(m_ptr + at, mask=mask)
        v = tl.load(v_ptr + at, mask=mask)
        old = tl.load(old_ptr + at, mask=mask)
    else:
        p = tl.load(p_ptr + at)
        g = tl.load(g_ptr + at)
        m = tl.load(m_ptr + at)
        v = tl.load(v_ptr + at)
        old = tl.load(old_ptr + at)
    g += decay * p
    m = _lerp(m, g, share1)
    v = v * beta2 + share2 * (g * g)
    friction = 1.0 / (1.0 + tl.exp(-tl.abs(old - g)))
    p += length * (friction * m / (tl.sqrt_rn(v) + eps))
    if MASKED:
        tl.store(p_ptr + at, p, mask=mask)
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
        tl.store(old_ptr + at, g, mask=mask)
    else:
        tl.store(p_ptr + at, p)
        tl.store(m_ptr + at, m)
        tl.store(v_ptr + at, v)
        tl.store(old_ptr + at, g)


@triton.jit
def _diffgrad(  # type: ignore[no-untyped-def]
    pointers_ptr,
    owner_ptr,
    start_ptr,
    size_ptr,
    tensors,
    length,
    decay,
    share1,
    beta2,
    share2,
    eps,
    CHUNK: tl.constexpr,
):
    owner, start, size = _locate(owner_ptr, start_ptr, size_ptr)
    p_ptr = _tensor(pointers_ptr, owner)
    g_ptr = _tensor(pointers_ptr, tensors + owner)
    m_ptr = _tensor(pointers_ptr, 2 * tensors + owner)
    v_ptr = _tensor(pointers_ptr, 3 * tensors + owner)
    old_ptr = _tensor(pointers_ptr, 4 * tensors + owner)
    at = tl.multiple_of(start, CHUNK) + tl.arange(0, CHUNK)
    mask = at < size
    if start + CHUNK <= size:
        _diffgrad_chunk(
            p_ptr, g_ptr, m_ptr, v_ptr, old_ptr, at, mask, length, decay, share1, beta2, share2, eps, False
        )
    else:
        _diffgrad_chunk(
            p_ptr, g_ptr, m_ptr, v_ptr, old_ptr, at, mask, length, decay, share1, beta2, share2, eps, True
        )


def lion(
    pointers: Tensor,
    chunks: tuple[Tensor, Tensor, Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Launch one step of Lion.

    Args:
        pointers: int64 [3, tensors]: parameters, gradients, momenta.
        chunks: the owner of each chunk, int32; where it starts, int64; the elements of each tensor, int64.
    """
    _lion[(len(chunks[0]),)](
        pointers,
        *chunks,
        pointers.shape[1],
        lr,
        1 - lr * weight_decay,
        1 - beta1,
        1 - beta2,
        CHUNK=CHUNK,
        num_warps=_WARPS,
    )


def diffgrad(
    pointers: Tensor,
    chunks: tuple[Tensor, Tensor, Tensor],
    *,
    length: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Launch one step of diffGrad.

    Args:
        pointers: int64 [5, tensors]: parameters, gradients, first and second moments, previous gradients.
        chunks: see :func:`lion`.
        length: what multiplies the friction times the first moment over the denominator.
        eps: what the root of the second moment is raised by.
    """
    _diffgrad[(len(chunks[0]),)](
        pointers,
        *chunks,
        pointers.shape[1],
        length,
        weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        CHUNK=CHUNK,
        num_warps=_WARPS,
    )
