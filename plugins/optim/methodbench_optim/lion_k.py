"""Lion-K: Lion Secretly Solves Constrained Optimization, As Lyapunov Predicts.

Chen, Liu, Liang and Liu, ICLR 2024, arXiv 2310.05898.

Lion's sign becomes the (sub)gradient ∇K of a convex function K. With decoupled weight decay λ the iterates
minimize f(θ) + K*(λ θ) / λ, where K* is the convex conjugate of K: for Lion, K is the l1 norm, K* the indicator of
a box, and the problem is that of minimizing f subject to max |θ| <= 1 / λ. A Lyapunov function proves it.

    c = β1 m + (1 - β1) g
    θ ← (1 - η λ) θ - η ∇K(c)
    m ← β2 m + (1 - β2) g

    kappa           K(x)                          ∇K(x)                                constraint for λ = 1
    l1              Σ |x|                         sign(x)                              max |θ| <= 1
    lp              ‖x‖p                          sign(x) |x|^(p-1) / ‖x‖p^(p-1)       ‖θ‖q <= 1, 1/p + 1/q = 1
    l2              ‖x‖2                          x / ‖x‖2                             ‖θ‖2 <= 1
    sq              ‖x‖2² / 2                     x                                    none: f + ‖θ‖2² / 2
    relaxed_l1      Σ max(|x| - e, 0)             sign(x) where |x| > e                max |θ| <= 1, f + e ‖θ‖1
    topk            sum of the k largest |x|      sign(x) on these, else 0             max |θ| <= 1, ‖θ‖1 <= k
    huber           Σ huber_e(x)                  clip(x, -e, e) / e                   max |θ| <= 1, f + e/2 ‖θ‖2²
    sinh            Σ √(x² + e²)                  x / √(x² + e²)                       a smooth barrier at max |θ| = 1
    group_l2        Σ of the rows' 2-norms        row / its 2-norm                     each row's 2-norm <= 1
    spectral        nuclear norm                  U Vᵀ of the SVD                      spectral norm <= 1

Norms are over each tensor by itself; rows are those of the first dimension, and the elements of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench_optim.rule import Rule, ready

if TYPE_CHECKING:
    from methodbench.context import Context

Kappa = Literal["l1", "lp", "l2", "sq", "relaxed_l1", "topk", "huber", "sinh", "group_l2", "spectral"]


@hyperparameters
class LionK:
    """Subgradient of a convex function at interpolated momentum, with decoupled decay (paper, equation 2)."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="learning rate")] = 1e-4
    beta1: Annotated[
        float,
        Field(ge=0, lt=1, description="share of the momentum in the step's direction"),
    ] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="decay of the stored momentum")] = 0.99
    weight_decay: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="decoupled decay; the constraint is at its inverse, and absent at 0",
        ),
    ] = 0.0
    kappa: Annotated[Kappa, Field(description="which convex function K")] = "l1"
    p: Annotated[float, Field(gt=1, allow_inf_nan=False, description="order of the norm of lp")] = 1.5
    e: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="width of relaxed_l1, huber and sinh, as a gradient"),
    ] = 0.01
    k: Annotated[int, Field(ge=1, description="coordinates of each tensor that topk moves")] = 10

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> LionKOptimizer:
        """Return the optimizer; all roles of parameters are treated alike."""
        rule = LionKOptimizer(
            param_groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,
            kappa=self.kappa,
            p=self.p,
            e=self.e,
            k=self.k,
        )
        return ready(rule, "lion-k")


class LionKOptimizer(Rule):
    """Lion-K as a :class:`torch.optim.Optimizer`.

    State per parameter: ``momentum``, of the parameter's shape and dtype.
    """

    title = "Lion-K"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        kappa: Kappa = "l1",
        p: float = 1.5,
        e: float = 0.01,
        k: int = 10,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "kappa": kappa,
            "p": p,
            "e": e,
            "k": k,
        }
        super().__init__(params, defaults)

    def advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        momenta = self.averages(params, "momentum")
        mixed = list(torch._foreach_lerp(momenta, grads, 1 - beta1))
        directions = KAPPAS[group["kappa"]](mixed, group)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, directions, alpha=-lr)
        torch._foreach_lerp_(momenta, grads, 1 - beta2)


# The subgradients: each takes a list of tensors of any shapes, which it may overwrite, and the group's settings.

Settings = Mapping[str, Any]


def _over(numerators: list[Tensor], denominators: Iterable[Tensor]) -> list[Tensor]:
    """Divide; 0 where the denominator is."""
    safe = [torch.where(d == 0, torch.ones_like(d), d) for d in denominators]
    return list(torch._foreach_div(numerators, safe))


def l1(xs: list[Tensor], _: Settings) -> list[Tensor]:
    """Return the signs."""
    torch._foreach_sign_(xs)
    return xs


def lp(xs: list[Tensor], settings: Settings) -> list[Tensor]:
    """Return the gradients of the p-norm; 0 at 0."""
    order = settings["p"]
    units = _over(xs, torch._foreach_norm(xs, order))
    sizes = torch._foreach_abs(units)
    torch._foreach_pow_(sizes, order - 1)
    torch._foreach_sign_(units)
    torch._foreach_mul_(units, sizes)
    return units


def l2(xs: list[Tensor], _: Settings) -> list[Tensor]:
    """Return the tensors over their norms; 0 at 0."""
    return _over(xs, torch._foreach_norm(xs))


def sq(xs: list[Tensor], _: Settings) -> list[Tensor]:
    """Return the tensors as they are."""
    return xs


def relaxed_l1(xs: list[Tensor], settings: Settings) -> list[Tensor]:
    """Return the signs of what is larger than e, else 0."""
    return [torch.where(x.abs() > settings["e"], x.sign(), torch.zeros_like(x)) for x in xs]


def topk(xs: list[Tensor], settings: Settings) -> list[Tensor]:
    """Return the signs of the k largest of each tensor, else 0; ties go to the lower index."""
    found = []
    for x in xs:
        flat = x.flatten()
        largest = flat.abs().argsort(descending=True, stable=True)[: settings["k"]]
        direction = torch.zeros_like(flat)
        direction[largest] = flat[largest].sign()
        found.append(direction.view_as(x))
    return found


def huber(xs: list[Tensor], settings: Settings) -> list[Tensor]:
    """Return the tensors, clipped to [-e, e], over e."""
    torch._foreach_clamp_min_(xs, -settings["e"])
    torch._foreach_clamp_max_(xs, settings["e"])
    torch._foreach_div_(xs, settings["e"])
    return xs


def sinh(xs: list[Tensor], settings: Settings) -> list[Tensor]:
    """Return x / √(x² + e²)."""
    sizes = list(torch._foreach_mul(xs, xs))
    torch._foreach_add_(sizes, settings["e"] ** 2)
    torch._foreach_sqrt_(sizes)
    torch._foreach_div_(xs, sizes)
    return xs


def group_l2(xs: list[Tensor], _: Settings) -> list[Tensor]:
    """Return each row over its norm; the signs of a vector."""
    return _over(
        xs, [x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1)) if x.ndim > 1 else x.abs() for x in xs]
    )


def spectral(xs: list[Tensor], _: Settings) -> list[Tensor]:
    """Return U Vᵀ of each matrix, kernels flattened to [out, -1]; a vector over its norm, as a matrix of one column.

    Directions whose singular value is nil beside the largest are left out: the subgradient there is free. A matrix that
    is not finite has no singular values: its direction is NaN.
    """
    return [_polar(x) for x in xs]


def _polar(x: Tensor) -> Tensor:
    matrix = (x.flatten(1) if x.ndim > 1 else x.reshape(-1, 1)).to(
        torch.promote_types(x.dtype, torch.float32)
    )
    if not bool(matrix.isfinite().all()):
        return torch.full_like(x, torch.nan)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = (s > s.amax() * max(matrix.shape) * torch.finfo(s.dtype).eps).to(s.dtype)
    return ((u * kept) @ vh).view_as(x).to(x.dtype)


KAPPAS: Mapping[str, Callable[[list[Tensor], Settings], list[Tensor]]] = {
    "l1": l1,
    "lp": lp,
    "l2": l2,
    "sq": sq,
    "relaxed_l1": relaxed_l1,
    "topk": topk,
    "huber": huber,
    "sinh": sinh,
    "group_l2": group_l2,
    "spectral": spectral,
}
