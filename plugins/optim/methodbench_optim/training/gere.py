"""GeRe: Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay (Zhang et al., 2025,
arXiv 2508.04676).

A small fixed set of general samples is replayed during fine-tuning. Besides their cross entropy, a threshold-based
margin (TM) loss keeps each coordinate of the last hidden state in the class in which the base model had it: low,
neutral or high. With μ and σ of each coordinate over the base model's states H of all samples, and states P of now:

    low      H <= μ - k σ:                    ReLU(P - (μ - k σ))
    neutral  between:                         ReLU(P - (μ + k σ)) + ReLU((μ - k σ) - P)
    high     H >= μ + k σ:                    ReLU((μ + k σ) - P)
    TM = sum / number of coordinates that violate their class
    loss = (CE(replay) + CE(task)) / 2 + w TM,    w = 1, 100, or the one that makes both terms equal ("dy")

A coordinate that never varies is low and high at once: both terms apply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters

if TYPE_CHECKING:
    from methodbench.context import Context

#: Keeps divisions by counts of nothing at 0 (authors' code).
TINY = 1e-8


@hyperparameters
class GeRe:
    """Replay of general samples with the threshold-based margin loss (paper, section 3)."""

    w_strategy: Annotated[Literal["1", "100", "dy"], Field(description="weight of the margin loss")] = "100"
    k_std: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="half width of the neutral class, in deviations")
    ] = 1.0
    replay_per_batch: Annotated[
        int, Field(ge=0, description="general samples beside every batch; 0 for none")
    ] = 8

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return ``model`` with the base model's states of the general samples that the task supplies.

        Raises:
            NotApplicableError: the task supplies no general samples, or the model has no Linear to read them at.
        """
        replay = ctx.supplies.get("replay")
        if replay is None or not len(replay[0]):
            raise NotApplicableError("the task supplies no general samples to replay")
        inputs, targets = replay
        return Replaying(model, inputs, targets, k_std=self.k_std, seed=ctx.seed)

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the loss of the batch and of the general samples that come with it."""
        if not self.replay_per_batch or not isinstance(model, Replaying):
            return task_loss
        picked = model.pick(self.replay_per_batch)
        logits, states = model.read(model.inputs[picked])
        margin = margin_loss(states, model.states[picked], model.low, model.high)
        ce = (token_cross_entropy(logits, model.targets[picked]) + task_loss) / 2
        weight = (
            float(ce.detach() / (margin.detach() + TINY))
            if self.w_strategy == "dy"
            else float(self.w_strategy)
        )
        return ce + weight * margin

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Leave the gradients alone."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Leave the weights alone."""


class Replaying(nn.Module):
    """A model with general samples, and the hidden states before its last Linear that they had at the start."""

    low: Tensor
    high: Tensor
    states: Tensor

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, k_std: float, seed: int) -> None:
        super().__init__()
        self.model, self.inputs, self.targets = model, inputs, targets
        linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not linears:
            raise NotApplicableError("the model has no Linear whose input is its last hidden state")
        self._head = [linears[-1]]
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []
        with torch.no_grad():
            states = self.read(inputs)[1]
        self.register_buffer("states", states.float(), persistent=False)
        mean, deviation = statistics(states.float().flatten(0, -2))
        self.register_buffer("low", mean - k_std * deviation, persistent=False)
        self.register_buffer("high", mean + k_std * deviation, persistent=False)

    def forward(self, x: Any) -> Tensor:
        """Return the model's outputs."""
        outputs: Tensor = self.model(x)
        return outputs

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's outputs and its last hidden states."""
        seen: list[Tensor] = []
        hook = self._head[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            outputs: Tensor = self.model(x)
        finally:
            hook.remove()
        return outputs, seen[-1]

    def pick(self, count: int) -> Tensor:
        """Return the indices of the next samples; all come once before any comes again."""
        while len(self._waiting) < count:
            self._waiting += torch.randperm(len(self.inputs), generator=self._generator).tolist()
        picked, self._waiting = self._waiting[:count], self._waiting[count:]
        return torch.tensor(picked)


def statistics(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation [H] of states [N, H] over the population, from sums as the authors' code does."""
    mean = states.mean(0)
    return mean, (states.square().mean(0) - mean.square()).clamp_min(0).sqrt()


def margin_loss(
    states: Tensor, base: Tensor, low: Tensor, high: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the threshold-based margin loss, a scalar (paper, equation 4).

    Args:
        states: of the model, float [..., H].
        base: of the base model for the same tokens, [..., H].
        low: lower threshold of each coordinate, [H]; ``high`` the upper one.
        mask: 1 for tokens and 0 for padding, [...]; all are tokens by default.
    """
    over_low, under_low = F.relu(states - low), F.relu(low - states)
    over_high, under_high = F.relu(states - high), F.relu(high - states)
    is_low, is_high = base <= low, base >= high
    losses = is_low * over_low + is_high * under_high + ~(is_low | is_high) * (over_high + under_low)
    if mask is not None:
        losses = losses * mask.unsqueeze(-1)
    return losses.sum() / ((losses != 0).sum().to(losses.dtype) + TINY)


def token_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the mean cross entropy of logits [..., V] over the labels [...] that there are, a scalar."""
    total = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return total / ((labels != ignore_index).sum().to(total.dtype) + TINY)
