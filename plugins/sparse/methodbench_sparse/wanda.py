"""Wanda: pruning by weights and activations.

Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv
2306.11695; authors' code locuslab/wanda.

A weight matters as much as its magnitude times the norm of the input that it multiplies. Each output row
drops its lowest scores, so that no output loses more than another; kept weights are not updated. Blocks are
pruned one after the other, each on the outputs of the pruned ones before it; all Linears of a block share
the statistics of one dense pass. With W [out, in] and inputs X [tokens, in] (section 3, equation 1)::

    S_ij = |W_ij| ||X_j||_2            W_ij <- 0  for the int(in s) lowest S_i: of every row i

A variant in the authors' code drops scores up to an equal share alpha of every row's sum instead of an equal
count; alpha is found by bisection. Masks lie on dense weights: 2:4 has a fast kernel on GPUs only, none on
CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.compressed import WeightFormat, store_pruned
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sequential import walk
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

#: The bisection of the variant ends at this distance from the wanted sparsity, or at a bracket this narrow.
TOLERANCE = 1e-3


@hyperparameters
class RowSettings:
    """What goes of every row, whatever the score."""

    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="share of zeros in every row; 0 prunes nothing")
    ] = 0.5
    pattern: Annotated[
        str,
        Field(pattern=PATTERN, description="unstructured, or N:M for N zeros in every M inputs (2:4, 4:8)"),
    ] = "unstructured"
    use_variant: Annotated[
        bool, Field(description="cut every row at an equal share of its summed scores, not at an equal count")
    ] = False
    weights: Annotated[WeightFormat, Field(description=WEIGHTS)] = "dense"

    @model_validator(mode="after")
    def _pattern_agrees(self) -> Self:
        check_pattern(self.pattern, self.sparsity, self.weights)
        if self.pattern != "unstructured" and self.use_variant:
            raise ValueError(f"use_variant needs pattern unstructured, not {self.pattern}")
        return self

    def stored(self, pruned: LoadedModel) -> LoadedModel:
        """Put the pruned layers in the format that was asked for, and return the model."""
        return store_pruned(pruned, self.weights, parse_pattern(self.pattern))


@hyperparameters
class Wanda(RowSettings):
    """Zeroes the weights of lowest magnitude times input norm, row by row."""

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the pruned model; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no calibration inputs, or a Linear whose inputs do not divide into the
                pattern's groups.
        """
        if not len(data):
            raise NotApplicableError(
                "wanda scores weights by their inputs, and the task gives no calibration data"
            )
        # Under the same name: where nobody else holds the dense weights, each goes when its layer is done.
        model = model.clone()
        return self.stored(prune_blocks(model, data, ctx, self.mask))

    def mask(self, weight: Tensor, scaler: Tensor, name: str = "the matrix") -> Tensor:
        """Return True where ``weight`` [out, in] goes, given ``scaler`` [in] of :class:`InputScale`."""
        return lowest(wanda_score(weight, scaler), self.sparsity, self.pattern, self.use_variant, name)


def prune_blocks(
    model: LoadedModel, data: Calibration, ctx: Context, mask: Callable[[Tensor, Tensor, str], Tensor]
) -> LoadedModel:
    """Prune block after block, in place, each on the outputs of the pruned ones before it; return the model.

    Args:
        model: a clone.
        data: calibration inputs.
        ctx: is told of layers that no token reaches.
        mask: from a weight [out, in], the value [in] of its :class:`InputScale` and its name to what goes, True.
    """
    for step in walk(model, data, propagate="compressed"):
        linears = model.adapter.linears(step.block)
        statistics = {name: InputScale(weight_matrix(linear).shape[1]) for name, linear in linears.items()}
        step.forward({name: statistic.add for name, statistic in statistics.items()})
        for name, linear in linears.items():
            where = f"{step.name}.{name}"
            if not statistics[name].sequences:
                ctx.warn(f"no calibration token reached {where}: its inputs do not count in its scores")
            apply_mask(linear, mask(weight_matrix(linear), statistics[name].value, where))
    return record_zeros(model)


def lowest(scores: Tensor, sparsity: float, pattern: str, use_variant: bool, name: str) -> Tensor:
    """Return True where a weight goes, given ``scores`` [out, in] and the fields of :class:`RowSettings`.

    Raises:
        NotApplicableError: the inputs do not divide into the pattern's groups.
    """
    nm = parse_pattern(pattern)
    if nm is not None:
        check_groups(name, scores.shape[1], nm[1])
        return nm_mask(scores, *nm)
    return variant_mask(scores, sparsity) if use_variant else row_mask(scores, sparsity)


class InputScale:
    """Squared norm of every input feature over calibration tokens, divided by the number of sequences.

    ``value`` is float32 [features]; ones until the first sequence arrives.
    """

    def __init__(self, features: int) -> None:
        self.value = torch.ones(features)
        self.sequences = 0

    def add(self, inputs: Tensor) -> None:
        """Add ``inputs`` [sequences, tokens, features], or [tokens, features] for one sequence."""
        if not inputs.numel():
            return
        sequences = inputs.shape[0] if inputs.dim() == 3 else 1
        kept = (
            self.value.to(inputs.device)
            if self.sequences
            else torch.zeros(inputs.shape[-1], device=inputs.device)
        )
        kept = kept * (self.sequences / (self.sequences + sequences))
        self.sequences += sequences
        norms = torch.linalg.vector_norm(inputs.reshape(-1, inputs.shape[-1]).float(), dim=0)
        self.value = kept + norms.square() / self.sequences


def wanda_score(weight: Tensor, scaler: Tensor) -> Tensor:
    """Return ``|W_ij| sqrt(scaler_j)``, float32 [out, in]; equation 1 up to a common factor."""
    return weight.abs().float().mul_(scaler.to(weight.device).sqrt())


def variant_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Mask scores up to the share alpha of each row's sum that brings the matrix nearest to ``sparsity``.

    Bisection of alpha from 0.4 in [0, 0.8], as in the authors' code; ``scores`` is [rows, columns].
    """
    if sparsity == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ascending = scores.sort(dim=-1, stable=True).values
    cumulative, total = ascending.cumsum(dim=-1), scores.sum(dim=-1, keepdim=True)
    low, alpha, high = 0.0, 0.4, 0.8
    while True:
        below = (cumulative <= alpha * total).sum(dim=-1, keepdim=True)
        cut = ascending.gather(-1, (below - 1).clamp(min=0))
        mask = (scores <= cut) & (below > 0)
        reached = float(mask.float().mean())
        if abs(reached - sparsity) <= TOLERANCE or high - low < TOLERANCE:
            return mask
        if reached > sparsity:
            high, alpha = alpha, (alpha + low) / 2
        else:
            low, alpha = alpha, (alpha + high) / 2
