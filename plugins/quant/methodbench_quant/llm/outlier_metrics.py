"""Outlier metrics: how large a language model's outliers are, and where they sit.

Three kinds of outliers from An et al., "Systematic Outliers in Large Language Models", ICLR 2025 (2502.06415);
massive activations from Sun et al., COLM 2024 (2402.17762), with the curve that Gallego-Feliciano et al. fit to
their growth over training (2508.03616); kurtosis from Park et al., "Outlier-Safe Pre-Training" (2506.19697).
For a layer's output ``F`` [T, C], a weight ``W`` [out, in] and attention probabilities ``P`` [H, T, T]::

    outlier token t:      max_c |F_tc| > 1000 mean |F|
    massive activation:   |F_tc| > 100 and |F_tc| > 1000 median |F|;  ratio = max |F| / median |F|
    column ratio of W:    max_o |W_oc| / (mean_o |W_oc| + 1e-8)
    outlier key k:        sum_q mean_h P_hqk >= T / 10
    excess kurtosis:      mean over tokens of max(0, mean_c x^4 / std_c(x)^4 - 3)
    over training:        y(t) = A exp(-lambda x) log x + K,  x = gamma t + t0

The curve's formula is known from the paper's text alone; the recipe of its fit is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, cast

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import curve_fit
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.llm.layers import weight_of

#: Tokens that end or join clauses, and words of little meaning (An et al., section 3).
DELIMITERS = frozenset(".,;:!?\n-\"'()[]{}/\\|_=+*&^%$#@~`<>")
WEAK_WORDS = frozenset(
    "and from of the a an in on at for with is was are were to by as that this it but or if not".split()  # noqa: SIM905
) | frozenset(["", *"123456789"])
CATEGORIES = ("initial", "delimiter", "weak", "other")


@hyperparameters
class OutlierMetrics:
    """Measures activations, weights and attention; changes nothing."""

    act_eta: Annotated[
        float, Field(gt=0, description="an outlier token exceeds this many times the mean magnitude")
    ] = 1000.0
    massive_abs: Annotated[float, Field(ge=0, description="least magnitude of a massive activation")] = 100.0
    massive_ratio: Annotated[
        float, Field(gt=0, description="a massive activation exceeds this many times the median")
    ] = 1000.0
    attention_fraction: Annotated[
        float, Field(gt=0, le=1, description="share of all attention that makes a key an outlier")
    ] = 0.1
    eps: Annotated[float, Field(gt=0, description="added to means of weight columns")] = 1e-8
    token_layer: Annotated[int, Field(ge=0, description="block whose outlier tokens are sorted by kind")] = 1
    attention_layer: Annotated[int, Field(ge=0, description="block whose attention outliers are counted")] = 3
    sequences: Annotated[int, Field(ge=1, description="sequences that are measured")] = 8

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        """Return scalars by name, and arrays with one number per block.

        Raises:
            NotApplicableError: ``data`` holds no token ids, or the model's blocks are not known.
        """
        if not len(data) or data.inputs.ndim != 2:
            raise NotApplicableError("outlier metrics are measured on token ids, and there are none")
        blocks = len(model.adapter.block_names(model.module))
        token_layer, attention_layer = (
            min(self.token_layer, blocks - 1),
            min(self.attention_layer, blocks - 1),
        )
        ids = data.inputs[: self.sequences]
        names = [[_token(model.tokenizer, int(token)) for token in row] for row in ids]
        sums = _Sums()
        with ctx.phase("activations"), torch.no_grad():
            for row, tokens in zip(ids, names, strict=True):
                seen = watch(model, row[None])
                sums.add(self._sequence(seen, tokens, token_layer, attention_layer))
        if "attention-top1" not in sums.values:
            ctx.warn("the model gives no attention probabilities: attention outliers are left out")
        with ctx.phase("weights"):
            weights = self._weights(model)
        measured: dict[str, np.ndarray | float] = {**sums.means(), **weights}
        ratios = np.asarray(measured["ratio-by-layer"])
        # The first number is the one that a board shows first.
        return {
            "kurtosis": measured.pop("kurtosis"),
            "massive-ratio": float(ratios.max()),
            "massive-layer": float(ratios.argmax()),
            **measured,
        }

    def _sequence(
        self, seen: Seen, tokens: Sequence[str], token_layer: int, attention_layer: int
    ) -> dict[str, np.ndarray | float]:
        """Return the numbers of one sequence."""
        outputs, downs = seen.outputs, seen.down_inputs
        outlying = [token_outliers(x[0], self.act_eta) for x in outputs]
        kinds = [token_category(i, token) for i, token in enumerate(tokens)]
        chosen = outlying[token_layer].tolist()
        found: dict[str, np.ndarray | float] = {
            "kurtosis": float(np.mean([excess_kurtosis(x) for x in seen.hidden])),
            "ratio-by-layer": np.array([top_to_median(x) for x in outputs]),
            "top1-by-layer": np.array([float(x.abs().max()) for x in outputs]),
            "median-by-layer": np.array([float(x.abs().median()) for x in outputs]),
            "kurtosis-by-layer": np.array([excess_kurtosis(x) for x in seen.hidden]),
            "outlier-tokens-by-layer": np.array([float(mask.sum()) for mask in outlying]),
            "top1-to-mean": max(float(x.abs().max() / x.abs().mean()) for x in outputs),
            "massive-activations": float(
                sum(int(massive(x, self.massive_abs, self.massive_ratio).sum()) for x in outputs)
            ),
        }
        for category in CATEGORIES:
            found[f"outlier-tokens-{category}"] = float(
                sum(kind == category and hit for kind, hit in zip(kinds, chosen, strict=True))
            )
        if downs:
            found["down-ratio-by-layer"] = np.array([top_to_median(x) for x in downs])
        if seen.attention:
            keys = [attention_received(p[0]) for p in seen.attention]
            top = keys[attention_layer].topk(min(2, len(tokens))).values
            limit = self.attention_fraction * len(tokens)
            found |= {
                "attention-top1": float(top[0]),
                "attention-top2": float(top[-1]),
                "attention-median": float(np.median(keys[attention_layer].numpy())),
                "attention-outlier-keys": float((keys[attention_layer] >= limit).sum()),
                "attention-on-first-by-layer": np.array([float(k[0]) / len(tokens) for k in keys]),
            }
        return found

    def _weights(self, model: LoadedModel) -> dict[str, np.ndarray | float]:
        """Return the ratios of the weights' columns and rows."""
        down, extremes = [], []
        for name, layer in model.adapter.targets(model.module).items():
            weight = weight_of(layer)
            extremes.append(row_or_column_ratio(weight, self.eps))
            if model.adapter.role(name) in ("down", "fc2"):
                down.append(column_ratios(weight, self.eps))
        found: dict[str, np.ndarray | float] = {"weight-ratio-max": max(extremes)}
        if down:
            found["down-column-ratio"] = max(float(ratios.max()) for ratios in down)
            found["down-column-ratio-median"] = float(np.median([float(r.median()) for r in down]))
            found["down-column-ratio-by-layer"] = np.array([float(ratios.max()) for ratios in down])
        return found


class _Sums:
    """Means of numbers and arrays by name."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray | float] = {}
        self._count = 0

    def add(self, found: Mapping[str, np.ndarray | float]) -> None:
        self._count += 1
        for name, value in found.items():
            self.values[name] = self.values[name] + value if name in self.values else value

    def means(self) -> dict[str, np.ndarray | float]:
        return {name: value / self._count for name, value in self.values.items()}


@dataclass(slots=True)
class Seen:
    """What one forward pass showed, fp32."""

    hidden: list[Tensor]
    """[B, T, C]: what enters the first block, leaves every block but the last, and leaves the final norm."""
    outputs: list[Tensor]
    """[B, T, C]: what leaves every block."""
    down_inputs: list[Tensor]
    """[B, T, width]: what enters the last layer of every feed-forward network (not of experts)."""
    attention: list[Tensor]
    """[B, heads, T, T] of every block; empty where the model gives no probabilities."""


@torch.no_grad()
def watch(model: LoadedModel, ids: Tensor) -> Seen:
    """Run ``ids`` [B, T] through ``model`` and return what its blocks saw."""
    module = model.clone().module
    if hasattr(module, "set_attn_implementation"):
        # Fused kernels keep no probabilities. The configuration is the clone's own.
        cast(Any, module).set_attn_implementation("eager")
    seen = Seen([], [], [], [])
    normed: list[Tensor] = []
    blocks = model.adapter.blocks(module)
    with ExitStack() as hooks:

        def keep(target: nn.Module, into: list[Tensor], *, before: bool = False) -> None:
            def read(value: Any) -> None:
                tensor = value[0] if isinstance(value, tuple) else value
                into.append(tensor.detach().float())

            if before:
                hooks.callback(
                    target.register_forward_pre_hook(
                        lambda _, args, kwargs: read(args or tuple(kwargs.values())), with_kwargs=True
                    ).remove
                )
            else:
                hooks.callback(target.register_forward_hook(lambda _m, _a, output: read(output)).remove)

        keep(blocks[0], seen.hidden, before=True)
        for block in blocks:
            keep(block, seen.outputs)
            down = [n for n in model.adapter.linears(block) if model.adapter.role(n) in ("down", "fc2")]
            if len(down) == 1:
                keep(block.get_submodule(down[0]), seen.down_inputs, before=True)
        norm = model.adapter.final_norm(module)
        if norm is not None:
            keep(norm, normed)
        output = module(ids.to(next(module.parameters()).device), use_cache=False, output_attentions=True)
    seen.hidden += [*seen.outputs[:-1], *(normed or seen.outputs[-1:])]
    given = getattr(output, "attentions", None) or ()
    seen.attention = [p.detach().float().cpu() for p in given if p is not None]
    return seen


def token_outliers(x: Tensor, eta: float = 1000.0) -> Tensor:
    """Return which tokens of ``x`` [T, C] hold a magnitude above ``eta`` times the mean of all: bool [T]."""
    magnitude = x.abs()
    return magnitude.amax(-1) > eta * magnitude.mean()


def token_category(position: int, token: str) -> str:
    """Return the kind of a token, one of :data:`CATEGORIES`, by its place and its text."""
    if position == 0:
        return "initial"
    stripped = token.strip(" ")
    if stripped in DELIMITERS and stripped:
        return "delimiter"
    return "weak" if stripped.lower() in WEAK_WORDS else "other"


def _token(tokenizer: Any, token: int) -> str:
    return "?" if tokenizer is None else str(tokenizer.decode([token]))


def largest(x: Tensor, count: int = 3) -> Tensor:
    """Return the largest magnitudes of ``x``, descending [count]."""
    return x.abs().flatten().topk(count).values


def top_channels(x: Tensor, count: int = 2) -> Tensor:
    """Return the channels of ``x`` [..., T, C] with the largest magnitudes over tokens, [..., count]."""
    return x.abs().amax(-2).topk(count, dim=-1).indices


def top_to_median(x: Tensor) -> float:
    """Return ``max |x| / median |x|``; the median of an even count is the lower of the two in the middle."""
    magnitude = x.abs()
    return float(magnitude.max() / magnitude.median())


def massive(x: Tensor, least: float = 100.0, times: float = 1000.0) -> Tensor:
    """Return which entries of ``x`` exceed both ``least`` and ``times`` the median magnitude, bool."""
    magnitude = x.abs()
    return (magnitude > least) & (magnitude > times * magnitude.median())


def column_ratios(weight: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the largest magnitude of each column of ``weight`` [out, in] over the column's mean, [in]."""
    magnitude = weight.abs()
    return magnitude.amax(0) / (magnitude.mean(0) + eps)


def row_or_column_ratio(weight: Tensor, eps: float = 1e-8) -> float:
    """Return the largest of :func:`column_ratios` of ``weight`` and of its transpose."""
    return max(float(column_ratios(weight, eps).max()), float(column_ratios(weight.T, eps).max()))


def attention_received(probabilities: Tensor) -> Tensor:
    """Return what every key receives from all queries, heads averaged: [T] for [heads, T, T]."""
    return probabilities.mean(0).sum(0)


def excess_kurtosis(x: Tensor) -> float:
    """Return the mean over tokens of ``max(0, mean x^4 / std^4 - 3)`` for ``x`` [..., C].

    As in the authors' script the fourth moment is not centred, while the (unbiased) deviation is.
    """
    x = x.float()
    kurtosis = x.pow(4).mean(-1) / x.std(-1).pow(4) - 3
    return float(kurtosis.clamp(min=0).mean())


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """``y(t) = amplitude exp(-decay x) log x + steady`` with ``x = rate t + offset``, and how well it fits."""

    amplitude: float
    decay: float
    rate: float
    offset: float
    steady: float
    r2: float = float("nan")

    @property
    def parameters(self) -> tuple[float, float, float, float, float]:
        """The five numbers in the order of the fit."""
        return self.amplitude, self.decay, self.rate, self.offset, self.steady

    def __call__(self, t: np.ndarray) -> np.ndarray:
        """Return the curve at steps ``t``, in thousands."""
        return _curve(np.asarray(t, dtype=np.float64), *self.parameters)


def fit_training_curve(t: np.ndarray, y: np.ndarray) -> TrainingCurve:
    """Fit the five parameters to a model's massive-activation ratio over its training.

    Parameters trade off against each other: compare curves, not parameters.

    Args:
        t: steps in thousands [checkpoints], ascending, at least five.
        y: largest magnitude over median (:func:`top_to_median`) of one layer at these steps.

    Raises:
        ValueError: fewer points than parameters, or points that are not finite.
    """
    t, y = np.asarray(t, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(t) < 5 or t.shape != y.shape or not (np.isfinite(t).all() and np.isfinite(y).all()):
        raise ValueError("the curve has five parameters: give at least five finite points")
    start = [max(float(y.max() - y[-1]), 0.0), 0.05, 1.0, 1.0, float(y[-1])]
    bounds = ([0, 1e-8, 1e-6, 1e-3, -np.inf], [np.inf, 10, 1e3, 1e3, np.inf])
    found, _ = curve_fit(_curve, t, y, p0=start, bounds=bounds, method="trf", maxfev=100_000)
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - _curve(t, *found)) ** 2).sum())
    a, decay, rate, offset, steady = map(float, found)
    return TrainingCurve(a, decay, rate, offset, steady, 1 - rest / spread if spread else float(rest == 0))


def _curve(t: np.ndarray, a: float, decay: float, rate: float, offset: float, steady: float) -> np.ndarray:
    x = rate * t + offset
    return a * np.exp(-decay * x) * np.log(x) + steady
