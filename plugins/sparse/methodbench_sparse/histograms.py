"""Quantiles from histograms, as the methods with calibrated thresholds take them."""

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
