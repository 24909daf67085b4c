"""Magnitude pruning: the data-free floor of every pruner.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015, arXiv
1506.02626; the one-shot form for language models is the baseline of Wanda (arXiv 2306.11695).

Weights of smallest absolute value go, without data and without an update of the kept ones. The comparison
group is one Linear's whole matrix; a row, or all Linears together, are options. With W [out, in] and
sparsity s::

    t = sort(|W|)[int(numel s)]        W_ij <- 0  where  |W_ij| <= t

N:M patterns zero the N smallest of every M consecutive inputs. Zeros are stored as zeros unless ``weights`` says
otherwise: unstructured ones speed up no dense kernel, and 2:4 has one on GPUs only, none on CPUs.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.compressed import WeightFormat, store_pruned
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.masks import (
    PATTERN,
    WEIGHTS,
    apply_mask,
    check_groups,
    check_pattern,
    nm_mask,
    parse_pattern,
    record_zeros,
    row_mask,
    weight_matrix,
)


@hyperparameters
class Magnitude:
    """Zeroes the smallest weights."""

    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="share of zeros; 0 leaves the model unchanged")
    ] = 0.5
    pattern: Annotated[
        str,
        Field(pattern=PATTERN, description="unstructured, or N:M for N zeros in every M inputs (2:4, 4:8)"),
    ] = "unstructured"
    scope: Annotated[
        Literal["per-linear", "per-row", "global"],
        Field(description="weights that compete: one Linear's, one output's, or those of all Linears"),
    ] = "per-linear"
    weights: Annotated[WeightFormat, Field(description=WEIGHTS)] = "dense"

    @model_validator(mode="after")
    def _scope_agrees(self) -> Self:
        check_pattern(self.pattern, self.sparsity, self.weights)
        if self.pattern != "unstructured" and self.scope != "per-linear":
            raise ValueError(f"pattern {self.pattern} compares within its groups: leave scope at per-linear")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the pruned model; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no Linear in the blocks, or one whose inputs do not divide into the
                pattern's groups.
        """
        pruned = model.clone()
        if self.sparsity == 0:
            return store_pruned(record_zeros(pruned), self.weights)
        linears = pruned.adapter.targets(pruned.module)
        threshold = None
        if self.scope == "global":
            threshold = magnitude_threshold(
                [weight_matrix(linear) for linear in linears.values()], self.sparsity
            )
        for name, linear in linears.items():
            apply_mask(linear, self.mask(weight_matrix(linear), threshold, name))
        return store_pruned(record_zeros(pruned), self.weights, parse_pattern(self.pattern))

    def mask(self, weight: Tensor, threshold: Tensor | None = None, name: str = "the matrix") -> Tensor:
        """Return True where ``weight`` [out, in] goes; ``threshold`` is that of the global scope."""
        nm = parse_pattern(self.pattern)
        if nm is not None:
            check_groups(name, weight.shape[1], nm[1])
            return nm_mask(weight.abs(), *nm)
        if self.scope == "per-row":
            return row_mask(weight.abs(), self.sparsity)
        if threshold is None:
            threshold = magnitude_threshold([weight], self.sparsity)
        return weight.abs() <= threshold


def magnitude_threshold(weights: list[Tensor], sparsity: float) -> Tensor:
    """Return ``sort(|W|)[int(numel * sparsity)]`` over all ``weights`` together, a scalar of their dtype.

    The comparison with it is ``<=``, as in the reference: one weight more than ``int(numel * sparsity)``
    goes, and with it every other of equal magnitude.
    """
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    index = min(int(magnitudes.numel() * sparsity), magnitudes.numel() - 1)
    return magnitudes.kthvalue(index + 1).values
