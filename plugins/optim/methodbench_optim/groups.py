"""What the optimizers written here share: the tensors of a parameter group that a step touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Bytes of parameters that a CPU handles together: with gradients and state they stay in a core's cache from
#: one elementwise operation to the next, which halves the time of a step over tensors that do not all fit in.
CPU_CHUNK = 512 * 1024


def with_gradients(group: Mapping[str, Any], owner: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the parameters of ``group`` that have a gradient, and these, in lists to handle together.

    On a CPU a list holds at most :data:`CPU_CHUNK` bytes of parameters, or a single larger one; elsewhere one
    list holds all of them, which takes the fewest kernels.

    Args:
        group: a parameter group of :class:`torch.optim.Optimizer`.
        owner: the optimizer's name, for the error.

    Raises:
        RuntimeError: a gradient is sparse or complex; elementwise rules follow dense real ones.
    """
    params: list[Tensor] = []
    grads: list[Tensor] = []
    held = 0
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        if grad.layout != torch.strided or grad.is_complex():
            kind = "complex" if grad.is_complex() else "sparse"
            raise RuntimeError(
                f"{owner} follows dense real gradients, and one of shape {tuple(grad.shape)} is {kind}"
            )
        size = p.numel() * p.element_size() if p.device.type == "cpu" else 0
        if params and held + size > CPU_CHUNK:
            yield params, grads
            params, grads, held = [], [], 0
        params.append(p)
        grads.append(grad)
        held += size
    if params:
        yield params, grads
