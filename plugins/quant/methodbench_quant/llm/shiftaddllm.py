"""ShiftAddLLM: post-training reparameterization of linear layers into shifts and adds.

You et al., NeurIPS 2024 (arXiv 2406.05981). A weight becomes a sum of binary matrices times scales that are
sums of a few powers of two, so that products become shifts, look-ups and adds. The codes are fitted column by
column inside GPTQ's loop, which spreads the error of every column over the ones that are left. For a group
``w`` of weights, binary vectors ``B`` [n, b] and scales ``alpha`` [b] alternate for some rounds between::

    alpha <- APoT(sort |(B^T B)^-1 B^T w|);     B <- nearest of the 2^b sums of +-alpha_i
    APoT(x) = sum of k terms, each the power of two nearest (in the exponent) to what the ones before leave

``acc`` gives a column scales of its own and first rescales and rotates the weight; ``lat`` shares scales
within tiles of an eighth of the rows by eight columns. ``mix_bits`` spends 1, 2 or 3 bits per layer, by a
layer's sensitivity ``|| |W| / diag U ||_F std(W / diag U)^2``.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.binary_coded import BinaryCoded, rotations_of
from methodbench.torchkit.compensation import inverse_factor, observe_hessians
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import require_finite
from methodbench.torchkit.sequential import walk
from methodbench_quant.llm.layers import check_calibration, finished, open_copy, replace_linear, weight_of

#: Columns that share scales in ``lat`` mode, and parts that the rows are cut into.
_LAT_COLUMNS = 8
_LAT_PARTS = 8

#: Columns whose mutual updates are applied one by one; a multiple of :data:`_LAT_COLUMNS`.
_PANEL = 16

#: Keeps the conjugate gradient from dividing by nothing (the authors' constant).
_CG_FLOOR = np.float32(1e-6)

_LN_2 = np.float32(math.log(2))


@hyperparameters
class ShiftAddLLM:
    """Codes the weights of every Linear in the blocks; embeddings and head stay as they are."""

    bits: Annotated[int, Field(ge=1, le=4, description="binary matrices per weight")] = 3
    mode: Annotated[Literal["acc", "lat"], Field(description="scales per column (acc) or per tile (lat)")] = (
        "acc"
    )
    rounds: Annotated[int, Field(ge=1, le=1000, description="alternations between scales and codes")] = 50
    terms: Annotated[int, Field(ge=1, le=4, description="powers of two in a scale")] = 3
    group_size: Annotated[
        int, Field(ge=-1, description="output rows that share a scale; -1 for all (acc) or an eighth (lat)")
    ] = -1
    rescale: Annotated[bool, Field(description="balance input and weight columns first (acc only)")] = True
    project: Annotated[bool, Field(description="random orthogonal projection first (acc only)")] = True
    percdamp: Annotated[
        float, Field(gt=0, le=1, description="damping, as a share of the Hessian's mean diagonal")
    ] = 0.01
    blocksize: Annotated[int, Field(ge=1, description="columns per lazy update")] = 128
    mix_bits: Annotated[
        tuple[float, float, float] | None,
        Field(description="shares of layers with 1, 2 and 3 bits, by sensitivity; replaces bits"),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.group_size == 0:
            raise ValueError("group_size is a number of output rows, or -1; it cannot be 0")
        if self.mode == "lat" and self.blocksize % _LAT_COLUMNS:
            raise ValueError(f"blocksize must be a multiple of {_LAT_COLUMNS} in lat mode")
        if self.mix_bits and (min(self.mix_bits) < 0 or not math.isclose(sum(self.mix_bits), 1)):
            raise ValueError("mix_bits are three shares that add up to 1")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with binary-coded layers, calibrated on ``data``.

        Raises:
            NotApplicableError: no calibration inputs; a layer's height or width has no whole number of groups.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        check_calibration(model, data, ctx)
        for name, layer in model.adapter.targets(model.module).items():
            self._row_block(tuple(weight_of(layer).shape), name)
        with ctx.phase("allocation"):
            bits = self._allocate(model, data)
        seeds = itertools.count(ctx.seed * len(bits))
        loss, unseen = 0.0, 0
        for step in walk(model, data, propagate="compressed"):
            jobs: list[Job] = []
            with ctx.phase("hessians"):
                for names, hessian in observe_hessians(step, model.adapter.linears(step.block)):
                    unseen += 0 if hessian.tokens else len(names)
                    for name in names:
                        weight = weight_of(step.block.get_submodule(name))
                        jobs.append(
                            self._prepare(
                                name, weight, hessian.matrix, bits[f"{step.name}.{name}"], next(seeds)
                            )
                        )
            with ctx.phase("coding"):
                for alike in together(jobs):
                    codes = shift_add(
                        [job.weight for job in alike],
                        [job.hessian for job in alike],
                        bits=alike[0].bits,
                        tile=None if self.mode == "acc" else _LAT_COLUMNS,
                        row_blocks=[self._row_block(tuple(job.weight.shape), job.name) for job in alike],
                        rounds=self.rounds,
                        terms=self.terms,
                        percdamp=self.percdamp,
                        blocksize=self.blocksize,
                        names=[f"{step.name}.{job.name}" for job in alike],
                    )
                    for job, code in zip(alike, codes, strict=True):
                        loss += code.loss
                        replace_linear(
                            step.block,
                            job.name,
                            code.coded,
                            terms=self.terms if code.coded.bits > 1 else 0,
                            perm=code.perm,
                            column_scale=job.column_scale,
                            rotation_seed=job.rotation_seed,
                        )
        if unseen:
            ctx.warn(f"no calibration token reached {unseen} layers: they are coded without error feedback")
        counts = {str(b): list(bits.values()).count(b) for b in sorted(set(bits.values()))}
        return finished(model, {"loss": loss, "layers_by_bits": counts})

    def _prepare(self, name: str, weight: Tensor, hessian: Tensor, bits: int, seed: int) -> Job:
        """Return a layer after the steps that come before the coding, with what undoes them."""
        hessian = hessian.clone()
        column_scale, rotation_seed = None, None
        if self.mode == "acc" and bool((hessian.diagonal() > 0).any()):
            if self.rescale:
                weight, hessian, r = rescale(weight, hessian)
                column_scale = 1 / r
            if self.project:
                rotation_seed = seed
                weight, hessian = project(weight, hessian, seed)
        return Job(name, weight, hessian, bits, column_scale, rotation_seed)

    def _row_block(self, shape: tuple[int, ...], name: str) -> int:
        """Return how many output rows share scales."""
        rows, columns = shape
        whole = rows if self.group_size == -1 else self.group_size
        block = whole if self.mode == "acc" else whole // _LAT_PARTS
        if block < 1 or rows % block or (self.mode == "lat" and columns % _LAT_COLUMNS):
            raise NotApplicableError(
                f"{name} [{rows}, {columns}] cannot be cut into groups of {max(block, 1)} rows"
                + (f" by {_LAT_COLUMNS} columns" if self.mode == "lat" else ""),
                "Choose another group_size, or mode acc.",
            )
        return block

    def _allocate(self, model: LoadedModel, data: Calibration) -> dict[str, int]:
        """Return the bits of every layer by full name."""
        if self.mix_bits is None:
            return dict.fromkeys(model.adapter.targets(model.module), self.bits)
        scores: dict[str, float] = {}
        for step in walk(model, data, propagate="dense"):
            for names, hessian in observe_hessians(step, model.adapter.linears(step.block)):
                dead = hessian.matrix.diagonal() == 0
                upper, _ = inverse_factor(hessian.matrix, self.percdamp, f"{step.name}.{names[0]}", dead=dead)
                for name in names:
                    weight = weight_of(step.block.get_submodule(name))
                    scores[f"{step.name}.{name}"] = sensitivity(weight, upper.diagonal())
        return allocate_bits(scores, self.mix_bits, model.adapter)


@dataclass(frozen=True, slots=True)
class Job:
    """One layer as the coding loop sees it."""

    name: str
    weight: Tensor
    hessian: Tensor
    bits: int
    column_scale: Tensor | None
    rotation_seed: int | None


@dataclass(frozen=True, slots=True)
class Coded:
    """What :func:`shift_add` returns for one weight.

    Attributes:
        coded: binary matrices [rows, columns] in the order of ``perm``, and their scales.
        perm: int64 [columns]: coded column ``j`` is column ``perm[j]`` of the weight.
        loss: sum over all weights of the output error that each rounding adds, ``e^2 / 2``.
    """

    coded: BinaryCoded
    perm: Tensor
    loss: float

    def dequantize(self) -> Tensor:
        """Return the weight [rows, columns] in its own column order."""
        return self.coded.dequantize()[:, torch.argsort(self.perm)]


def together(jobs: Sequence[Job]) -> list[list[Job]]:
    """Return the layers in groups that can be coded in step: of one width and number of bits."""
    groups: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.weight.shape[1], job.bits), []).append(job)
    return list(groups.values())


def apot(x: Tensor, terms: int) -> Tensor:
    """Return ``x`` rounded to a sum of ``terms`` signed powers of two, each fitted to the rest before it.

    The exponent is rounded to nearest, half to even; 0 stays 0.
    """
    return torch.from_numpy(_apot(x.cpu().numpy(), terms)).to(x.device)


@np.errstate(divide="ignore")
def _apot(x: np.ndarray, terms: int) -> np.ndarray:
    total = np.zeros_like(x)
    for _ in range(terms):
        rest = x - total
        # A natural logarithm divided by ln 2, as in the authors' code: log2 differs in the last bit.
        exponent = np.rint(np.log(np.abs(rest)) / _LN_2)
        total = total + np.copysign(np.exp2(exponent), rest)
    return total


def sign_patterns(bits: int, like: Tensor) -> Tensor:
    """Return every vector of ``bits`` signs, [2^bits, bits], in the dtype of ``like``."""
    index = torch.arange(2**bits, device=like.device)[:, None] >> torch.arange(bits, device=like.device)
    return (2 * (index & 1) - 1).to(like)


def codebook(scale: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the midpoints [G, 2^b - 1] between the sums of ``+-scale`` [G, b], ascending, and the pattern
    of each sum [G, 2^b]."""
    values, order = (scale @ patterns.T).sort(dim=1)
    return (values[:, 1:] + values[:, :-1]) / 2, order


def nearest_signs(w: Tensor, scale: Tensor, patterns: Tensor) -> Tensor:
    """Return the signs [G, n, b] of the sum of ``+-scale`` [G, b] that is nearest to each of ``w`` [G, n].

    A value on the midpoint of two sums takes the larger.
    """
    middles, order = codebook(scale, patterns)
    return patterns[order.gather(1, torch.searchsorted(middles, w.contiguous(), right=True))]


def greedy_start(w: Tensor, bits: int, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales [G, b] and signs [G, n, b], one after another: signs of the rest and its mean magnitude.

    Args:
        w: [G, n]; entries beyond ``count`` [G, 1] are 0 and get sign 0.
    """
    rest, scales, signs = w, [], []
    for _ in range(bits):
        signs.append(rest.sign())
        scales.append(rest.abs().sum(1, keepdim=True) / count)
        rest = rest - scales[-1] * signs[-1]
    return torch.cat(scales, 1), torch.stack(signs, -1)


def conjugate_gradient(a: np.ndarray, c: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``x`` [G, b] after b steps of the conjugate gradient towards ``a x = c`` (a [G, b, b])."""
    rest = c - np.einsum("gij,gj->gi", a, x)
    direction = rest
    square = np.einsum("gi,gi->g", rest, rest)
    for _ in range(x.shape[1]):
        image = np.einsum("gij,gj->gi", a, direction)
        step = (square / (np.einsum("gi,gi->g", direction, image) + _CG_FLOOR))[:, None]
        x = x + step * direction
        rest = rest - step * image
        following = np.einsum("gi,gi->g", rest, rest)
        direction = rest + (following / (square + _CG_FLOOR))[:, None] * direction
        square = following
    return x


def fit(w: Tensor, bits: int, *, rounds: int, terms: int | None = 3, mask: Tensor | None = None) -> Tensor:
    """Return the scales [G, b] of groups of weights (the authors' ``quantize_shift``).

    The codes that belong to them are :func:`nearest_signs`. A codeword holds the weights of one interval, so
    that counts and sums over sorted weights stand for the codes of all of them, and a round costs no pass over
    the weights. What is left of a round are a few numbers per group: numpy spends less on each operation with
    them than torch. Each round follows from the one before alone, so that rounds end once they repeat.

    Args:
        w: fp32 [G, n], a group a row.
        terms: powers of two in a scale; None leaves scales real (plain binary coding).
        mask: [G, n], 1 for the entries of a group and 0 for padding, where ``w`` is 0; None for no padding.
    """
    count = (
        torch.full((len(w), 1), w.shape[1], device=w.device) if mask is None else mask.sum(1, keepdim=True)
    )
    start, signs = greedy_start(w, bits, count)
    if bits == 1:
        return start
    placed = w if mask is None else w.masked_fill(mask == 0, torch.inf)
    ascending = placed.sort(dim=1).values
    finite = ascending if mask is None else ascending.masked_fill(ascending == torch.inf, 0.0)
    ordered, sums = ascending.cpu().numpy(), F.pad(finite.double().cumsum(1), (1, 0)).cpu().numpy()
    gram, image = (signs.mT @ signs).cpu().numpy(), (signs.mT @ w[..., None])[..., 0].cpu().numpy()
    scale, patterns = start.cpu().numpy(), sign_patterns(bits, w).cpu().numpy()
    group = np.arange(len(ordered))[:, None]
    bounds = np.zeros((len(ordered), 2**bits + 1), dtype=np.int64)
    bounds[:, -1:] = count.cpu().numpy()
    known: dict[bytes, int] = {}
    found: list[np.ndarray] = []
    for done in range(rounds):
        scale = -np.sort(-np.abs(conjugate_gradient(gram, image, scale)), axis=1)
        if terms is not None:
            scale = _apot(scale, terms)
        values = scale @ patterns.T
        order = values.argsort(axis=1, kind="stable")
        values = values[group, order]
        middles = (values[:, 1:] + values[:, :-1]) / 2
        for row, edges, inner in zip(ordered, middles, bounds, strict=True):
            inner[1:-1] = row.searchsorted(edges)
        first = known.setdefault(scale.tobytes() + bounds.tobytes(), done)
        if first < done:
            scale = found[first + (rounds - 1 - first) % (done - first)]
            break
        found.append(scale)
        held = patterns[order]
        numbers = (bounds[:, 1:] - bounds[:, :-1]).astype(scale.dtype)
        gram = (held * numbers[..., None]).swapaxes(1, 2) @ held
        upto = sums[group, bounds]
        image = ((upto[:, 1:] - upto[:, :-1]).astype(scale.dtype)[:, None] @ held)[:, 0]
    return torch.from_numpy(scale).to(w.device)


def rescale(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight and Hessian with columns balanced, and the factors [columns] (the authors' step P1).

    ``r = (diag H / diag W^T W)^(1/4)``; the weight's columns are multiplied by r, H is divided by ``r r^T``.
    """
    hessian = hessian / hessian.abs().max()
    energy = weight.square().sum(0).clamp(min=1e-8)
    r = (hessian.diagonal().clamp(min=1e-8) / energy).sqrt().sqrt().clamp(min=1e-8)
    return weight * r, hessian / (r[:, None] * r), r


def project(weight: Tensor, hessian: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``U W V^T`` and ``V H V^T`` for two random rotations, H normalized and damped first (step P2)."""
    left, right = rotations_of(weight.shape, seed, weight.device)
    n = hessian.shape[0]
    hessian = hessian * (n / (hessian.trace() + 1e-8))
    hessian.diagonal().add_(0.01)
    hessian = right.rotate(right.rotate(hessian).T)
    return left.rotate(right.rotate(weight).T).T, (hessian + hessian.T) / 2


def shift_add(
    weights: Sequence[Tensor],
    hessians: Sequence[Tensor],
    *,
    bits: int,
    tile: int | None = None,
    row_blocks: Sequence[int] | None = None,
    rounds: int = 50,
    terms: int = 3,
    percdamp: float = 0.01,
    blocksize: int = 128,
    names: Sequence[str] = (),
) -> list[Coded]:
    """Code several weights of one width with error feedback, in step (the authors' ``fasterquant``).

    Every weight has its own Hessian and column order; they share nothing but the steps of the loop.

    Args:
        weights: fp32 [rows, columns], rows may differ.
        hessians: fp32 [columns, columns], of any positive factor.
        tile: columns that share scales; None for scales per column.
        row_blocks: rows that share scales, for each weight; None for all rows.

    Raises:
        DivergedError: a weight or a Hessian is not finite, or a Hessian cannot be factored.
    """
    names = names or [f"weight {i}" for i in range(len(weights))]
    row_blocks = row_blocks or [weight.shape[0] for weight in weights]
    columns, span = weights[0].shape[1], tile or 1
    orders, uppers, ready = [], [], []
    for weight, hessian, name in zip(weights, hessians, names, strict=True):
        require_finite(weight, name)
        dead = hessian.diagonal() == 0
        seen = not bool(dead.all())
        keys = hessian.diagonal().masked_fill(dead, 1.0).view(-1, span).sum(1)
        blocks = torch.argsort(keys, descending=True)
        order = (blocks[:, None] * span + torch.arange(span, device=weight.device)).flatten()
        orders.append(order)
        ready.append((weight.masked_fill(dead, 0.0) if seen else weight)[:, order])
        uppers.append(inverse_factor(hessian[order[:, None], order], percdamp, name, dead=dead[order])[0])
    upper = torch.stack(uppers)
    pivots = upper.diagonal(dim1=1, dim2=2)

    # One column of every weight at a time, as rows of groups that are padded to the largest group.
    layout = _Groups([weight.shape[0] for weight in weights], list(row_blocks), span, weights[0].device)
    outer = torch.zeros(len(weights), columns, layout.height, device=weights[0].device)
    for i, weight in enumerate(ready):
        outer[i, :, : weight.shape[0]] = weight.T
    patterns = sign_patterns(bits, outer)
    signs = torch.zeros(len(weights), columns, layout.height, bits, dtype=torch.bool, device=outer.device)
    scales = torch.zeros(columns // span, layout.count, bits, device=outer.device)
    loss = torch.zeros(len(weights), device=outer.device)
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        block = outer[:, start:stop].clone()
        errors = torch.empty_like(block)
        for left in range(start, stop, _PANEL):
            right = min(left + _PANEL, stop)
            for j in range(left, right):
                column = block[:, j - start]
                if j % span == 0:
                    tile_values = layout.split(block[:, j - start : j - start + span])
                    scale = fit(tile_values, bits, rounds=rounds, terms=terms, mask=layout.mask)
                    scales[j // span] = scale
                code = nearest_signs(layout.split(column[:, None]), scale, patterns)
                code = code > 0
                signs[:, j] = layout.join(code)
                value = layout.join(((2 * code - 1).to(scale) * scale[:, None]).sum(-1, keepdim=True))[..., 0]
                error = (column - value) / pivots[:, j, None]
                errors[:, j - start] = error
                block[:, j + 1 - start : right - start] -= upper[:, j, j + 1 : right, None] * error[:, None]
            block[:, right - start :] -= (
                upper[:, left:right, right:stop].mT @ errors[:, left - start : right - start]
            )
        outer[:, stop:] -= upper[:, start:stop, stop:].mT @ errors
        loss += errors.square().sum((1, 2)) / 2
    found = []
    for i, weight in enumerate(weights):
        rows = weight.shape[0]
        coded = BinaryCoded(
            signs[i, :, :rows].permute(2, 1, 0).contiguous(),
            scales[:, layout.first[i] : layout.first[i + 1]].transpose(0, 1).contiguous(),
        )
        found.append(Coded(coded, orders[i], float(loss[i])))
    return found


class _Groups:
    """How columns of several weights, padded to one height, become rows of groups and back."""

    def __init__(self, rows: list[int], row_blocks: list[int], span: int, device: torch.device) -> None:
        counts = [height // block for height, block in zip(rows, row_blocks, strict=True)]
        self.height = max(rows)
        self.count = sum(counts)
        self.first = [0, *itertools.accumulate(counts)]
        self._blocks = row_blocks
        widest = max(row_blocks)
        self._widest = widest
        self._plain = len(set(rows)) == 1 and len(set(row_blocks)) == 1
        inside = torch.zeros(self.count, widest, device=device)
        index = torch.zeros(self.count, widest, dtype=torch.long, device=device)
        for i, block in enumerate(row_blocks):
            at = slice(self.first[i], self.first[i + 1])
            inside[at, :block] = 1
            index[at, :block] = i * self.height + torch.arange(counts[i] * block, device=device).view(
                -1, block
            )
        self._index = index
        self._inside = inside
        self._back = torch.nonzero(inside.flatten()).flatten()
        self._into = index.flatten()[self._back]
        self._total = len(rows) * self.height
        self._weights = len(rows)
        self.mask = None if self._plain else inside.repeat_interleave(span, 1)

    def split(self, values: Tensor) -> Tensor:
        """Return ``values`` [weights, columns, height] as groups [G, rows * columns], padding zero."""
        flat = values.transpose(1, 2).reshape(self._total, -1)
        if self._plain:
            return flat.reshape(self.count, -1)
        return (flat[self._index] * self._inside[..., None]).flatten(1)

    def join(self, groups: Tensor) -> Tensor:
        """Return ``groups`` [G, rows, k] of single columns as [weights, height, k]."""
        flat = groups.reshape(self.count * self._widest, -1)
        if self._plain:
            return flat.view(self._weights, self.height, -1)
        out = flat.new_zeros(self._total, flat.shape[1])
        out[self._into] = flat[self._back]
        return out.view(self._weights, self.height, -1)


def sensitivity(weight: Tensor, pivots: Tensor) -> float:
    """Return a layer's score ``|| |W| / diag U ||_F * std(W / diag U)^2`` (section 4.3; unbiased variance)."""
    scaled = weight / pivots
    return float(scaled.norm() * scaled.std().square())


def allocate_bits(
    scores: dict[str, float], shares: tuple[float, float, float], adapter: Adapter
) -> dict[str, int]:
    """Return 1, 2 or 3 bits per layer: the least sensitive layers get the fewest (the authors' script).

    The two layers of a plain feed-forward network stand four times in the ranking, for their size.
    """
    ranked = sorted(
        (name for name in scores for _ in range(4 if adapter.role(name) in ("fc1", "fc2") else 1)),
        key=scores.__getitem__,
    )
    limits = list(itertools.accumulate(share * len(ranked) for share in shares))
    return {name: min(3, 1 + bisect.bisect_right(limits, i)) for i, name in enumerate(ranked)}
