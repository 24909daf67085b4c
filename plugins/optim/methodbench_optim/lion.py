"""Lion: Symbolic Discovery of Optimization Algorithms (Chen et al., NeurIPS 2023, arXiv 2302.06675).

The rule came out of a search over programs: every coordinate moves by exactly the learning rate, in the
direction of the sign of a mix of momentum and gradient. The mix that decides the step weighs the fresh
gradient more than the mix that is remembered, and weight decay is decoupled. One state tensor per parameter,
half of Adam's.

    θ ← θ (1 - η λ)
    c = β1 m + (1 - β1) g
    θ ← θ - η sign(c)
    m ← β2 m + (1 - β2) g

No bias correction and no ε: the direction is free of the gradient's scale. The update is about ten times
longer than Adam's at the same η, hence the paper's advice of η 3 to 10 times below AdamW's and λ as many
times above.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench_optim import fused
from methodbench_optim.rule import Rule, ready

if TYPE_CHECKING:
    from methodbench.context import Context


@hyperparameters
class Lion:
    """Sign of interpolated momentum, with decoupled weight decay (paper, algorithm 2)."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="step length of every coordinate")] = (
        1e-4
    )
    beta1: Annotated[
        float,
        Field(ge=0, lt=1, description="share of the momentum in the step's direction"),
    ] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="decay of the stored momentum")] = 0.99
    weight_decay: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="decoupled decay; a step shrinks by lr times it")
    ] = 0.0

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> LionOptimizer:
        """Return the optimizer; all roles of parameters are treated alike."""
        rule = LionOptimizer(
            param_groups, lr=self.lr, betas=(self.beta1, self.beta2), weight_decay=self.weight_decay
        )
        return ready(rule, "lion")


class LionOptimizer(Rule):
    """Lion as a :class:`torch.optim.Optimizer`.

    State per parameter: ``momentum``, of the parameter's shape and dtype.
    """

    title = "Lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        lion_(
            params,
            grads,
            self.averages(params, "momentum"),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
        )


def lion_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Move ``params`` by one step of Lion and update ``momenta``, both in place (paper, algorithm 2).

    Args:
        params: parameters of any shapes, floating point.
        grads: gradients, one per parameter, same shapes; left as they are.
        momenta: averages of the gradients, same shapes and dtypes as ``params``; zeros before step 1.
        lr: the schedule's current rate, which scales the decay as well.
        beta1: share of the momentum in the step's direction.
        beta2: decay of the momentum.
        weight_decay: decoupled decay λ.
    """
    if fused.lion(params, grads, momenta, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay):
        return
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    directions = torch._foreach_lerp(momenta, grads, 1 - beta1)
    torch._foreach_sign_(directions)
    torch._foreach_add_(params, directions, alpha=-lr)
    torch._foreach_lerp_(momenta, grads, 1 - beta2)
