"""Repeatable computation: the global generator seeded, one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Seed torch's global generator and compute on one thread; both are as before afterwards.

    One thread makes sums independent of the machine's number of cores, so that the weights are the same on
    all of them with the same processor.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
