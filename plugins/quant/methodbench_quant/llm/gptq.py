"""GPTQ: accurate post-training quantization for generative pre-trained transformers.

Frantar et al., ICLR 2023. One Linear at a time is rounded column by column, and the error of every column is
spread over the columns that are not rounded yet, so that the layer's output error on calibration inputs ``X``
grows as little as possible. The inverse Hessian of that error says how. With ``H = 2 X^T X`` damped, and
``U`` upper triangular such that ``H^-1 = U^T U``::

    q_j = quantize(w_j);  e_j = (w_j - q_j) / U_jj;  w_k <- w_k - e_j U_jk  for every k > j

Blocks are processed in order, each on inputs that went through the blocks quantized before it. Updates are
applied within blocks of columns at first and to the rest once per block, which changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.compensation import Hessian, compensate, inverse_factor, observe_hessians
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import (
    Convention,
    Quantized,
    UniformGrid,
    find_grid,
    find_grid_by_mse,
    groups_of,
    on_grid,
    require_finite,
)
from methodbench.torchkit.sequential import BlockStep, walk
from methodbench_quant.llm.layers import (
    finished,
    open_copy,
    replace_linear,
    warn_of_short_calibration,
    weight_of,
)
from methodbench_quant.llm.settings import (
    ActivationSettings,
    Bits,
    GroupSize,
    check_convention,
    check_group_size,
)


@hyperparameters
class GPTQ(ActivationSettings):
    """Rounds the weights of every Linear in the blocks with error feedback; the rest stays as it is."""

    bits: Bits = 4
    group_size: GroupSize = -1
    convention: Annotated[Convention, Field(description="how a grid follows from the extremes")] = "gptq"
    symmetric: Annotated[bool, Field(description="grid without zero point")] = False
    mse: Annotated[bool, Field(description="search the clipping of every grid")] = False
    percdamp: Annotated[
        float, Field(gt=0, le=1, description="damping, as a share of the Hessian's mean diagonal")
    ] = 0.01
    blocksize: Annotated[int, Field(ge=1, description="columns per lazy update")] = 128
    act_order: Annotated[bool, Field(description="columns in descending order of the diagonal of H")] = False
    static_groups: Annotated[
        bool, Field(description="fix the grids of all groups before any column is rounded")
    ] = False
    true_sequential: Annotated[
        bool, Field(description="layers of a block one after another, each on inputs from the ones before")
    ] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        check_convention(self.convention, self.symmetric)
        if self.static_groups and self.group_size == -1:
            raise ValueError("static_groups needs a group_size: without one every grid is fixed anyway")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers, calibrated on ``data`` (token ids or images).

        Raises:
            NotApplicableError: no calibration inputs; a layer's width is no multiple of ``group_size``.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        for name, layer in model.adapter.targets(model.module).items():
            groups_of(weight_of(layer), self.group_size, name)
        report = _Report(self.percdamp)
        for step in walk(model, data, propagate="compressed"):
            layers = list(model.adapter.linears(step.block))
            rounds = model.adapter.sequential_groups(step.block) if self.true_sequential else [layers]
            for names in rounds:
                with ctx.phase("hessians"):
                    hessians = observe_hessians(step, names)
                with ctx.phase("rounding"):
                    # A wide layer's Hessian is larger than its weight: each goes with its layers.
                    while hessians:
                        self._quantize(step, *hessians.pop(0), report)
        report.tell(ctx)
        return finished(model, {"loss": report.loss, **self.quantize_activations(model)})

    def _quantize(self, step: BlockStep, names: list[str], hessian: Hessian, report: _Report) -> None:
        """Quantize the Linears that share one input as one matrix: their rows do not depend on each other."""
        weights = [weight_of(step.block.get_submodule(name)) for name in names]
        rounded = gptq(
            torch.cat(weights) if len(weights) > 1 else weights[0],
            hessian.matrix,
            bits=self.bits,
            group_size=self.group_size,
            convention=self.convention,
            symmetric=self.symmetric,
            mse=self.mse,
            percdamp=self.percdamp,
            blocksize=self.blocksize,
            act_order=self.act_order,
            static_groups=self.static_groups,
            name=f"{step.name}.{names[0]}",
        )
        report.add([f"{step.name}.{name}" for name in names], hessian, rounded)
        start = 0
        for name, weight in zip(names, weights, strict=True):
            rows = slice(start, start + weight.shape[0])
            start = rows.stop
            replace_linear(step.block, name, rounded.rows(rows), perm=rounded.perm)


@dataclass(frozen=True, slots=True)
class Rounded:
    """What :func:`gptq` returns.

    Attributes:
        quantized: codes [rows, columns], in the order of ``perm`` where there is one.
        perm: int64 [columns] or None: column ``j`` of the codes is column ``perm[j]`` of the weight.
        loss: sum over all weights of the output error that each rounding adds, ``e^2 / 2``.
        damping: share of the mean diagonal that made the Hessian positive definite.
    """

    quantized: Quantized
    perm: Tensor | None
    loss: float
    damping: float

    def rows(self, rows: slice) -> Quantized:
        """Return some rows of the quantized weight."""
        q = self.quantized
        zero = None if q.zero is None else q.zero[rows]
        return Quantized(q.codes[rows], q.scale[rows], zero, q.low, q.bits)

    def dequantize(self) -> Tensor:
        """Return the weight [rows, columns] in its own column order."""
        weight = self.quantized.dequantize()
        return weight if self.perm is None else weight[:, torch.argsort(self.perm)]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int = -1,
    convention: Convention = "gptq",
    symmetric: bool = False,
    mse: bool = False,
    percdamp: float = 0.01,
    blocksize: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    name: str = "the weight",
) -> Rounded:
    """Quantize one weight (the authors' ``fasterquant``; algorithm 1 of the paper).

    A group's grid is found from the columns as the blocks before have left them, without the updates of the
    current block: with groups narrower than ``blocksize`` that is what the authors' code does. Columns whose
    input was always zero become exactly zero. A Hessian without any input gives plain rounding.

    Args:
        weight: fp32 [rows, columns].
        hessian: fp32 [columns, columns], of any positive factor.

    Raises:
        NotApplicableError: ``columns`` is no multiple of ``group_size``.
        DivergedError: ``weight`` or ``hessian`` is not finite, or the Hessian cannot be factored.
    """
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size

    def grid_of(columns_of_group: Tensor) -> UniformGrid:
        if mse:
            return find_grid_by_mse(columns_of_group, bits, convention, symmetric=symmetric)
        return find_grid(columns_of_group, bits, convention, symmetric=symmetric)

    grouped = groups_of(weight, group_size, name)
    require_finite(weight, name)
    dead = hessian.diagonal() == 0
    if bool(dead.all()):
        return Rounded(on_grid(grouped, grid_of(grouped), bits, name), None, 0.0, percdamp)

    fixed: list[UniformGrid] = []
    if group_size == -1:
        fixed = [grid_of(weight).columnwise()]
    if bool(dead.any()):
        weight = weight.masked_fill(dead, 0.0)
    if static_groups:
        fixed = [grid_of(weight[:, start : start + size]).columnwise() for start in range(0, columns, size)]
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = torch.argsort(hessian.diagonal().masked_fill(dead, 1.0), descending=True)
        weight, hessian, dead = weight[:, order], hessian[order[:, None], order], dead[order]
    upper, damping = inverse_factor(hessian, percdamp, name, dead=dead)

    # One column of the weight is one contiguous row here, and every step works on whole columns.
    outer = weight.T.contiguous()
    codes = torch.empty_like(outer, dtype=torch.int16)
    groups_of_columns = (order // size).tolist()
    found: list[UniformGrid] = []

    def rounded(j: int, ahead: Tensor) -> Tensor:
        if fixed:
            levels = fixed[groups_of_columns[j]]
        else:
            if j % size == 0:
                found.append(grid_of(outer[j : j + size].T).columnwise())
            levels = found[-1]
        code = levels.encode(ahead[0])
        codes[j] = code
        return levels.decode(code)

    loss = compensate(outer, upper, blocksize, rounded)
    grids = fixed or found
    by_column = codes.T
    perm: Tensor | None = order if act_order else None
    if perm is not None and fixed:
        by_column, perm = by_column[:, torch.argsort(perm)], None
    quantized = Quantized(
        by_column.contiguous(),
        torch.stack([g.scale for g in grids], 1),
        None if grids[0].zero is None else torch.stack([g.zero for g in grids if g.zero is not None], 1),
        grids[0].low,
        bits,
    )
    return Rounded(quantized, perm, loss, damping)


class _Report:
    """What a reader of the result should know about the calibration."""

    def __init__(self, percdamp: float) -> None:
        self.percdamp = percdamp
        self.loss = 0.0
        self.seen: list[tuple[int, int]] = []
        """Calibration tokens and input columns of each layer that any reached."""
        self.unseen: list[str] = []
        self.damped: dict[str, float] = {}

    def add(self, names: list[str], hessian: Hessian, rounded: Rounded) -> None:
        width = hessian.matrix.shape[0]
        self.loss += rounded.loss
        if not hessian.tokens:
            self.unseen += names
        else:
            self.seen += [(hessian.tokens, width)] * len(names)
        if rounded.damping > self.percdamp:
            self.damped |= dict.fromkeys(names, rounded.damping)

    def tell(self, ctx: Context) -> None:
        warn_of_short_calibration(self.seen, ctx)
        if self.unseen:
            ctx.warn(
                f"no calibration token reached {len(self.unseen)} layers, which are rounded to nearest "
                f"(first: {self.unseen[0]})"
            )
        if self.damped:
            name, damping = next(iter(self.damped.items()))
            ctx.warn(
                f"{len(self.damped)} layers needed more damping than {self.percdamp:g} "
                f"(first: {name}, {damping:g})"
            )
