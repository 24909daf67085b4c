"""One launch per step on a GPU, where tensors allow it; the foreach rules are the reference and the fallback.

The Triton kernels are in :mod:`methodbench_optim.fused_kernels`, which is imported when a step can use them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methodbench.torchkit.kernels import runs_triton

#: Bytes that a kernel's widest loads are multiples of.
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a step lie, as device tables.

    Attributes:
        pointers: int64 [lists, tensors].
        chunks: owner, start and size tables; see :func:`methodbench_optim.fused_kernels.lion`.
    """

    pointers: Tensor
    chunks: tuple[Tensor, Tensor, Tensor]


def layout_of(*lists: Sequence[Tensor]) -> Layout | None:
    """Return where the tensors of ``lists`` lie, or None where no fused kernel takes them.

    One takes fp32 tensors on one device that runs Triton, dense in the order of their first list, which starts with
    a multiple of 16 bytes each. Tables of the same addresses are made once. The compiler makes kernels of its own.

    Args:
        lists: parameters, gradients and states; entry ``i`` of each has the same shape.
    """
    device = lists[0][0].device
    if torch.compiler.is_compiling() or not runs_triton(device):
        return None
    for tensors in lists:
        for tensor in tensors:
            if tensor.dtype is not torch.float32 or not tensor.is_contiguous() or tensor.device != device:
                return None
    addresses = tuple(tuple([tensor.data_ptr() for tensor in tensors]) for tensors in lists)
    if any(address % _ALIGNED for row in addresses for address in row):
        return None
    return _layout(addresses, tuple([p.numel() for p in lists[0]]), device)


@functools.lru_cache(maxsize=16)
def _layout(addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> Layout:
    from methodbench_optim.fused_kernels import CHUNK

    counts = torch.tensor([-(-size // CHUNK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.cumsum(counts, 0) - counts
    start = (torch.arange(len(owner)) - first[owner]) * CHUNK
    chunks = (owner.int().to(device), start.to(device), torch.tensor(sizes).to(device))
    return Layout(torch.tensor(addresses, dtype=torch.int64).to(device), chunks)


def lion(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> bool:
    """Take the step of :func:`methodbench_optim.lion.lion_` in one launch; False where it cannot be, and nothing is
    changed."""
    layout = layout_of(params, grads, momenta)
    if layout is None:
        return False
    from methodbench_optim import fused_kernels

    fused_kernels.lion(
        layout.pointers, layout.chunks, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay
    )
    return True


def diffgrad(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    previous: Sequence[Tensor],
    steps: Sequence[Any],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    eps_after_correction: bool,
    weight_decay: float,
) -> bool:
    """Take the step of :func:`methodbench_optim.diffgrad.diffgrad_` in one launch, the L2 term and the replacement of
    ``previous`` included; False where it cannot be, and nothing is changed.

    Parameters whose numbers of steps differ, or lie on the device, are left to the foreach rule.
    """
    if torch.compiler.is_compiling() or isinstance(steps[0], Tensor) or len(set(steps)) != 1:
        return False
    layout = layout_of(params, grads, exp_avgs, exp_avg_sqs, previous)
    if layout is None:
        return False
    from methodbench_optim import fused_kernels

    root = (1 - beta2 ** steps[0]) ** 0.5
    fused_kernels.diffgrad(
        layout.pointers,
        layout.chunks,
        length=-lr * root / (1 - beta1 ** steps[0]),
        beta1=beta1,
        beta2=beta2,
        eps=eps * root if eps_after_correction else eps,
        weight_decay=weight_decay,
    )
    return True
