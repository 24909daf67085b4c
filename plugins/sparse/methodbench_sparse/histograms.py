"""Quantiles of values and of histograms, as the methods with calibrated thresholds take them."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cdf(values: Tensor, counts: Tensor, share: float) -> float:
    """Return the value below which ``share`` of a histogram lies, linear between neighbouring bins.

    Args:
        values: ascending centres of the bins [bins].
        counts: what fell into them [bins].

    The first centre where the share lies in the first bin, the last one beyond the last.
    """
    cumulative = counts.double().cumsum(0)
    target = share * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target))
    if index == 0:
        return float(values[0])
    if index == len(values):
        return float(values[-1])
    fraction = (target - cumulative[index - 1]) / (cumulative[index] - cumulative[index - 1])
    return float(values[index - 1] + fraction * (values[index] - values[index - 1]))


def smallest(values: Tensor, *ranks: int) -> tuple[Tensor, ...]:
    """Return the ``rank``-th smallest of ``values`` [n] for every rank, counted from 1."""
    if values.is_cuda:
        # A selection there is the work of one multiprocessor, and takes longer than sorting with all of them.
        ordered = values.sort().values
        return tuple(ordered[rank - 1] for rank in ranks)
    return tuple(values.kthvalue(rank).values for rank in ranks)
