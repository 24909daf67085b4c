"""WINA: activation sparsity by input magnitude times column norm.

Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", arXiv
2505.19427; authors' code microsoft/wina.

An input x_j of a Linear adds x_j W_:j to its output, so what is lost with it grows with |x_j| ||W_:j||, not
with |x_j| alone: small inputs that meet large columns stay. Inputs of lowest score are zeroed token by
token. Where the columns are orthogonal the kept set is the best of its size, which a rotation of the
residual stream brings about for k and gate (:mod:`methodbench_sparse.rotation`). With W [out, in], sparsity
s::

    c_j = ||W_:j||_2      z = |x| c      y = W (m x),  m = 1 for the int(in (1 - s)) largest z, or where z > t

The threshold t is the s-quantile of z over calibration tokens. A search can share the sparsity out among the
Linears of a block (:mod:`methodbench_sparse.greedy`). In a sequence of T > 1 tokens the last int(0.99 T) are masked,
a single token always. Products are dense, unless execution asks for sparse ones, and the rotation adds two products
per block.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
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
    score,
)
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sparse_gemv import Execution, execute
from methodbench_sparse.greedy import allocate
from methodbench_sparse.histograms import inverse_cdf
from methodbench_sparse.rotation import added_share, rotate

#: Roles of the Linears whose column norms the authors' code takes; the others score by |x| alone.
NORMED_ROLES = frozenset({"k", "gate", "qkv", "gate_up"})


@hyperparameters
class WINA:
    """Zeroes the inputs of every Linear in the blocks that matter least to its output."""

    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="share of inputs zeroed; the model-level sparsity as well")
    ] = 0.5
    mask_by: Annotated[
        Literal["topk", "threshold"],
        Field(description="keep an exact count per token, or what exceeds a calibrated threshold"),
    ] = "topk"
    columns: Annotated[
        Literal["code", "paper"],
        Field(description="column norms for k and gate only (authors' code) or for every Linear (paper)"),
    ] = "code"
    transform: Annotated[bool, Field(description="rotate the residual stream for orthogonal columns")] = True
    subtract_embed_mean: Annotated[
        bool, Field(description="centre the embeddings before the rotation, as the authors' code does")
    ] = True
    positions: Annotated[Positions, Field(description=POSITIONS_HELP)] = "last-99%"
    greedy: Annotated[bool, Field(description="share the sparsity out among the Linears of each block")] = (
        False
    )
    base_step: Annotated[
        float, Field(gt=0, le=1, description="step of the greedy search for the smallest Linear of a block")
    ] = 0.025
    last_fraction: Annotated[
        float, Field(gt=0, le=1, description="share of the tokens on which the search takes its error")
    ] = 0.25
    greedy_sequences: Annotated[int, Field(ge=1, description="calibration sequences of the search")] = 1
    corrections: Annotated[
        int,
        Field(ge=0, le=8, description="times that a level of thresholds is corrected on calibration text"),
    ] = 0
    execution: Execution = "masked"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with masked inputs; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no Linear in the blocks, blocks that the rotation does not fit, or a
                threshold or search asked for without calibration inputs.
        """
        dense = model.clone()
        if self.transform:
            with ctx.phase("rotate"):
                error = rotate(dense, subtract_embed_mean=self.subtract_embed_mean)
            dense.facts |= {"rotation_error": error, "rotation_added_weights": added_share(dense)}
        linears = block_linears(dense)
        norms = {name: self._norms(dense.adapter.role(name), linear) for name, linear in linears.items()}
        histograms: dict[str, ScoreHistogram] = {}
        if self.mask_by == "threshold" or self.greedy:
            with ctx.phase("calibrate"):
                histograms = score_histograms(dense, norms, data)
        levels = dict.fromkeys(linears, 1.0)
        if self.greedy and self.sparsity:
            trial = dense.clone()
            mask_inputs(trial, {name: Threshold(0.0, norms[name]) for name in linears}, self.positions)
            found = allocate(
                dense,
                trial,
                Calibration(data.inputs[: self.greedy_sequences], data.source),
                {name: histogram.quantile for name, histogram in histograms.items()},
                self.sparsity,
                base_step=self.base_step,
                last_fraction=self.last_fraction,
                ctx=ctx,
            )
            levels = {name: level / self.sparsity for name, level in found.items()}

        def install(sparse: LoadedModel, sparsity: float) -> None:
            rules: dict[str, nn.Module] = {}
            for name, linear in linears.items():
                level = min(1.0, sparsity * levels[name])
                if self.mask_by == "threshold":
                    rules[name] = Threshold(histograms[name].quantile(level), norms[name])
                else:
                    width = linear.get_parameter("weight").shape[1]
                    rules[name] = TopK(int(width * (1 - level)), norms[name])
            mask_inputs(sparse, rules, self.positions)

        corrections = self.corrections if self.mask_by == "threshold" else 0
        sparse, level = match(dense, data, self.sparsity, self.sparsity, install, corrections)
        sparse.facts |= {"sparsity_target": self.sparsity, "sparsity_level": level}
        execute(sparse, self.execution, level)
        return sparse

    def _norms(self, role: str, linear: nn.Module) -> Tensor | None:
        if self.columns == "paper" or role in NORMED_ROLES:
            return column_norms(linear.get_parameter("weight").detach())
        return None


def column_norms(weight: Tensor) -> Tensor:
    """Return ``||W_:j||_2`` [in] of ``weight`` [out, in], in its dtype."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0)
    return norms


def score_histograms(
    model: LoadedModel, norms: dict[str, Tensor | None], data: Calibration
) -> dict[str, ScoreHistogram]:
    """Return, for every Linear of ``norms``, the histogram of its scores on the dense model."""
    found = {name: ScoreHistogram() for name in norms}
    for names, inputs in observed(model, data, norms, "wina"):
        for name in names:
            for x in inputs:
                found[name].add(score(x, norms[name]))
    return found


class ScoreHistogram:
    """Exact counts of scores rounded to float16: a bin for every non-negative value of that type."""

    BINS = 0x7C01  # bit patterns of 0 to infinity; larger ones are NaN or negative

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64)

    def add(self, scores: Tensor) -> None:
        """Count non-negative ``scores`` of any shape."""
        bits = scores.detach().half().abs().contiguous().view(torch.int16).flatten().to("cpu", torch.int64)
        self.counts += torch.bincount(bits, minlength=self.BINS)[: self.BINS]

    def quantile(self, share: float) -> float:
        """Return the score below which ``share`` (< 1) of all lie, linear between neighbours; 0 for 0.

        0 as well where nothing was counted, so that nothing but zeros is masked.
        """
        if share == 0 or not self.counts.any():
            return 0.0
        present = self.counts.nonzero().flatten()
        values = present.to(torch.int16).view(torch.float16).double()
        return inverse_cdf(values, self.counts[present], share)
