"""Kernels for one token at a time, where the weights that are read decide the time.

Importing this package loads neither Triton nor a kernel; the modules in it do, and are imported by what uses them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of ``device``: on CUDA, or anywhere in Triton's interpreter."""
    return has_triton() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def graph_of(step: Any, warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """Record ``step()``, a function of CUDA tensors that stay where they are, and return the graph.

    Args:
        step: called ``warm_up`` times unrecorded first, so that kernels are compiled and workspaces exist.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def rows_of(x: Tensor) -> int:
    """Return how many rows ``x`` [..., features] has."""
    return x.shape[:-1].numel()
