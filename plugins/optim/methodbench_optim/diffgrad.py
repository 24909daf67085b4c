"""diffGrad: An Optimization Method for Convolutional Neural Networks.

Dubey et al., IEEE Transactions on Neural Networks and Learning Systems 2020, arXiv 1909.11015.

Adam whose first moment is multiplied, coordinate by coordinate, by a friction ξ between 0.5 and 1: the
sigmoid of how much the gradient changed since the last step. Where the gradient hardly changes, as near an
optimum, the step is halved; where it changes a lot, the step is Adam's. The momentum is stored without ξ.

    g ← g + λ θ
    m ← β1 m + (1 - β1) g,    v ← β2 v + (1 - β2) g²
    ξ = 1 / (1 + exp(-|g_prev - g|)),    g_prev ← g    (g_prev = 0 before the first step)
    θ ← θ - η √(1 - β2^t) / (1 - β1^t) · ξ m / (√v + ε)

The code adds ε to √v as above; the paper, and the authors' notebook, correct v first and then add ε, so that
ε is not magnified in the first steps: ``eps_position="after-correction"``.

The published numbers were made with a first version of the code that keeps ``g_prev`` as a reference to the
gradient's buffer. Where gradients are cleared in place, ``g_prev`` is then the fresh gradient itself and ξ
stays at 0.5 from the second step on: Adam at half its rate. ``previous_grad_alias=True`` repeats that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench_optim import fused
from methodbench_optim.rule import Rule, ready

if TYPE_CHECKING:
    from methodbench.context import Context

EpsPosition = Literal["before-correction", "after-correction"]


@hyperparameters
class DiffGrad:
    """Adam with a friction that follows the change of the gradient (paper, algorithm 1)."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="learning rate")] = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1, description="decay of the first moment")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="decay of the second moment")] = 0.999
    eps: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="added to the root of the second moment")
    ] = 1e-8
    weight_decay: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="L2 penalty, added to the gradient (coupled)")
    ] = 0.0
    eps_position: Annotated[
        EpsPosition,
        Field(description="eps joins the root before the bias correction (the code) or after it (the paper)"),
    ] = "before-correction"
    previous_grad_alias: Annotated[
        bool, Field(description="keep the previous gradient as a reference to its buffer, as version 1 did")
    ] = False

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> DiffGradOptimizer:
        """Return the optimizer; all roles of parameters are treated alike."""
        rule = DiffGradOptimizer(
            param_groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            eps_position=self.eps_position,
            previous_grad_alias=self.previous_grad_alias,
        )
        return ready(rule, "diffgrad")


class DiffGradOptimizer(Rule):
    """diffGrad as a :class:`torch.optim.Optimizer`.

    State per parameter: ``step`` (int; a float32 tensor where the group is ``capturable``), ``exp_avg``,
    ``exp_avg_sq`` and ``previous_grad``, of the parameter's shape and dtype. With ``previous_grad_alias`` the L2 term
    is added to the gradient's own buffer, as version 1 of the authors' code does.
    """

    title = "diffGrad"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_position: EpsPosition = "before-correction",
        previous_grad_alias: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "eps_position": eps_position,
            "previous_grad_alias": previous_grad_alias,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        steps = self.count(params, group)
        exp_avgs, exp_avg_sqs = self.averages(params, "exp_avg"), self.averages(params, "exp_avg_sq")
        previous = self.averages(params, "previous_grad")
        alias: bool = group["previous_grad_alias"]
        beta1, beta2 = group["betas"]
        if not alias and fused.diffgrad(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            previous,
            steps,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            eps_after_correction=group["eps_position"] == "after-correction",
            weight_decay=group["weight_decay"],
        ):
            return
        if group["weight_decay"] and alias:
            torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        elif group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        diffgrad_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            previous,
            steps,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            eps_position=group["eps_position"],
        )
        if alias:
            for p, grad in zip(params, grads, strict=True):
                self.state[p]["previous_grad"] = grad
        else:
            torch._foreach_copy_(previous, grads)


def friction(previous: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return ξ, the sigmoid of the absolute change of the gradient: in [0.5, 1], of the gradients' shapes."""
    changes = list(torch._foreach_sub(previous, grads))
    torch._foreach_abs_(changes)
    torch._foreach_sigmoid_(changes)
    return changes


def diffgrad_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous: list[Tensor],
    steps: Sequence[Any],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    eps_position: EpsPosition,
) -> None:
    """Move ``params`` by one step of diffGrad and update both moments, in place (paper, algorithm 1).

    Args:
        params: parameters of any shapes, floating point.
        grads: gradients with the L2 term in them, same shapes; left as they are.
        exp_avgs: first moments m; zeros before step 1.
        exp_avg_sqs: second moments v; zeros before step 1.
        previous: the gradients of the step before, zeros at step 1; left to the caller to replace.
        steps: number of the step per parameter, from 1: ints, or float64 scalars on the parameters' devices.
        lr: the schedule's current rate.
        eps_position: whether ``eps`` joins √v before or after the bias correction.
    """
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)

    numerators = friction(previous, grads)
    torch._foreach_mul_(numerators, exp_avgs)

    # (m / c1) / (√v / √c2 + ε) = √c2 / c1 · m / (√v + √c2 ε): the two places of ε differ by its factor alone.
    roots = [(1 - beta2**step) ** 0.5 for step in steps]
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(
        denominators, [eps * root if eps_position == "after-correction" else eps for root in roots]
    )
    lengths = [-lr * root / (1 - beta1**step) for root, step in zip(roots, steps, strict=True)]
    if isinstance(lengths[0], Tensor):
        torch._foreach_mul_(numerators, lengths)
        torch._foreach_addcdiv_(params, numerators, denominators)
    else:
        torch._foreach_addcdiv_(params, numerators, denominators, lengths)
