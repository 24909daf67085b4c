"""Small-scale proxies for large-scale Transformer training instabilities (Wortsman et al., ICLR 2024,
arXiv 2309.14322).

What breaks large Transformers at their best learning rate, growing attention logits and drifting output logits,
breaks small ones at higher rates. The learning-rate sensitivity says how much a training loses over a range of
rates H, with ℓ* the lowest final loss and ℓ0 the loss at initialization, which a diverged training counts as:

    S = mean over η in H of  min(ℓ(η), ℓ0) - ℓ*

The range is part of the number. The paper trains on C4 for 1e5 steps; here it is characters, two blocks of width 64
and a few hundred steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, Scores
from methodbench_optim.workloads.characters import Characters, TextName, read_text

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel


@hyperparameters
class SmallScaleProxies:
    """Train a small decoder at every rate of a range. Unit: the range.

    Scores: ``lr-sensitivity`` S in nats; ``best-loss``, the lowest final validation loss ℓ*; ``largest-stable-lr``,
    the largest rate that ends more than ``margin`` nats below the loss at initialization, 0 if none does. Series, one
    point per rate: ``final-loss``, ``attention-logit`` (the largest after training) and ``log-normalizer`` (the mean
    logarithm of the softmax's normalizer after training); NaN where a training diverged.
    """

    rates: Annotated[
        tuple[float, ...], Field(min_length=2, description="peak rates, three per decade in the paper")
    ] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    text: Annotated[TextName, Field(description="what is read")] = "pydoc"
    width: Annotated[int, Field(ge=8, le=1024, description="of the decoder")] = 64
    depth: Annotated[int, Field(ge=1, le=16, description="blocks")] = 2
    qk_norm: Annotated[bool, Field(description="normalize queries and keys per head")] = True
    z_loss: Annotated[float, Field(ge=0, description="weight of the squared log-normalizer")] = 1e-4
    base_fan_in: Annotated[
        int, Field(ge=0, description="fan-in at which rates are as configured (muParam); 0 for all alike")
    ] = 0
    steps: Annotated[int, Field(ge=2, description="optimizer steps of one training")] = 100
    batch_size: Annotated[int, Field(ge=1, description="windows of one step")] = 8
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps with a rising rate")] = 0.05
    lowest_rate: Annotated[float, Field(ge=0, description="rate at the end of the cosine")] = 1e-5
    margin: Annotated[float, Field(ge=0, description="nats below the start that count as trained")] = 1.0

    def evaluate(self, method: OptimizerMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train once per rate, all from one initialization and on the same windows.

        Raises:
            NotApplicableError: the method has no learning rate.
        """
        if not hasattr(method, "lr"):
            raise NotApplicableError("the method has no learning rate to be sensitive to")
        text = read_text(self.text)
        task = Characters(
            text=self.text,
            width=self.width,
            depth=self.depth,
            qk_norm=self.qk_norm,
            z_loss=self.z_loss,
            base_fan_in=self.base_fan_in,
            steps=self.steps,
            batch_size=self.batch_size,
            evaluate_every=self.steps,
        )
        held = text.windows("validation", task, ctx)[:, :-1]
        rising = round(self.steps * self.warmup)
        finals, logits, normalizers = [], [], []
        at_start = math.nan
        for peak in self.rates:
            shape = [
                rate_at(step, self.steps, rising, peak, min(self.lowest_rate, peak)) / peak
                for step in range(self.steps + 1)
            ]
            with ctx.phase("train"):
                candidate = dataclasses.replace(method, lr=peak)  # type: ignore[type-var]
                course = task.train(candidate, text, ctx, share=shape.__getitem__)
            at_start = course.looks[0].loss
            finals.append(course.final_loss)
            trained = math.isfinite(course.final_loss)
            with torch.no_grad():
                log_z = course.module(held).float().logsumexp(-1).mean()
            normalizers.append(float(log_z) if trained else math.nan)
            logits.append(course.module.largest_attention_logit(held) if trained else math.nan)  # type: ignore[operator]
        stable = [
            rate for rate, loss in zip(self.rates, finals, strict=True) if loss < at_start - self.margin
        ]
        return Evaluation(
            scores={
                "lr-sensitivity": Scores(np.array([lr_sensitivity(finals, at_start)])),
                "best-loss": Scores(np.array([min(finals)])),
                "largest-stable-lr": Scores(np.array([max(stable, default=0.0)])),
            },
            series={
                "final-loss": np.array([loss if math.isfinite(loss) else math.nan for loss in finals]),
                "attention-logit": np.array(logits),
                "log-normalizer": np.array(normalizers),
            },
            facts={
                "rates": list(self.rates),
                "best_rate": self.rates[int(np.argmin(finals))],
                "loss_at_initialization": at_start,
                "diverged_rates": [
                    rate for rate, loss in zip(self.rates, finals, strict=True) if not math.isfinite(loss)
                ],
                "text_sha256": text.sha256,
                **course.facts(),
            },
        )


def lr_sensitivity(losses: Sequence[float] | np.ndarray, loss_at_start: float) -> float:
    """Return the learning-rate sensitivity of final losses, one per rate (paper, section 2.2).

    A loss that is not a number, infinite, or above ``loss_at_start`` counts as ``loss_at_start``.
    """
    given = np.asarray(losses, dtype=np.float64)
    counted = np.minimum(np.where(np.isnan(given), np.inf, given), loss_at_start)
    return float((counted - counted.min()).mean())


def rate_at(step: int, steps: int, rising: int, peak: float, lowest: float) -> float:
    """Return the rate at ``step`` from 0: linear to ``peak`` in ``rising`` steps, then half a cosine to ``lowest``."""
    if step < rising:
        return peak * step / rising
    angle = math.pi * (step - rising) / (steps - rising)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(angle))
