"""SparseGPT: pruning with second-order compensation.

Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, arXiv
2301.00774; authors' code IST-DASLab/sparsegpt (147d215).

Columns of a Linear are visited in order; a weight that goes is made up for by the columns that are still to come, as
the inverse Hessian of the output error on calibration inputs X says. With H = 2 X^T X damped, and U upper triangular
such that U^T U = H^-1, weights of lowest::

    S_ij = (W_ij / U_jj)^2

go: the int(n s) + 1 lowest of the n in a block of columns before any of the block is visited, or the N lowest of every
row in M columns, as the columns before have left them (algorithm 1). The kept ones may be rounded on the way, on the
grid between the extremes of each row of the dense weight. Blocks of the model are pruned one after the other, each on
the outputs of the pruned ones before it; all Linears of a block share the statistics of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.compensation import (
    PANEL,
    Hessian,
    compensate,
    inverse_factor,
    observe_hessians,
)
from methodbench.torchkit.compressed import WeightFormat, store_pruned
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.quantizers import find_grid, finite
from methodbench.torchkit.sequential import walk
from methodbench_sparse.masks import (
    PATTERN,
    WEIGHTS,
    check_groups,
    check_pattern,
    parse_pattern,
    record_zeros,
    weight_matrix,
)


@hyperparameters
class SparseGPT:
    """Zeroes the weights whose loss is best compensated by the columns that follow."""

    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="share of zeros in a block of columns; 0 prunes nothing")
    ] = 0.5
    pattern: Annotated[
        str,
        Field(pattern=PATTERN, description="unstructured, or N:M for N zeros in every M inputs (2:4, 4:8)"),
    ] = "unstructured"
    blocksize: Annotated[
        int, Field(ge=1, le=65536, description="columns whose weights compete, and per lazy update")
    ] = 128
    percdamp: Annotated[
        float, Field(gt=0, le=1, description="damping, as a share of the Hessian's mean diagonal")
    ] = 0.01
    bits: Annotated[
        int,
        Field(ge=2, le=16, description="bits of the kept weights, rounded in the same pass; 16: as they are"),
    ] = 16
    weights: Annotated[WeightFormat, Field(description=WEIGHTS)] = "dense"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_pattern(self.pattern, self.sparsity, self.weights)
        nm = parse_pattern(self.pattern)
        if nm is not None and self.blocksize % nm[1]:
            raise ValueError(
                f"blocksize {self.blocksize} does not divide into groups of {nm[1]} ({self.pattern})"
            )
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the pruned model; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no calibration inputs, or a Linear whose inputs do not divide into the pattern's
                groups.
            DivergedError: weights or calibration activations are not finite.
        """
        if not len(data):
            raise NotApplicableError(
                "sparsegpt compensates on calibration inputs, and the task gives no calibration data"
            )
        # Under the same name: where nobody else holds the dense weights, each goes when its layer is done.
        model = model.clone()
        if self.sparsity == 0 and self.bits == 16:
            return store_pruned(record_zeros(model), self.weights)
        loss, unseen = 0.0, []
        for step in walk(model, data, propagate="compressed"):
            hessians = observe_hessians(step, model.adapter.linears(step.block))
            # A wide layer's Hessian is larger than its weight: each goes with its layers.
            while hessians:
                names, hessian = hessians.pop(0)
                full_names = [f"{step.name}.{name}" for name in names]
                loss += self._prune([step.block.get_submodule(name) for name in names], hessian, full_names)
                unseen += [] if hessian.tokens else full_names
        if unseen:
            ctx.warn(
                f"no calibration token reached {len(unseen)} layers, pruned by magnitude alone (first: {unseen[0]})"
            )
        model.facts["loss"] = loss
        return store_pruned(record_zeros(model), self.weights, parse_pattern(self.pattern))

    def _prune(self, linears: Sequence[nn.Module], hessian: Hessian, names: Sequence[str]) -> float:
        """Prune layers that share an input, in place, and return the error that it adds."""
        dead = hessian.matrix.diagonal() == 0
        factor, _ = inverse_factor(hessian.matrix, self.percdamp, names[0], dead=dead)
        loss = 0.0
        for linear, name in zip(linears, names, strict=True):
            found = sparsegpt(
                weight_matrix(linear).float(),
                hessian.matrix,
                sparsity=self.sparsity,
                pattern=self.pattern,
                blocksize=self.blocksize,
                percdamp=self.percdamp,
                bits=self.bits,
                name=name,
                factor=factor,
            )
            weight = linear.get_parameter("weight")
            set_weight(linear, found.weight.to(weight.dtype).view_as(weight))
            loss += found.loss
        return loss


@dataclass(frozen=True, slots=True)
class Pruned:
    """What :func:`sparsegpt` returns.

    Attributes:
        weight: float32 [rows, columns].
        mask: bool [rows, columns], True where the weight went.
        loss: the output error that all replacements add, the sum of ``e_j^2 / 2``.
    """

    weight: Tensor
    mask: Tensor
    loss: float


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float,
    pattern: str = "unstructured",
    blocksize: int = 128,
    percdamp: float = 0.01,
    bits: int = 16,
    name: str = "the weight",
    factor: Tensor | None = None,
) -> Pruned:
    """Prune one weight (the authors' ``fasterprune``; algorithm 1).

    Columns whose input was always zero become zero. Without any input the Hessian is taken for the identity: pruning
    by magnitude.

    Args:
        weight: float32 [rows, columns].
        hessian: float32 [columns, columns].
        sparsity: share of each block of columns, where there is no pattern.
        pattern: see :data:`methodbench_sparse.masks.PATTERN`.
        blocksize: columns per block, a multiple of the pattern's group.
        percdamp: damping.
        bits: of the kept weights; 16 leaves them as they are.
        name: for messages.
        factor: U of ``hessian``, dead inputs counting as 1, where it is known from another weight
            (:func:`methodbench.torchkit.compensation.inverse_factor`).

    Raises:
        NotApplicableError: ``columns`` is no multiple of the pattern's group.
        DivergedError: ``weight`` or ``hessian`` is not finite, or the Hessian cannot be factored.
    """
    nm = parse_pattern(pattern)
    if nm is not None:
        check_groups(name, weight.shape[1], nm[1])
    if not finite(weight):
        raise DivergedError(f"{name} holds NaN or infinity and cannot be pruned")
    grid = find_grid(weight, bits, "gptq", symmetric=False).columnwise() if bits < 16 else None
    dead = hessian.diagonal() == 0
    if bool(dead.any()) and not bool(dead.all()):
        weight = weight.masked_fill(dead, 0.0)
    upper = inverse_factor(hessian, percdamp, name, dead=dead)[0] if factor is None else factor
    pivots = upper.diagonal()[:, None]

    # One column of the weight is one contiguous row here.
    outer = weight.T.contiguous()
    kept = torch.empty_like(outer)
    mask = torch.zeros_like(outer, dtype=torch.bool)

    def enter(start: int, block: Tensor) -> None:
        if nm is None and sparsity > 0:
            score = block.square() / pivots[start : start + len(block)].square()
            mask[start : start + len(block)] = score <= at_place(score, int(score.numel() * sparsity))

    def replace(j: int, ahead: Tensor) -> Tensor:
        if nm is not None and j % nm[1] == 0:
            zeros, group = nm
            score = ahead[:group].square() / pivots[j : j + group].square()
            lowest = score.sort(dim=0, stable=True).indices[:zeros]
            mask[j : j + group].scatter_(0, lowest, True)
        column = ahead[0].masked_fill(mask[j], 0.0)
        kept[j] = column if grid is None else grid.snap(column)
        return kept[j]

    # A group of the pattern lies within one panel, so that its scores are those of updated weights.
    panel = PANEL if nm is None else max(1, PANEL // nm[1]) * nm[1]
    loss = compensate(outer, upper, blocksize, replace, enter=enter, panel=panel)
    return Pruned(kept.T.contiguous(), mask.T, loss)


def at_place(values: Tensor, place: int) -> Tensor:
    """Return the value at ``place``, counted from 0, of all ``values`` in ascending order."""
    return values.flatten().kthvalue(place + 1).values
