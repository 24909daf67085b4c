"""Spark: statistical top-k and low-cost predictors for feed-forward networks and attention.

You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention", NeurIPS 2025, arXiv 2506.06644. The
authors' training code is not public; the operator ships in transformers' Gemma 3n.

Feed-forward network and attention are look-ups: keys, a query, the best few entries, values. Sorting for the best k
of d is slow, so a Gaussian is fitted to the d scores and its quantile is the threshold. A part of the query's
dimensions gives the scores, so that the rest of the keys is read for the entries that are kept alone::

    Top_k(x) = max(x - theta, 0)      theta = mean(x) + std(x) Q(1 - k / d),  Q the quantile of the normal distribution
    FFN:        s = K1^T q[:r]        y = V (GELU(Top_k(s)) (K2^T q[r:]))
    attention:  p_j = k_j[:r] q[:r]   y = sum_j softmax(Top_k(p))_j softplus(k_j[r:] q[r:]) v_j

The architecture is trained from scratch (:func:`spark_ffn`, :func:`spark_attention`). On a pretrained gated network
the compressor does what can be done without training: as in Gemma 3n the operator stands between gate projection
and activation function; with a predictor, the first ``predictor`` of the input's channels choose the neurons, which
keep their gates unshifted. Neurons that are not chosen are zero. No time is saved here.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import (
    POSITIONS_HELP,
    Positions,
    Site,
    feed_forwards,
    sequence_shapes,
    site_sparsity,
)
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench_sparse.cats import COUNTED_HELP


@hyperparameters
class Spark:
    """Keeps the gates above a Gaussian quantile, of all or as a part of the input's channels predicts them."""

    sparsity: Annotated[float, Field(ge=0, lt=1, description="share of neurons zeroed; see counted")] = 0.92
    counted: Annotated[Literal["site", "model"], Field(description=COUNTED_HELP)] = "site"
    unbiased: Annotated[
        bool, Field(description="standard deviation of a sample (paper), or of the population (Gemma 3n)")
    ] = True
    shift: Annotated[
        bool,
        Field(
            description="subtract the threshold from what is kept, as the paper does; not with a predictor"
        ),
    ] = True
    predictor: Annotated[
        float,
        Field(
            gt=0, le=1, description="share of the input's channels that choose the neurons; 1 for all of them"
        ),
    ] = 1.0
    positions: Annotated[Positions, Field(description=POSITIONS_HELP)] = "all"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with sparse gates; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: a feed-forward network without a gate and up projection of its own, or a
                model-level sparsity out of reach.
        """
        networks = feed_forwards(model)
        if not all(network.up for network in networks):
            raise NotApplicableError(f"spark needs gated networks, and {model.name} has others")
        sparse = model.clone()
        gates = {}
        spared: dict[str, float] = {}
        for network in networks:
            gate = model.module.get_submodule(network.first)
            width = gate.get_parameter("weight").shape[1]
            channels = max(1, round(self.predictor * width))
            # What predicts the neurons is read in full; a gate without predictor is its own predictor.
            gates[network.first] = channels, {**network.spared, network.first: 1 - channels / width}
            spared |= gates[network.first][1]
        level = self.sparsity
        if self.counted == "model":
            level = site_sparsity(model, spared, self.sparsity)
        shapes = sequence_shapes(sparse, gates)
        for name, (channels, portions) in gates.items():
            site = Site("neurons", self.positions, portions, shapes[name])
            gate = model.module.get_submodule(name)
            set_submodule(
                sparse.module,
                name,
                SparkGate(gate, level, channels, site, unbiased=self.unbiased, shift=self.shift),
            )
        sparse.storage = "simulated"
        sparse.facts |= {"sparsity_target": self.sparsity, "sparsity_level": level}
        return sparse


class SparkGate(nn.Linear):
    """A gate projection that shares another's parameters and zeroes what a statistical top-k does not keep."""

    def __init__(
        self, gate: nn.Module, sparsity: float, channels: int, site: Site, *, unbiased: bool, shift: bool
    ) -> None:
        weight = gate.get_parameter("weight")
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.register_parameter("bias", getattr(gate, "bias", None))
        self.sparsity, self.channels = sparsity, channels
        self.unbiased, self.shift = unbiased, shift
        self.site = site
        self.train(gate.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the gates before the activation function, zero where a neuron is not chosen."""
        gates = super().forward(input)
        grid, dense = self.site.split(gates)
        tail = grid[:, dense:]
        if not tail.numel():
            self.site.count(None, grid.shape[0] * grid.shape[1])
            return gates
        scores, kept = tail, tail
        if self.channels < self.in_features:
            known = self.site.split(input)[0][:, dense:, : self.channels]
            scores = F.linear(known, self.weight[:, : self.channels], self.bias)
        theta = gaussian_threshold(scores, self.sparsity, unbiased=self.unbiased)
        mask = scores > theta
        if self.shift and scores is tail and self.sparsity:
            kept = tail - theta
        self.site.count(mask, grid.shape[0] * grid.shape[1])
        return torch.cat([grid[:, :dense], kept.masked_fill(~mask, 0)], dim=1).view_as(gates)


def gaussian_threshold(
    x: Tensor, sparsity: float, *, unbiased: bool, visible: Tensor | None = None
) -> Tensor:
    """Return ``theta`` [..., 1] for ``x`` [..., d], in its dtype; minus infinity for a sparsity of 0.

    Mean and standard deviation are taken in float32 at least.

    Args:
        visible: boolean, shaped like ``x``: the entries that count (the keys that are not in the future).
    """
    if sparsity == 0:
        return torch.full_like(x[..., :1], -torch.inf)
    values = x if x.dtype == torch.float64 else x.float()
    seen = torch.ones_like(values, dtype=torch.bool) if visible is None else visible
    count = seen.sum(-1, keepdim=True)
    mean = values.masked_fill(~seen, 0).sum(-1, keepdim=True) / count
    squares = (values - mean).masked_fill(~seen, 0).square().sum(-1, keepdim=True)
    std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
    return (mean + std * NormalDist().inv_cdf(sparsity)).to(x.dtype)


def statistical_topk(x: Tensor, sparsity: float, *, unbiased: bool = True) -> Tensor:
    """Return ``max(x - theta, 0)`` for ``x`` [..., d]: about ``d (1 - sparsity)`` positive entries if x is Gaussian.

    A sparsity of 0 keeps everything as it is.
    """
    if sparsity == 0:
        return x
    return (x - gaussian_threshold(x, sparsity, unbiased=unbiased)).relu()


def spark_ffn(
    query: Tensor, first: Tensor, second: Tensor, values: Tensor, keep: int
) -> tuple[Tensor, Tensor]:
    """Return the output [..., width] of a Spark feed-forward network, and its gate [..., d].

    Args:
        query: [..., width].
        first: K1 [r, d], the keys that the first r dimensions of the query meet.
        second: K2 [width - r, d].
        values: V [width, d].
        keep: k, the entries that are kept of d.
    """
    r, entries = first.shape
    scores = statistical_topk(query[..., :r] @ first, 1 - keep / entries)
    gate = F.gelu(scores, approximate="tanh")
    return (gate * (query[..., r:] @ second)) @ values.T, gate


def spark_attention(query: Tensor, key: Tensor, value: Tensor, r: int, keep: int) -> tuple[Tensor, Tensor]:
    """Return the output [tokens, d] of causal Spark attention of one head, and which keys each token kept.

    ``query``, ``key`` and ``value`` are [tokens, d], after the rotary embedding, which is applied to the first r
    dimensions and to the others apart. Mean and deviation are those of the visible keys; a token that sees no
    more than ``keep`` keeps them all.
    """
    tokens = len(query)
    scores = query[:, :r] @ key[:, :r].T
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen = visible.sum(-1, keepdim=True)
    kept = visible.clone()
    theta = torch.zeros_like(scores[:, :1])
    for token in range(keep, tokens):
        share = 1 - keep / int(seen[token])
        row = gaussian_threshold(
            scores[token : token + 1], share, unbiased=True, visible=visible[token : token + 1]
        )
        theta[token] = row[0]
        kept[token] &= scores[token] > row[0]
    weights = (scores - theta).masked_fill(~kept, -math.inf).softmax(-1)
    return (weights * F.softplus(query[:, r:] @ key[:, r:].T)) @ value, kept
