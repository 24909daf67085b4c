"""PPL-p% sparsity: the share of neurons that a language model can do without at p % more perplexity.

Luo, Song, Han, Chen, Xiao, Liu, Sun, "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity",
ICML 2025, arXiv 2411.02335; authors' code thunlp/SparsingLaw.

What a neuron adds to its network's output is h_i w_i, w_i its column of the down projection. Neurons whose output is
small can be left out, and the cumulated error of leaving them out (CETT) is comparable between layers: every layer
gets the threshold at which it is the same. The largest CETT that costs no more than p % of perplexity is searched::

    CETT(e) = mean_t || sum_{i: |h_ti| ||w_i|| <= e} h_ti w_i || / || W_down h_t ||
    e(c) = the last of ascending candidates with CETT <= c      h_ti <- 0 unless |h_ti| ||w_i|| > e(c)
    c: perplexity(c) / perplexity(0) = 1 + p / 100, by bisection

Thresholds come from dense activations of the first half of the text, perplexities and shares from the second half;
the authors take both from one text. Where even the first candidate errs more than c nothing is left out; the
authors' search then takes the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import (
    SparseInput,
    Threshold,
    feed_forwards,
    mask_inputs,
    observed,
    sites,
)
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss

#: Candidates end at this quantile of the outputs' norms, taken over about so many of them (authors' code).
QUANTILE, QUANTILE_SIZE = 0.99, 65536


@hyperparameters
class SparsingLaw:
    """Measures the sparsity at which perplexity rises by p %; changes nothing."""

    p: Annotated[float, Field(gt=0, description="rise of perplexity that is allowed, in %")] = 1.0
    candidates: Annotated[int, Field(ge=2, description="thresholds that a layer can choose from")] = 65536
    tolerance: Annotated[float, Field(gt=0, lt=1, description="of the bisection, on CETT")] = 1e-3
    tokens: Annotated[int, Field(ge=1, description="tokens that thresholds are taken from")] = 256

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        """Return ``sparsity`` (share of neurons left out, mean over layers), ``cett``, ``ppl-ratio`` and ``by-layer``.

        Raises:
            NotApplicableError: fewer than two sequences of token ids, no logits, or blocks without one
                feed-forward network each.
        """
        if len(data) < 2 or data.inputs.ndim != 2:
            raise NotApplicableError("PPL-p% sparsity needs two sequences of token ids at least")
        first, second = data.inputs[: len(data) // 2], data.inputs[len(data) // 2 :]
        networks = {network.down: network for network in feed_forwards(model)}
        if len(networks) != len(model.adapter.block_names(model.module)):
            raise NotApplicableError(f"{model.name} has more than one feed-forward network a block")
        curves: dict[str, CettCurve] = {}
        for (name,), tensors in observed(model, Calibration(first), networks, "sparsing-law"):
            hidden = torch.cat([x.flatten(0, -2) for x in tensors])[: self.tokens]
            weight = model.module.get_submodule(name).get_parameter("weight")
            curves[name] = CettCurve(hidden, weight, self.candidates)
        dense = next_token_loss(model, second)

        def ratio(cett: float) -> float:
            sparse = at_cett(model, curves, cett)
            return float(np.exp(next_token_loss(sparse, second) - dense))

        cett = bisect(ratio, 1 + self.p / 100, self.tolerance)
        sparse = at_cett(model, curves, cett)
        found = float(np.exp(next_token_loss(sparse, second) - dense))
        shares = np.array([site.sparsity or 0.0 for site in sites(sparse.module).values()])
        return {"sparsity": float(shares.mean()), "cett": cett, "ppl-ratio": found, "by-layer": shares}


class CettCurve:
    """The error of leaving out small neurons of one layer, and the threshold at a given error.

    Args:
        hidden: dense inputs of the down projection, [tokens, neurons].
        weight: of the down projection, [out, neurons].
        candidates: thresholds to choose from, evenly from the smallest norm of an output to a high quantile.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, candidates: int) -> None:
        self.hidden, self.weight = hidden.float(), weight.detach().float()
        self.norms = output_norms(weight).float()
        self.outputs = self.hidden.abs() * self.norms
        self.whole = torch.linalg.vector_norm(self.hidden @ self.weight.T, dim=-1)
        flat = self.outputs.flatten()
        high = torch.quantile(flat[:: max(1, flat.numel() // QUANTILE_SIZE)], QUANTILE)
        self.grid = torch.linspace(float(flat.min()), float(high), candidates)

    def cett(self, threshold: float) -> float:
        """Return the error of leaving out the neurons whose output is no larger than ``threshold``."""
        left_out = self.hidden.masked_fill(self.outputs > threshold, 0) @ self.weight.T
        return float((torch.linalg.vector_norm(left_out, dim=-1) / self.whole).mean())

    def threshold(self, cett: float) -> float:
        """Return the last candidate before the first whose error exceeds ``cett``; -1 where there is none."""
        left, right = 0, len(self.grid) - 1
        while left < right:
            middle = (left + right) // 2
            if self.cett(float(self.grid[middle])) > cett:
                right = middle
            else:
                left = middle + 1
        return float(self.grid[left - 1]) if left else -1.0


def output_norms(weight: Tensor) -> Tensor:
    """Return ``||w_i||`` [neurons], the norms of the columns of a down projection [out, neurons]."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=0)
    return norms


def at_cett(model: LoadedModel, curves: Mapping[str, CettCurve], cett: float) -> LoadedModel:
    """Return a clone of ``model`` whose down projections leave out the neurons that a CETT allows."""
    sparse = model.clone()
    rules = {
        name: Threshold(
            curve.threshold(cett), output_norms(model.module.get_submodule(name).get_parameter("weight"))
        )
        for name, curve in curves.items()
    }
    mask_inputs(sparse, rules, "all")
    assert all(isinstance(sparse.module.get_submodule(name), SparseInput) for name in rules)
    return sparse


def bisect(ratio: Callable[[float], float], target: float, tolerance: float) -> float:
    """Return the CETT in [0, 1] at which ``ratio`` passes ``target``, to ``tolerance``."""
    low, high = 0.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        if ratio(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
