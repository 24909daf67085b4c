"""AWQ: activation-aware weight quantization for LLM compression and acceleration (Lin et al., MLSys 2024).

Few input channels carry large activations, and rounding their weights hurts most. Multiplying those columns
before rounding makes their error relatively smaller; the inverse factor is folded into the layer before, so
the model's function stays. With ``Q`` round to nearest by groups and ``|x|`` the mean magnitude of an input
channel, the scale of a set of Linears that read one input is the best of ``n_grid`` candidates, and large
weights of each group are clipped by the best of a few thresholds::

    s(r) = max(|x|^r, 1e-4) / sqrt(max s * min s),  r = 0, 1/n, ..., 1 - 1/n
    r* = argmin || f(x; W) - f(x; Q(W diag(s)) diag(s)^-1) ||^2
    m* = argmin || x (Q(clamp(W, -m, m)) - W)^T ||^2

``f`` is the module that the set works in (attention, feed-forward) or the Linear itself. Blocks see the
inputs of the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import ScaleGroup
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import find_grid, groups_of, quantize
from methodbench.torchkit.sequential import walk
from methodbench_quant.llm.calls import (
    Recorder,
    count,
    output_of,
    require_finite_inputs,
    sample_tokens,
    squared_error,
    subset,
)
from methodbench_quant.llm.layers import apply_scale, finished, open_copy, replace_linear, weight_of
from methodbench_quant.llm.settings import ActivationSettings, Bits, GroupSize, check_group_size

#: Output rows per step of the clip search: bounds memory, and has no effect on the result.
_CLIP_ROWS = 512

#: Smallest scale before normalization, so that silent channels do not get none.
_LEAST_SCALE = 1e-4


@hyperparameters
class AWQ(ActivationSettings):
    """Scales, clips and rounds the weights of every Linear in the blocks; embeddings and head stay as they
    are."""

    bits: Bits = 4
    group_size: GroupSize = 128
    auto_scale: Annotated[bool, Field(description="search a scale per input channel")] = True
    n_grid: Annotated[int, Field(ge=1, le=1000, description="exponents tried in the scale search")] = 20
    search_tokens: Annotated[
        int,
        Field(
            ge=0, description="calibration tokens that judge a scale; 0 for all of them, as the authors do"
        ),
    ] = 1024
    clip: Annotated[bool, Field(description="search a clipping threshold per group")] = True
    clip_grid: Annotated[
        int, Field(ge=1, le=1000, description="steps of the clip search from 1 down to 0")
    ] = 20
    max_shrink: Annotated[float, Field(gt=0, le=1, description="share of those steps that are tried")] = 0.5
    clip_tokens: Annotated[int, Field(ge=1, description="calibration tokens that judge a threshold")] = 512

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        if int(self.clip_grid * self.max_shrink) < 1:
            raise ValueError("clip_grid * max_shrink must be 1 or more: no threshold would be tried")
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
        ratios: dict[str, float] = {}
        unseen: list[str] = []
        recorder = Recorder(model.adapter)
        for step in walk(
            model, data, propagate="dense", batch_size=self._batch_size(data), observe=recorder.watch
        ):
            recorder.stop()
            with ctx.phase("search"):
                searches = self.search_scales(step.block, recorder) if self.auto_scale else {}
                for group, search in searches.items():
                    apply_scale(step.block, group, search.scale)
                    ratios[f"{step.name}.{group.linears[0]}"] = search.ratio
                thresholds = self.search_clips(step.block, recorder, searches) if self.clip else {}
            for name in list(model.adapter.linears(step.block)):
                weight = weight_of(step.block.get_submodule(name))
                if name in thresholds:
                    weight = clamp_groups(weight, thresholds[name])
                full_name = f"{step.name}.{name}"
                quantized = quantize(weight, self.bits, group_size=self.group_size, name=full_name)
                replace_linear(step.block, name, quantized)
                if name not in recorder.inputs:
                    unseen.append(full_name)
        if unseen:
            ctx.warn(
                f"no calibration token reached {len(unseen)} layers (first: {unseen[0]}): not calibrated"
            )
        return finished(model, {"ratios": ratios, **self.quantize_activations(model)})

    def search_scales(self, block: nn.Module, recorder: Recorder) -> dict[ScaleGroup, ScaleSearch]:
        """Return the best scale of every set of Linears of ``block``, all found with its original weights."""
        found = {}
        for group in recorder.adapter.scale_groups(block):
            source = recorder.source(group)
            if not source:
                continue
            flat = [x.float().flatten(0, -2) for x in source]
            saliency = torch.stack([x.abs().sum(0) for x in flat]).sum(0) / sum(len(x) for x in flat)
            loss = self._loss(block, group, recorder)
            found[group] = search_scale(saliency, loss, self.n_grid, name=group.linears[0])
        return found

    def search_clips(
        self, block: nn.Module, recorder: Recorder, searches: Mapping[ScaleGroup, ScaleSearch]
    ) -> dict[str, Tensor]:
        """Return the clipping thresholds [out, groups, 1] of the Linears of the scaled ``block``.

        Query and key are left out: their outputs meet in a product, which the error of one does not describe.
        """
        found = {}
        for name, layer in recorder.adapter.linears(block).items():
            if name not in recorder.inputs or recorder.adapter.role(name) in ("q", "k", "qkv"):
                continue
            x = sample_tokens(recorder.inputs[name], self.clip_tokens)
            for group, search in searches.items():
                if name in group.linears:
                    x = x / search.scale
            require_finite_inputs(x, name)
            steps = int(self.clip_grid * self.max_shrink)
            ratios = [1 - i / self.clip_grid for i in range(steps)]
            found[name] = clip_thresholds(weight_of(layer), x, ratios, self.bits, self.group_size)
        return found

    def _loss(self, block: nn.Module, group: ScaleGroup, recorder: Recorder) -> Callable[[Tensor], float]:
        """Return the function from a scale to the error of the inspected output."""
        targets = recorder.adapter.linears(block)
        weights = {name: weight_of(targets[name]) for name in group.linears if name in targets}

        def rounded(weight: Tensor, scale: Tensor) -> Tensor:
            return round_to_nearest(weight * scale, self.bits, self.group_size).div_(scale)

        if group.inspect:
            module = block.get_submodule(group.inspect)
            calls = subset(recorder.calls[group.inspect], lambda call: count(call.hidden), self.search_tokens)
            dense = [output_of(module, call) for call in calls]
            dtype, prefix = dense[0].dtype, f"{group.inspect}."

            def module_loss(scale: Tensor) -> float:
                changed = {
                    f"{name.removeprefix(prefix)}.weight": rounded(weight, scale).to(dtype)
                    for name, weight in weights.items()
                }
                error = sum(
                    float((before - output_of(module, call, changed)).float().square().sum())
                    for before, call in zip(dense, calls, strict=True)
                )
                return error / sum(before.numel() for before in dense)

            return module_loss

        errors = {}
        for name in weights:
            parts = subset(recorder.inputs[name], count, self.search_tokens)
            x = torch.cat([part.float().flatten(0, -2) for part in parts])
            errors[name] = squared_error(x[None] / math.sqrt(len(x)))

        def linear_loss(scale: Tensor) -> float:
            losses = [
                float(errors[name]((rounded(weight, scale) - weight)[None]).mean())
                for name, weight in weights.items()
            ]
            return sum(losses) / len(losses)

        return linear_loss

    def _batch_size(self, data: Calibration) -> int | None:
        """Return how many sequences the scale search takes at once; None for images."""
        if data.inputs.ndim != 2:
            return None
        return max(1, min(2048, self.search_tokens or 2048) // data.inputs.shape[1])


@dataclass(frozen=True, slots=True)
class ScaleSearch:
    """The best scale [in] of a set of Linears, its exponent, and the loss of every candidate."""

    scale: Tensor
    ratio: float
    losses: tuple[float, ...]


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Return ``Q(weight)``, fp32 [out, in]: asymmetric rounding by groups (the convention ``awq_asym``)."""
    grouped = groups_of(weight, group_size)
    return find_grid(grouped, bits, "awq_asym").snap(grouped).flatten(1)


def candidate_scale(saliency: Tensor, ratio: float) -> Tensor:
    """Return ``s(r)`` [in] from the mean magnitudes of the input channels [in] (section 3.2)."""
    scale = saliency.pow(ratio).clamp_(min=_LEAST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    saliency: Tensor, loss: Callable[[Tensor], float], n_grid: int, name: str = "the layer"
) -> ScaleSearch:
    """Return the candidate of strictly least loss among the exponents ``0, 1/n, ..., 1 - 1/n``.

    Exponent 0 is the scale 1: plain rounding is among the candidates.

    Raises:
        DivergedError: no candidate has a finite loss.
    """
    candidates = [candidate_scale(saliency, k / n_grid) for k in range(n_grid)]
    losses = tuple(loss(scale) for scale in candidates)
    finite = [k for k in range(n_grid) if math.isfinite(losses[k])]
    if not finite:
        raise DivergedError(
            f"no scale of {name} has a finite error: its inputs or weights hold NaN or infinity"
        )
    best = min(finite, key=losses.__getitem__)
    return ScaleSearch(candidates[best], best / n_grid, losses)


def clip_thresholds(weight: Tensor, x: Tensor, ratios: Sequence[float], bits: int, group_size: int) -> Tensor:
    """Return the threshold of each group whose clipping, followed by rounding, hurts the output least.

    Args:
        weight: fp32 [out, in].
        x: inputs [tokens, in].
        ratios: candidates, as shares of the largest magnitude in a group; the first of equal errors wins.

    Returns:
        fp32 [out, groups, 1].
    """
    grouped = groups_of(weight, group_size)
    error_of = squared_error(groups_of(x.float(), group_size).transpose(0, 1))
    found = []
    for w in grouped.split(_CLIP_ROWS):
        largest = w.abs().amax(-1, keepdim=True)
        best, least = largest, torch.full_like(largest, torch.inf)
        for ratio in ratios:
            limit = largest * ratio
            clipped = torch.clamp(w, -limit, limit)
            delta = find_grid(clipped, bits, "awq_asym").snap(clipped).sub_(w).transpose(0, 1)
            error = error_of(delta).transpose(0, 1).unsqueeze(-1)
            better = error < least
            best, least = torch.where(better, limit, best), torch.where(better, error, least)
        found.append(best)
    return torch.cat(found)


def clamp_groups(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return ``weight`` [out, in] limited to ``threshold`` [out, groups, 1] in magnitude."""
    grouped = weight.unflatten(1, (threshold.shape[1], -1))
    return torch.clamp(grouped, -threshold, threshold).flatten(1)
