"""TEAL: activation sparsity by the magnitude of a Linear's inputs.

Liu, Ponnusamy, Cai, Guo, Kim, Athiwaratkun, "Training-Free Activation Sparsity in Large Language Models", ICLR 2025,
arXiv 2408.14690; authors' code FasterDecoding/TEAL.

Inputs of the Linears of a decoder are near to Gaussian or Laplacian around zero, so small ones carry little. Each
Linear gets one threshold, calibrated so that a share p of its inputs falls below it, and zeroes these; a search can
share the sparsity out among the Linears of a block (:mod:`methodbench_sparse.greedy`). A zeroed input spares its
column of the weight::

    t = F^{-1}((1 + p) / 2)        y = W (x [|x| > t])

F is a histogram of the dense activations that q, k and v (or gate and up) share, taken as symmetric around zero.
In a sequence the last half is masked, a single token always. Products are dense, unless execution asks for sparse ones.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import (
    POSITIONS_HELP,
    Positions,
    Threshold,
    TopK,
    block_linears,
    mask_inputs,
    match,
    observed,
)
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sparse_gemv import Execution, execute
from methodbench_sparse.greedy import allocate
from methodbench_sparse.histograms import inverse_cdf, smallest


@hyperparameters
class TEAL:
    """Zeroes the inputs of every Linear in the blocks whose magnitude does not exceed a calibrated threshold."""

    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="share of inputs zeroed; the model-level sparsity as well")
    ] = 0.5
    mask_by: Annotated[
        Literal["threshold", "topk"],
        Field(description="a calibrated threshold per Linear, or an exact count per token"),
    ] = "threshold"
    positions: Annotated[Positions, Field(description=POSITIONS_HELP)] = "last-half"
    greedy: Annotated[bool, Field(description="share the sparsity out among the Linears of each block")] = (
        False
    )
    base_step: Annotated[
        float, Field(gt=0, le=1, description="step of the greedy search for the smallest Linear of a block")
    ] = 0.05
    last_fraction: Annotated[
        float, Field(gt=0, le=1, description="share of the tokens on which the search takes its error")
    ] = 0.25
    greedy_sequences: Annotated[int, Field(ge=1, description="calibration sequences of the search")] = 1
    bins: Annotated[int, Field(ge=3, description="bins of the histograms")] = 10000
    outliers: Annotated[
        float, Field(ge=0, lt=0.5, description="share of activations at each end that gets one bin")
    ] = 0.01
    corrections: Annotated[
        int,
        Field(ge=0, le=8, description="times that the level is corrected by what calibration text measures"),
    ] = 0
    execution: Execution = "masked"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with masked inputs; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no Linear in the blocks, or no calibration inputs.
        """
        with ctx.phase("calibrate"):
            histograms = self._histograms(model, data, ctx)
        levels = dict.fromkeys(histograms, 1.0)
        if self.greedy and self.sparsity:
            trial = model.clone()
            mask_inputs(trial, {name: Threshold(0.0) for name in histograms}, self.positions)
            some = Calibration(data.inputs[: self.greedy_sequences], data.source)
            thresholds = {name: histogram.threshold for name, histogram in histograms.items()}
            found = allocate(
                model,
                trial,
                some,
                thresholds,
                self.sparsity,
                base_step=self.base_step,
                last_fraction=self.last_fraction,
                ctx=ctx,
            )
            levels = {name: level / self.sparsity for name, level in found.items()}

        def install(sparse: LoadedModel, sparsity: float) -> None:
            rules = {
                name: self._rule(
                    sparse.module.get_submodule(name), histogram, min(1.0, sparsity * levels[name])
                )
                for name, histogram in histograms.items()
            }
            mask_inputs(sparse, rules, self.positions)

        sparse, level = match(model, data, self.sparsity, self.sparsity, install, self.corrections)
        sparse.facts |= {"sparsity_target": self.sparsity, "sparsity_level": level}
        execute(sparse, self.execution, level)
        return sparse

    def _rule(self, linear: nn.Module, histogram: Histogram, sparsity: float) -> nn.Module:
        if self.mask_by == "topk":
            return TopK(int(linear.get_parameter("weight").shape[1] * (1 - sparsity)))
        return Threshold(histogram.threshold(sparsity))

    def _histograms(self, model: LoadedModel, data: Calibration, ctx: Context) -> dict[str, Histogram]:
        found: dict[str, Histogram] = {}
        for names, inputs in observed(model, data, block_linears(model), "teal"):
            if not inputs:
                ctx.warn(f"no calibration token reached {names[0]}: its inputs are not masked")
                histogram = Histogram(torch.zeros(1), torch.zeros(1))
            else:
                flat = torch.cat([x.flatten() for x in inputs])
                if not bool(flat.isfinite().all()):
                    raise NotApplicableError(f"inputs of {names[0]} of {model.name} are not finite")
                histogram = Histogram.of(flat, self.bins, self.outliers)
                if histogram.is_constant:
                    ctx.warn(
                        f"inputs of {names[0]} are constant: no share of them is told apart, none is masked"
                    )
            found |= dict.fromkeys(names, histogram)
        return {name: found[name] for name in block_linears(model)}


class Histogram:
    """Counts of activations: many narrow bins between two quantiles, a wide one on either side.

    ``centers`` and ``counts`` are [bins], float32.
    """

    def __init__(self, centers: Tensor, counts: Tensor) -> None:
        self.centers = centers
        self.counts = counts

    @classmethod
    def of(cls, values: Tensor, bins: int, outliers: float) -> Histogram:
        """Count ``values`` [n] in float32; a share ``outliers`` of them falls into each of the end bins.

        Where all but the outliers are one value, every distinct value is a bin of its own.
        """
        values = values.detach().float().flatten()
        count = int(outliers * values.numel())
        low, high = values.min(), values.max()
        if low == high:
            return cls(low[None].cpu(), torch.tensor([float(values.numel())]))
        first, last = smallest(values, count + 1, values.numel() - count + (1 if count else 0))
        if first == last:
            distinct, counts = values.unique(return_counts=True)
            return cls(distinct.cpu(), counts.float().cpu())
        inner = torch.linspace(float(first), float(last), bins - 1, device=values.device)
        # The last bin holds its upper edge, and so does every bin its lower one.
        counts = torch.bucketize(values, inner, right=True).bincount(minlength=bins).float()
        edges = torch.cat([low[None], inner, high[None]]).cpu()
        return cls((edges[:-1] + edges[1:]) / 2, counts.cpu())

    @property
    def is_constant(self) -> bool:
        """Whether all that was counted is one value, or nothing was counted."""
        return len(self.centers) == 1

    def threshold(self, sparsity: float) -> float:
        """Return the magnitude below which a share ``sparsity`` lies; 0 for 0 and where nothing can be told apart.

        The distribution is taken as symmetric around 0: it is the quantile (1 + sparsity) / 2.
        """
        if sparsity == 0 or self.is_constant:
            return 0.0
        return max(0.0, inverse_cdf(self.centers, self.counts, 0.5 + sparsity / 2))
