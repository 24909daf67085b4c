"""Muon: momentum orthogonalized by Newton-Schulz (Jordan et al., 2024), and its use for outlier-safe pre-training.

Park et al., Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language Models, ACL 2025, arXiv
2506.19697.

The update of a hidden matrix is replaced by the nearest matrix with equal singular values, so that every direction
of the matrix moves as far as any other. Five steps of a quintic polynomial come near enough: singular values end
between about 0.7 and 1.2. Embeddings and heads, which are tables rather than maps, and vectors have AdamW instead:
parameters are told apart by their role, and not by their shape alone.

    m ← μ m + (1 - μ) G,    U = (1 - μ) G + μ m    (without Nesterov: U = m)
    X = U / (‖U‖F + ε);    five times: A = X Xᵀ, X ← a X + (b A + c A²) X
    W ← W (1 - η λ) - η s X,    s = √max(1, rows / columns)

``scale="rms"`` takes s = 0.2 √max(rows, columns) in its place, which gives the update the root mean square of AdamW's:
the choice of outlier-safe pre-training, of which ``vectors="normalized"`` is the other half. There a vector of n
elements moves by 0.2 √n of the unit vector along its momentum. The momentum's factor 1 - μ, which that code leaves out,
cancels in the normalization. Kernels of convolutions are matrices [out, the rest].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.tuning import Choice, Decades, Space
from methodbench_optim.rule import Rule, ready

if TYPE_CHECKING:
    from methodbench.context import Context

Scale = Literal["aspect", "rms"]
Arithmetic = Literal["bfloat16", "bfloat16-fused", "bfloat16-per-step", "float32", "float64"]
#: a, b and c of the quintic: steep at zero, so that small singular values grow fast; not convergent to 1.
QUINTIC = (3.4445, -4.7750, 2.0315)


@hyperparameters
class Muon:
    """Orthogonalized momentum for hidden matrices, AdamW for what is none (Jordan's muon.py)."""

    SPACE: ClassVar[Space] = {
        "lr": Decades(3.0),
        "weight_decay": Choice((0.0, 1e-4, 1e-3, 1e-2, 1e-1)),
        "aux_lr": Decades(3.0),
    }

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="rate of hidden matrices")] = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1, description="decay of the momentum")] = 0.95
    nesterov: Annotated[bool, Field(description="look ahead along the momentum")] = True
    ns_steps: Annotated[int, Field(ge=1, le=20, description="steps of the Newton-Schulz iteration")] = 5
    arithmetic: Annotated[
        Arithmetic, Field(description="how the Newton-Schulz iteration rounds, see newton_schulz")
    ] = "bfloat16"
    scale: Annotated[
        Scale, Field(description="length of the update: by the matrix's aspect, or AdamW's root mean square")
    ] = "aspect"
    vectors: Annotated[
        Literal["adamw", "normalized"],
        Field(description="what vectors follow: AdamW, or normalized momentum"),
    ] = "adamw"
    weight_decay: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="decoupled decay of all parameters; a step shrinks by its rate times it",
        ),
    ] = 0.0
    aux_lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="rate of AdamW")] = 3e-4
    aux_beta1: Annotated[float, Field(ge=0, lt=1, description="decay of AdamW's first moment")] = 0.9
    aux_beta2: Annotated[float, Field(ge=0, lt=1, description="decay of AdamW's second moment")] = 0.95
    aux_eps: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="added to the root of AdamW's second moment")
    ] = 1e-10

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> MuonOptimizer:
        """Return the optimizer; a group's role decides, and within ``matrix`` the number of dimensions."""
        groups: list[dict[str, Any]] = []
        for group in param_groups:
            parts: dict[str, list[Tensor]] = {"orthogonal": [], "normalized": [], "adamw": []}
            for p in group["params"]:
                if group.get("role") in ("embedding", "head"):
                    parts["adamw"].append(p)
                elif p.ndim < 2 or group.get("role") == "vector":
                    parts[self.vectors].append(p)
                else:
                    parts["orthogonal"].append(p)
            auxiliary = {"lr": self.aux_lr, "betas": (self.aux_beta1, self.aux_beta2), "eps": self.aux_eps}
            for update, params in parts.items():
                if params:
                    own = auxiliary if update == "adamw" else {}
                    groups.append({**own, **group, "params": params, "update": update})
        rule = MuonOptimizer(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            arithmetic=self.arithmetic,
            scale=self.scale,
            weight_decay=self.weight_decay,
        )
        return ready(rule, "muon")


class MuonOptimizer(Rule):
    """Muon as a :class:`torch.optim.Optimizer`.

    A group's ``"update"`` is ``"orthogonal"``, ``"normalized"`` or ``"adamw"``. State per parameter, of its shape and
    dtype: ``momentum``, or ``exp_avg`` and ``exp_avg_sq`` beside ``step`` under AdamW (int; a float32 tensor
    where the group is ``capturable``).
    """

    title = "Muon"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        arithmetic: Arithmetic = "bfloat16",
        scale: Scale = "aspect",
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "arithmetic": arithmetic,
            "scale": scale,
            "weight_decay": weight_decay,
            "update": "orthogonal",
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr = float(group["lr"])
        if group["update"] == "adamw":
            updates = self._adamw(group, params, grads)
        else:
            directions = self._momentum(group, params, grads)
            if group["update"] == "orthogonal":
                updates = orthogonalized(directions, group["ns_steps"], group["arithmetic"])
            else:
                updates = list(torch._foreach_div(directions, [d.norm() + 1e-8 for d in directions]))
            torch._foreach_mul_(updates, [length(p, group["scale"]) for p in params])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr)

    def _momentum(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        momenta = self.averages(params, "momentum")
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return list(torch._foreach_lerp(grads, momenta, group["momentum"])) if group["nesterov"] else momenta

    def _adamw(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        steps = self.count(params, group)
        first, second = self.averages(params, "exp_avg"), self.averages(params, "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_lerp_(second, torch._foreach_mul(grads, grads), 1 - beta2)
        denominators = list(torch._foreach_div(second, [1 - beta2**step for step in steps]))
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = list(torch._foreach_div(first, [1 - beta1**step for step in steps]))
        torch._foreach_div_(updates, denominators)
        return updates


def length(p: Tensor, scale: Scale) -> float:
    """Return the factor s of a unit update of ``p``, whose matrix has rows [first dimension, the rest]."""
    rows, columns = (p.shape[0], p[0].numel()) if p.ndim > 1 else (p.numel(), 1)
    if scale == "aspect" and p.ndim > 1:
        return float(max(1.0, rows / columns) ** 0.5)
    return float(0.2 * max(rows, columns) ** 0.5)


def orthogonalized(directions: list[Tensor], steps: int, arithmetic: Arithmetic) -> list[Tensor]:
    """Return :func:`newton_schulz` of each tensor, of its shape and dtype; equal shapes go through in one batch."""
    found: list[Tensor] = list(directions)
    for shape in {d.shape for d in directions}:
        alike = [index for index, d in enumerate(directions) if d.shape == shape]
        batch = torch.stack([directions[index].flatten(1) for index in alike])
        for index, x in zip(alike, newton_schulz(batch, steps, arithmetic), strict=True):
            found[index] = x.view(shape).to(directions[index].dtype)
    return found


def newton_schulz(
    matrices: Tensor, steps: int = 5, arithmetic: Arithmetic = "bfloat16", eps: float = 1e-7
) -> Tensor:
    """Return matrices with nearly the singular vectors of ``matrices`` and singular values near 1.

    Args:
        matrices: float tensor [batch, rows, columns]; a matrix of zeros stays one.
        steps: of the iteration.
        arithmetic: ``"float32"`` and ``"float64"`` say what they are. In bfloat16 single elements depend on the order
            of rounding: ``"bfloat16"`` rounds every operation, as Jordan's code does, ``"bfloat16-fused"`` rounds each
            multiply-add once, as torch.optim.Muon does, and ``"bfloat16-per-step"`` rounds the coefficients and each
            step's result and computes in float32 in between, as XLA compiles the code of outlier-safe pre-training.
        eps: added to the Frobenius norm.

    Returns:
        Tensor of the same shape, in the dtype of the iteration.
    """
    a, b, c = QUINTIC
    dtype = getattr(torch, arithmetic.partition("-")[0])
    flip = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if flip else matrices
    if arithmetic == "bfloat16-per-step":
        a, b, c = (float(torch.tensor(value, dtype=dtype)) for value in QUINTIC)
        x = x.float()
    else:
        x = x.to(dtype)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + eps)).to(dtype)
    for _ in range(steps):
        if arithmetic == "bfloat16-per-step":
            x = _quintic(x.float(), a, b, c).to(dtype)
        elif arithmetic == "bfloat16-fused":
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = _quintic(x, a, b, c)
    return x.mT if flip else x


def _quintic(x: Tensor, a: float, b: float, c: float) -> Tensor:
    gram = x @ x.mT
    return a * x + (b * gram + c * gram @ gram) @ x
