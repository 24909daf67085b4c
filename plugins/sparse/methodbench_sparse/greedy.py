"""Block-wise greedy allocation of activation sparsity to the Linears of a block.

Liu et al., "Training-Free Activation Sparsity in Large Language Models", ICLR 2025, arXiv 2408.14690, algorithm 1;
authors' code FasterDecoding/TEAL. WINA uses the same search on its own scores.

With w_p the share of the block's weights in Linear p, all sparsities s_p start at 0. While sum_p w_p s_p is below
the target, each s_p is tried one step further, and the one whose step moves the block's output least is taken.
Steps are wider for smaller Linears, so that each step spares as many weights::

    step_p = step / w_p       error = mean over sequences, channels of || (B(x) - B_s(x))[last tokens] ||_2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.torchkit.activation_sparsity import SparseInput
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sequential import walk


@dataclass(frozen=True, slots=True)
class GreedyRow:
    """One step of the search: model-level sparsity of the block, its error, and the sparsity of each Linear."""

    effective: float
    error: float
    levels: Mapping[str, float]


def greedy_rows(
    run: Callable[[Mapping[str, float]], Sequence[Tensor]],
    dense: Sequence[Tensor],
    weights: Mapping[str, float],
    target: float,
    base_step: float,
    last_fraction: float,
) -> list[GreedyRow]:
    """Return the steps of the search until the block's sparsity reaches ``target``.

    Args:
        run: block outputs, [sequences, tokens, channels] each, at given sparsities of its Linears.
        dense: the outputs to stay near to.
        weights: relative sizes of the Linears; the smallest step, of the largest Linear, is ``base_step`` over its
            size. A sparsity may be stepped beyond 1, from where it goes no further.
        last_fraction: share of the tokens, from the end, on which the error is taken.
    """
    total = sum(weights.values())
    levels = dict.fromkeys(weights, 0.0)
    rows: list[GreedyRow] = []
    effective = 0.0
    while effective < target:
        tried = {}
        for name, weight in weights.items():
            if levels[name] < 1:
                trial = {**levels, name: levels[name] + base_step / weight}
                tried[name] = output_error(run(trial), dense, last_fraction), trial
        if not tried:
            break
        error, levels = min(tried.values(), key=lambda found: found[0])
        effective = sum(weights[name] * level for name, level in levels.items()) / total
        rows.append(GreedyRow(effective, error, levels))
    return rows


def nearest_row(rows: Sequence[GreedyRow], target: float) -> Mapping[str, float]:
    """Return the sparsities of the step whose model-level sparsity is nearest to ``target``."""
    return min(rows, key=lambda row: abs(row.effective - target)).levels


def output_error(outputs: Sequence[Tensor], dense: Sequence[Tensor], last_fraction: float) -> float:
    """Return the error of ``outputs`` against ``dense``, [sequences, tokens, channels] each; see the module."""
    norms = []
    for got, wanted in zip(outputs, dense, strict=True):
        last = max(1, int(wanted.shape[1] * last_fraction))
        norms.append(torch.linalg.vector_norm((wanted - got)[:, -last:], dim=1).flatten())
    return float(torch.cat(norms).mean())


def allocate(
    model: LoadedModel,
    sparse: LoadedModel,
    data: Calibration,
    thresholds: Mapping[str, Callable[[float], float]],
    target: float,
    *,
    base_step: float,
    last_fraction: float,
    ctx: Context,
) -> dict[str, float]:
    """Return a sparsity for each Linear, found block by block on dense block inputs.

    Args:
        sparse: a clone of ``model`` with a :class:`Threshold` rule in front of every Linear of ``thresholds``; the
            rules are changed.
        thresholds: full name of a Linear -> its threshold at a sparsity.
        base_step: step of a Linear as large as the smallest one of its block.
    """
    levels: dict[str, float] = {}
    for step in walk(model, data, propagate="dense"):
        prefix = f"{step.name}."
        names = [name for name in thresholds if name.startswith(prefix)]
        layers: dict[str, SparseInput] = {name: _layer(sparse, name) for name in names}
        sizes = {name: layer.weight.numel() for name, layer in layers.items()}
        smallest = min(sizes.values())
        block = replace(step, block=sparse.module.get_submodule(step.name))

        def run(
            trial: Mapping[str, float],
            layers: Mapping[str, SparseInput] = layers,
            block: object = block,
        ) -> Sequence[Tensor]:
            for name, layer in layers.items():
                layer.rule.register_buffer("threshold", torch.as_tensor(thresholds[name](trial[name])))
            return block.forward()  # type: ignore[attr-defined]

        weights = {name: size / smallest for name, size in sizes.items()}
        with ctx.phase("search"):
            rows = greedy_rows(run, step.forward(), weights, target, base_step, last_fraction)
        levels |= {name: min(level, 1.0) for name, level in nearest_row(rows, target).items()}
    return levels


def _layer(model: LoadedModel, name: str) -> SparseInput:
    layer = model.module.get_submodule(name)
    assert isinstance(layer, SparseInput)
    return layer
