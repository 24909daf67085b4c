"""Activate-while-Pruning: beside the smallest weights, negative ones that hardly moved go, so that ReLUs stay alive.

Liu, Ghosh, Tan, Motani, "AP: Selective Activation for De-sparsifying Pruned Networks", TMLR 2023, arXiv 2212.06145;
authors' code Martin1937/Activate-While-Pruning (95a063b).

Training runs in cycles of ``cycle_steps``. At the end of each, of the weights that are alive, over all layers:

1. the ``base`` % of smallest magnitude go (global magnitude pruning, below the percentile);
2. of the negative ones that are left, those whose ``|w - w_start|`` over the cycle is smallest go, as many as ``ap`` %
   of the weights that were alive before step 1. Without a negative weight a pre-activation is larger, and fewer units
   are dead;
3. what is left begins the next cycle from its initial value (``restart="rewind"``, with the biases), or from fresh
   random ones (``reinit``).

Gradients of zero weights are zero. In the authors' loops a weight tensor counts once more for every parameter without
"weight" in its name that follows it (a bias), in the percentile, in the count and among the movements;
``count_biases`` does the same. Their momentum can lift pruned weights off zero for a step; here masks are applied after
every step. The gains of batch normalization take part where ``norms`` is on, as in the code, since they too are called
"weight"; biases never do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters

if TYPE_CHECKING:
    from methodbench.context import Context

Restart = Literal["rewind", "reinit"]


@hyperparameters
class AP:
    """Prunes in cycles by magnitude, and by sign and movement."""

    base: Annotated[
        float, Field(ge=0, lt=100, description="% of alive weights that go by magnitude, a cycle")
    ] = 18.0
    ap: Annotated[
        float, Field(ge=0, lt=100, description="% of alive weights that go among the negative ones")
    ] = 2.0
    cycles: Annotated[int, Field(ge=0, le=1000, description="how often weights go; 0 prunes nothing")] = 3
    cycle_steps: Annotated[int, Field(ge=1, description="steps of training before weights go")] = 30
    restart: Annotated[Restart, Field(description="values that the next cycle begins with")] = "rewind"
    norms: Annotated[bool, Field(description="gains of norms take part")] = True
    count_biases: Annotated[
        bool, Field(description="count tensors again for the biases behind them, as the authors' code does")
    ] = False

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return ``model`` with the masks and the initial values of its parameters.

        Raises:
            NotApplicableError: the model has no weights.
        """
        return Masked(model, self, ctx.seed)

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the task's loss."""
        return task_loss

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Take the gradients of pruned weights away."""
        assert isinstance(model, Masked)
        for name, weight in model.weights().items():
            if weight.grad is not None:
                weight.grad.mul_(model.masks[name])

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Keep pruned weights at zero; at the end of a cycle, prune and begin the next one."""
        assert isinstance(model, Masked)
        weights = model.weights()
        for name, weight in weights.items():
            weight.mul_(model.masks[name])
        cycle, rest = divmod(step + 1, self.cycle_steps)
        if rest or cycle > self.cycles:
            return
        counts = occurrences(model.model, weights) if self.count_biases else dict.fromkeys(weights, 1)
        masks, chosen = prune_smallest(weights, model.masks, self.base, self.ap, counts)
        masks = prune_unmoved_negatives(weights, model.start, masks, chosen, counts)
        model.begin(masks, self.restart)


class Masked(nn.Module):
    """A model whose weights have masks, and know where they began."""

    def __init__(self, model: nn.Module, method: AP, seed: int) -> None:
        super().__init__()
        self.model = model
        self._names = prunable(model, norms=method.norms)
        if not self._names:
            raise NotApplicableError("the model has no parameters called weight that could be pruned")
        self._generator = torch.Generator().manual_seed(seed)
        self.initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.masks = {name: torch.ones_like(self.initial[name]) for name in self._names}
        self.start = {name: self.initial[name] for name in self._names}

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's outputs."""
        outputs: Tensor = self.model(x)
        return outputs

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that can be pruned, by name."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self._names}

    def begin(self, masks: Mapping[str, Tensor], restart: Restart) -> None:
        """Begin a cycle with ``masks``: everything at its initial value, or weights at fresh ones."""
        self.masks = dict(masks)
        for name, parameter in self.model.named_parameters():
            value = self.initial[name]
            if restart == "reinit" and name in self.masks and value.ndim > 1:
                value = value.flatten()[torch.randperm(value.numel(), generator=self._generator)].view_as(
                    value
                )
            parameter.copy_(value * self.masks[name] if name in self.masks else value)
        self.start = {name: weight.detach().clone() for name, weight in self.weights().items()}

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned."""
        return 1 - sum(float(mask.sum()) for mask in self.masks.values()) / sum(
            m.numel() for m in self.masks.values()
        )


def prunable(model: nn.Module, *, norms: bool) -> list[str]:
    """Return the names of the parameters that have "weight" in them; vectors (gains of norms) only with ``norms``."""
    found = ((name, p) for name, p in model.named_parameters() if "weight" in name)
    return [name for name, p in found if norms or p.ndim > 1]


def occurrences(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how often the authors' loops count each weight: once, and once for every other parameter behind it."""
    counts: dict[str, int] = {}
    last = ""
    for name, _ in model.named_parameters():
        last = name if name in weights else last
        if last:
            counts[last] = counts.get(last, 0) + 1
    return counts


def prune_smallest(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    base: float,
    ap: float,
    counts: Mapping[str, int],
) -> tuple[dict[str, Tensor], int]:
    """Return masks without the ``base`` % of smallest magnitude, and ``ap`` % of the weights that were alive.

    Args:
        weights: by name, of any shape.
        masks: 1 or 0 in the shape of the weights.
        base: percentile, interpolated linearly; what equals it stays.
        ap: percent of which the number is returned.
        counts: how often each tensor counts.
    """
    alive = _pool({name: weight[weight != 0].abs() for name, weight in weights.items()}, counts)
    if not len(alive):
        return dict(masks), 0
    threshold = float(np.percentile(alive, base))
    kept = {name: masks[name] * (weight.abs() >= threshold) for name, weight in weights.items()}
    return kept, int(len(alive) * ap / 100)


def prune_unmoved_negatives(
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    number: int,
    counts: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return masks without the negative weights that moved least: one more than ``number`` of them, as in the code.

    Args:
        weights: at the end of the cycle, by name.
        start: at its beginning.
        masks: after :func:`prune_smallest`.
        number: how many go; 0 takes none. All go where there are fewer.
        counts: how often each tensor counts among the movements.
    """
    if not number:
        return dict(masks)
    negative = {name: (weight * masks[name]) < 0 for name, weight in weights.items()}
    moved = {name: (weight - start[name]).abs() for name, weight in weights.items()}
    pool = np.sort(_pool({name: moved[name][negative[name]] for name in weights}, counts))
    if not len(pool):
        return dict(masks)
    threshold = float(pool[min(number, len(pool) - 1)])
    return {name: masks[name] * ~((moved[name] <= threshold) & negative[name]) for name in weights}


def _pool(values: Mapping[str, Tensor], counts: Mapping[str, int]) -> np.ndarray:
    """Return all values in one array, those of each tensor as often as it counts."""
    return np.concatenate(
        [np.tile(tensor.detach().flatten().cpu().numpy(), counts[name]) for name, tensor in values.items()]
    )


def dead_rate(activations: Tensor) -> tuple[float, float]:
    """Return the dynamic and the static dead rate of activations [samples, ...] behind a ReLU.

    Dynamic: the share of pairs of unit and sample that are exactly zero. Static: the share of units that are so for
    all samples. Every position of a convolution's output is a unit.
    """
    zero = activations.flatten(1) == 0
    return float(zero.double().mean()), float(zero.all(0).double().mean())
