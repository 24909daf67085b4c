"""Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (Shazeer and Stern, ICML 2018, arXiv 1804.04235).

Adam's second moment of a matrix is kept as the means of its rows and of its columns, of which it is the outer
product over their common mean: memory of n + m numbers in place of n m. There is no first moment; updates whose
root mean square exceeds a threshold are scaled down to it, and the rate is relative to the parameter's own size.
With t from 1, β = 1 - t^γ (γ = -0.8) and G² of shape [n, m]:

    θ ← θ (1 - α λ),    α = η max(ε2, RMS(θ))
    R ← β R + (1 - β) mean_columns(G² + ε1),    C ← β C + (1 - β) mean_rows(G² + ε1)
    U = G / √(R Cᵀ / mean(R)),    U ← U / max(1, RMS(U) / d)
    θ ← θ - α U

Vectors keep the whole second moment. ``form="torch"`` is ``torch.optim.Adafactor``, which differs: the rate is
α = max(ε2, RMS(θ)) min(η, 1/√t), decay is 1 - η λ, ε1 bounds the second moment from below instead of joining G².
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench_optim.rule import Rule, ready

if TYPE_CHECKING:
    from methodbench.context import Context


@hyperparameters
class Adafactor:
    """Factored second moments, clipped updates, rates relative to the parameter (paper, algorithms 4 and 5)."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="learning rate")] = 1e-2
    decay_rate: Annotated[
        float,
        Field(
            lt=0,
            ge=-1,
            description="γ: at step t the second moment keeps 1 - t^γ of itself",
        ),
    ] = -0.8
    clip_threshold: Annotated[
        float, Field(ge=1, allow_inf_nan=False, description="largest root mean square of an update, d")
    ] = 1.0
    scale_parameter: Annotated[
        bool, Field(description="rates relative to the parameter's root mean square")
    ] = True
    eps1: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="floor of the squared gradient; none: the dtype's resolution (torch's form)",
        ),
    ] = 1e-30
    eps2: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="floor of the parameter's root mean square")
    ] = 1e-3
    weight_decay: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="decoupled decay; a step shrinks by the rate times it"),
    ] = 0.0
    form: Annotated[
        Literal["paper", "torch"], Field(description="the paper's rule, or torch.optim.Adafactor")
    ] = "paper"

    @model_validator(mode="after")
    def _form_has_the_setting(self) -> Adafactor:
        if self.form == "paper" and self.eps1 is None:
            raise ValueError("eps1 must be a number in the paper's form")
        if self.form == "torch" and not self.scale_parameter:
            raise ValueError("torch's form has no scale_parameter = false")
        return self

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return the optimizer; all roles of parameters are treated alike."""
        if self.form == "torch":
            theirs = torch.optim.Adafactor(
                param_groups,
                lr=self.lr,
                beta2_decay=self.decay_rate,
                eps=(self.eps1, self.eps2),
                d=self.clip_threshold,
                weight_decay=self.weight_decay,
            )
            return ready(theirs, "adafactor")
        rule = AdafactorOptimizer(
            param_groups,
            lr=self.lr,
            decay_rate=self.decay_rate,
            clip_threshold=self.clip_threshold,
            scale_parameter=self.scale_parameter,
            eps1=self.eps1 or 0.0,
            eps2=self.eps2,
            weight_decay=self.weight_decay,
        )
        return ready(rule, "adafactor")


class AdafactorOptimizer(Rule):
    """The paper's rule as a :class:`torch.optim.Optimizer`.

    State per parameter: ``step`` (int), and ``row`` and ``column``, the means over the last and the last but one
    dimension, or ``exp_avg_sq`` for parameters of fewer than two dimensions. Sums are over whole tensors, so each
    tensor is a computation of its own.
    """

    title = "Adafactor"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        decay_rate: float = -0.8,
        clip_threshold: float = 1.0,
        scale_parameter: bool = True,
        eps1: float = 1e-30,
        eps2: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "decay_rate": decay_rate,
            "clip_threshold": clip_threshold,
            "scale_parameter": scale_parameter,
            "eps1": eps1,
            "eps2": eps2,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for p, grad, step in zip(params, grads, self.count(params, group), strict=True):
            state = self.state[p]
            squares = grad.square().add_(group["eps1"])
            means = (
                {"row": squares.mean(-1), "column": squares.mean(-2)}
                if p.ndim > 1
                else {"exp_avg_sq": squares}
            )
            for name, mean in means.items():
                state.setdefault(name, torch.zeros_like(mean)).lerp_(mean, step ** group["decay_rate"])
            second = factored(state["row"], state["column"]) if p.ndim > 1 else state["exp_avg_sq"]
            update = grad * second.rsqrt()
            update.div_((rms(update) / group["clip_threshold"]).clamp_min(1.0))
            rate = torch.full_like(rms(p), float(group["lr"]))
            if group["scale_parameter"]:
                rate = rate * rms(p).clamp_min(group["eps2"])
            p.mul_(1 - rate * group["weight_decay"])
            p.sub_(update.mul_(rate))


def factored(row: Tensor, column: Tensor) -> Tensor:
    """Return the rank-one matrix with these means of rows [..., n] and of columns [..., m]: [..., n, m].

    It is exact where the matrix is an outer product (paper, section 3).
    """
    return (row / row.mean(-1, keepdim=True)).unsqueeze(-1) * column.unsqueeze(-2)


def rms(x: Tensor) -> Tensor:
    """Return the root of the mean square of all elements, a scalar."""
    return x.square().mean().sqrt()
