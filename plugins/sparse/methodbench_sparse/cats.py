"""CATS: contextually-aware thresholding of the gate of a feed-forward network.

Lee, Lee, Zhang, Tiwari, Mirhoseini, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
COLM 2024, arXiv 2404.08763; authors' code ScalingIntelligence/CATS.

Most outputs of SiLU lie near zero, and a neuron whose gate is near zero adds little. Gates whose magnitude does not
exceed a threshold are set to zero; the threshold of a block is a percentile of the gates on calibration text. A zero
gate spares its row of the up projection and its column of the down projection::

    a = SiLU(W_gate x)      a_i <- 0 where |a_i| <= t      y = W_down (a (W_up x))

The percentile is read off a histogram of 997 bins over [-1, 1] and one beyond each end: t is the lower edge of the
bin in which the cumulated share first exceeds the sparsity, so larger gates are never below t. Every token is masked,
in prompts and when decoding. Attention stays dense, and so do the products, unless execution asks for sparse ones.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import (
    POSITIONS_HELP,
    FeedForward,
    Positions,
    Threshold,
    feed_forwards,
    mask_neurons,
    match,
    observed,
    site_sparsity,
)
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sparse_gemv import Execution, execute

#: Finite edges of the histogram, and their range (authors' code).
EDGES, LIMIT = 998, 1.0
COUNTED_HELP = "what sparsity is the share of: the masked sites, or all weights in the blocks (model-level)"


@hyperparameters
class CATS:
    """Zeroes the neurons of feed-forward networks whose gate is small."""

    sparsity: Annotated[float, Field(ge=0, lt=1, description="share zeroed; see counted")] = 0.5
    counted: Annotated[Literal["site", "model"], Field(description=COUNTED_HELP)] = "site"
    positions: Annotated[Positions, Field(description=POSITIONS_HELP)] = "all"
    corrections: Annotated[
        int,
        Field(ge=0, le=8, description="times that the level is corrected by what calibration text measures"),
    ] = 0
    execution: Execution = "masked"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with masked gates; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no calibration inputs, blocks without a feed-forward network whose activation
                function is a module, or a model-level sparsity that these networks cannot give.
        """
        networks = feed_forwards(model)
        spared = {name: part for network in networks for name, part in network.spared.items()}
        level = self.sparsity
        if self.counted == "model":
            level = site_sparsity(model, spared, self.sparsity)
        with ctx.phase("calibrate"):
            counts = self._counts(model, networks, data, ctx)

        def install(sparse: LoadedModel, level: float) -> None:
            rules = [(network, Threshold(threshold(counts[network], level))) for network in networks]
            mask_neurons(sparse, rules, self.positions)

        corrections = self.corrections if self.counted == "model" else 0
        sparse, level = match(model, data, self.sparsity, level, install, corrections)
        sparse.facts |= {"sparsity_target": self.sparsity, "sparsity_level": level}
        execute(sparse, self.execution, level)
        return sparse

    def _counts(
        self, model: LoadedModel, networks: list[FeedForward], data: Calibration, ctx: Context
    ) -> dict[FeedForward, Tensor]:
        by_name = {network.activation: network for network in networks}
        found: dict[FeedForward, Tensor] = {}
        for (name,), inputs in observed(model, data, by_name, "cats"):
            activation = model.module.get_submodule(name)
            with torch.no_grad():
                gates = [activation(z) for z in inputs]
            if not gates:
                ctx.warn(f"no calibration token reached {name}: its neurons are not masked")
            found[by_name[name]] = gate_counts(torch.cat([a.flatten() for a in gates] or [torch.zeros(0)]))
        return found


def bin_edges() -> Tensor:
    """Return the finite edges of the histogram, float32 [998]."""
    return torch.linspace(-LIMIT, LIMIT, EDGES)


def gate_counts(gates: Tensor) -> Tensor:
    """Return the counts of ``|gates|`` (any shape) in the bins between -inf, :func:`bin_edges` and inf, [999].

    A bin holds its lower edge.
    """
    edges = bin_edges().to(gates.device)
    bins = torch.bucketize(gates.detach().float().abs().flatten(), edges, right=True)
    return torch.bincount(bins, minlength=EDGES + 1)


def threshold(counts: Tensor, sparsity: float) -> float:
    """Return the lower edge of the bin in which the cumulated share of ``counts`` [999] first exceeds ``sparsity``.

    0 for a sparsity of 0 and where nothing was counted.
    """
    total = float(counts.sum())
    if sparsity == 0 or not total:
        return 0.0
    cumulated = (counts.float() / counts.float().sum()).cumsum(0).cpu()
    index = int(torch.searchsorted(cumulated, torch.tensor(sparsity), right=True))
    return max(0.0, float(bin_edges()[min(index, EDGES) - 1]))
