"""MeZO: Fine-Tuning Language Models with Just Forward Passes (Malladi et al., NeurIPS 2023, arXiv 2305.17333).

With the subspace gradient of Efficient Personalization of Quantized Diffusion Model without Backpropagation (Seo et
al., CVPR 2025, arXiv 2503.14868).

Two values of the loss, at opposite ends of a random direction z, estimate the slope along it; the step goes along z by
that slope. The direction is drawn again from its seed whenever it is needed, and the parameters are perturbed in place:
neither gradients nor activations nor directions are stored.

    z ~ N(0, I) from seed s;    θ ← θ + ε z, ℓ1;    θ ← θ - 2 ε z, ℓ2;    θ ← θ + ε z
    g = (ℓ1 - ℓ2) / (2 ε);      θ ← θ - η (g z + λ θ)        (λ = 0 for vectors)

``estimator="subspace"`` is for a few parameters: ``directions`` one-sided slopes, shrunk by the root of the number of
dimensions, are averaged, freed of what lies in the directions in which the parameters' past of ``history`` steps hardly
varied, and followed by Adam.

    g_i = (ℓ(θ + ε z_i) - ℓ(θ)) / ε;    ĝ = Σ g_i z_i / (n √((d + n - 1) / n));    ĝ ← ĝ - E Eᵀ ĝ
    every ``history`` steps: E = principal components of the standardized past beyond a share 1 - ν of its variance
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.params import hyperparameters
from methodbench.torchkit.closures import Closure, as_closure
from methodbench.tuning import Decades, Space
from methodbench_optim.rule import ready, real

if TYPE_CHECKING:
    from methodbench.context import Context

#: Seeds are drawn below this, as the authors' code does.
SEEDS = 10**9


@hyperparameters
class MeZO:
    """Steps along random directions by the slope that forward passes see (paper, algorithm 1)."""

    SPACE: ClassVar[Space] = {"lr": Decades(4.0)}

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="learning rate")] = 1e-6
    eps: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="length of a perturbation, in standard deviations"),
    ] = 1e-3
    weight_decay: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="decoupled decay; a step shrinks by lr times it; vectors have none",
        ),
    ] = 0.0
    estimator: Annotated[
        Literal["spsa", "subspace"],
        Field(description="two-sided slopes, or one-sided ones in a subspace, with Adam"),
    ] = "spsa"
    directions: Annotated[int, Field(ge=1, description="slopes of one step, n (subspace)")] = 2
    history: Annotated[int, Field(ge=2, description="steps of the past that span the subspace, τ")] = 128
    nu: Annotated[
        float,
        Field(ge=0, lt=1, description="share of the past's variance that is removed, ν"),
    ] = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1, description="decay of Adam's first moment (subspace)")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="decay of Adam's second moment (subspace)")] = 0.999
    adam_eps: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="added to the root of the second moment (subspace)"),
    ] = 1e-3

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return the optimizer; seeds of its steps follow from ``ctx.seed``, directions from the groups' order."""
        if self.estimator == "subspace":
            return real(ready(SubspaceOptimizer(param_groups, self, ctx.seed), "mezo"), "mezo")
        rule = MeZOOptimizer(param_groups, self.lr, self.eps, self.weight_decay, ctx.seed)
        return real(ready(rule, "mezo"), "mezo")


class MeZOOptimizer(torch.optim.Optimizer):
    """MeZO as a :class:`torch.optim.Optimizer`; ``step`` asks a closure for its value alone.

    Its whole state is the number of steps, ``"step"`` of each group: no tensor. The loss that comes back is that of the
    first perturbation, the only one that the method sees. A slope that is not finite makes every parameter NaN.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """Take one step; return the loss at θ + ε z.

        Raises:
            TypeError: ``closure`` has no value of the loss to ask for.
        """
        closure = as_closure(closure, "MeZO")
        for group in self.param_groups:
            group["step"] += 1
        return self.follow(closure, step_seed(self.seed, self.param_groups[0]["step"]))[0]

    @torch.no_grad()
    def follow(self, closure: Closure, seed: int) -> tuple[Tensor, float]:
        """Take the step whose direction is drawn from ``seed``; return the loss at θ + ε z, and the slope g."""
        params = [p for group in self.param_groups for p in group["params"]]
        eps = self.param_groups[0]["eps"]
        perturb_(params, seed, eps)
        above = closure.value()
        perturb_(params, seed, -2 * eps)
        below = closure.value()
        perturb_(params, seed, eps)
        slope = float((above - below) / (2 * eps))
        generator = generator_of(seed, params)
        for group in self.param_groups:
            lr, decay = float(group["lr"]), group["weight_decay"]
            for p in group["params"]:
                z = direction_like(p, generator)
                shrinking = decay if p.ndim > 1 else 0.0
                p.sub_(z.mul_(slope).add_(p, alpha=shrinking), alpha=lr)
        return above, slope


class SubspaceOptimizer(torch.optim.Optimizer):
    """The subspace gradient as a :class:`torch.optim.Optimizer`, over all parameters as one vector of d elements.

    State, under the first parameter: ``exp_avg`` and ``exp_avg_sq`` [d], ``past`` [history, d], ``removed`` [r, d], the
    orthonormal directions that gradients are freed of; the number of steps is ``"step"`` of each group.
    """

    def __init__(self, params: Iterable[Any], settings: MeZO, seed: int = 0) -> None:
        self.settings = settings
        self.seed = seed
        super().__init__(params, {"lr": settings.lr, "eps": settings.eps, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """Take one step; return the loss before it.

        Raises:
            TypeError: ``closure`` has no value of the loss to ask for.
        """
        closure = as_closure(closure, "MeZO")
        params = [p for group in self.param_groups for p in group["params"]]
        start = [p.detach().clone() for p in params]
        eps, first = self.param_groups[0]["eps"], self.param_groups[0]["step"] * self.settings.directions
        loss = closure.value()
        slopes, directions = [], []
        for index in range(self.settings.directions):
            seed = step_seed(self.seed, first + index + 1)
            generator = generator_of(seed, params)
            directions.append(torch.cat([direction_like(p, generator).flatten() for p in params]))
            perturb_(params, seed, eps)
            slopes.append(float((closure.value() - loss) / eps))
            torch._foreach_copy_(params, start)
        self.follow(slopes, torch.stack(directions))
        return loss

    @torch.no_grad()
    def follow(self, slopes: Sequence[float], directions: Tensor) -> None:
        """Take the step of ``slopes`` [n] along ``directions`` [n, d], and remember where it ends."""
        settings, params = self.settings, [p for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            group["step"] += 1
        step = self.param_groups[0]["step"]
        point = torch.cat([p.flatten() for p in params])
        state = self.state[params[0]]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(point)
            state["past"] = point.new_zeros(settings.history, len(point))
            state["removed"] = point.new_zeros(0, len(point))
        gradient = subspace_gradient(slopes, directions, state["removed"])
        state["exp_avg"].lerp_(gradient, 1 - settings.beta1)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - settings.beta2)
        first = state["exp_avg"] / (1 - settings.beta1**step)
        second = (state["exp_avg_sq"] / (1 - settings.beta2**step)).sqrt_().add_(settings.adam_eps)
        moves = (first / second).split([p.numel() for p in params])
        rates = [float(group["lr"]) for group in self.param_groups for _ in group["params"]]
        for p, move, lr in zip(params, moves, rates, strict=True):
            p.sub_(move.view_as(p), alpha=lr)
        state["past"][(step - 1) % settings.history] = torch.cat([p.flatten() for p in params])
        if step % settings.history == 0:
            state["removed"] = quiet_directions(state["past"], settings.nu)


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's direction: a fixed function of the run's seed and the number of the step."""
    return int(np.random.default_rng([seed, step]).integers(SEEDS))


def generator_of(seed: int, params: Sequence[Tensor]) -> torch.Generator:
    """Return a generator of directions on the parameters' device."""
    return torch.Generator(params[0].device).manual_seed(seed)


def direction_like(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return the next normal draw of the shape and dtype of ``p``."""
    return torch.normal(0.0, 1.0, p.shape, generator=generator, dtype=p.dtype, device=p.device)


def perturb_(params: Sequence[Tensor], seed: int, length: float) -> None:
    """Add ``length`` times the direction of ``seed`` to ``params``, in place and in their order."""
    generator = generator_of(seed, params)
    for p in params:
        p.add_(direction_like(p, generator), alpha=length)


def subspace_gradient(slopes: Sequence[float], directions: Tensor, removed: Tensor) -> Tensor:
    """Return the estimate ĝ [d] from ``slopes`` along ``directions`` [n, d], free of ``removed`` [r, d]."""
    count, dimensions = directions.shape
    left = dimensions - len(removed)
    total = directions.new_tensor(list(slopes)) @ directions
    gradient = total / (count * ((left + count - 1) / count) ** 0.5)
    return gradient - removed.mT @ (removed @ gradient)


def quiet_directions(past: Tensor, nu: float) -> Tensor:
    """Return the directions, orthonormal rows [r, d], in which ``past`` [steps, d] hardly varies.

    These are the principal components of the standardized past that come after the first share of more than 1 - ν of
    its variance. Where they are as many as the steps, the last one has no variance at all, and rounding picks it. A
    past that is not finite has none.
    """
    if not bool(past.isfinite().all()):
        return past[:0]
    centred = past - past.mean(0)
    deviation = past.std(0, correction=0)
    standardized = centred / torch.where(deviation == 0, torch.ones_like(deviation), deviation)
    _, s, components = torch.linalg.svd(standardized - standardized.mean(0), full_matrices=False)
    shares = s.square().cumsum(0) / s.square().sum()
    beyond = (shares > 1 - nu).nonzero()
    first = int(beyond[0]) if len(beyond) else len(s)
    return components[first + 1 :]
