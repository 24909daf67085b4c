"""The training loop that the workloads share: one schedule, one order of data, and looks at data that is held out.

Everything that an optimizer could gain from but does not decide is fixed: the initialization, the batches and the
schedule (linear warm-up, then half a cosine) are the same for all of them under one seed. Looks are not timed.
Methods of training hook into the same loop: what they wrap is trained by the optimizer that their task fixes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from methodbench.protocols import OptimizerMethod, TrainingMethod
from methodbench.torchkit.closures import Closure, Evaluations, TrainingClosure, training_step
from methodbench.torchkit.size import state_bytes

if TYPE_CHECKING:
    from methodbench.context import Context


@dataclass(slots=True)
class Problem:
    """What is trained, and on what."""

    module: nn.Module
    loss: Callable[[Tensor, Any], Tensor]
    """Maps outputs and targets to a scalar."""
    batch: Callable[[int], tuple[Any, Any]]
    """Inputs and targets of a step, from 1."""
    look: Callable[[nn.Module], tuple[float, float]]
    """Loss and accuracy of the module on data that is held out."""
    head: Any = None
    """The last layer's weight, a parameter."""
    embeddings: Collection[Tensor] = ()
    base_fan_in: int = 0
    """Where rates are as configured; those of wider layers are lower in proportion (muParam). 0 for all alike."""


@dataclass(frozen=True, slots=True)
class Look:
    """What held-out data said after ``step`` steps, which took ``seconds``."""

    step: int
    seconds: float
    loss: float
    accuracy: float


@dataclass(slots=True)
class Course:
    """One training: the trained module, what was seen on the way, and what the optimizer asked for and kept."""

    module: nn.Module
    looks: list[Look] = dataclasses.field(default_factory=list)
    evaluations: Evaluations = dataclasses.field(default_factory=Evaluations)
    state_bytes: int = 0
    """Bytes of the tensors in the optimizer's state after the last step."""

    @property
    def losses(self) -> list[float]:
        return [look.loss for look in self.looks]

    @property
    def steps(self) -> int:
        return self.looks[-1].step

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end; infinite where the training diverged."""
        return self.looks[-1].loss if math.isfinite(self.looks[-1].loss) else math.inf

    def first(self, reached: Callable[[Look], bool]) -> Look | None:
        """Return the first look of which ``reached`` holds."""
        return next((look for look in self.looks if reached(look)), None)

    def facts(self) -> dict[str, Any]:
        """Return what every workload says of a training: evaluations, and the memory of the optimizer."""
        count = sum(p.numel() for p in self.module.parameters())
        return {
            "parameters": count,
            "optimizer_state_bytes": self.state_bytes,
            "optimizer_state_bytes_per_parameter": self.state_bytes / count,
            **self.evaluations.facts(),
        }


def train(
    method: OptimizerMethod,
    problem: Problem,
    ctx: Context,
    *,
    steps: int,
    evaluate_every: int,
    share: Callable[[int], float],
    training: TrainingMethod | None = None,
) -> Course:
    """Train ``problem.module`` in place; stop early only where the held-out loss is not finite any more.

    Args:
        share: share of the peak rate at a step, from 1; see :func:`schedule`.
        training: hooks into the loop; ``method`` trains what it wraps, which is the module of the course.
    """
    module = problem.module if training is None else training.wrap(problem.module, ctx)
    groups = param_groups(module, problem.head, problem.embeddings, problem.base_fan_in)
    scales = [group.pop("rate_scale", 1.0) for group in groups]
    optimizer = method.build(groups, ctx)
    peaks = [
        None if group.get("lr") is None else group["lr"] * scale
        for group, scale in zip(optimizer.param_groups, scales, strict=True)
    ]
    params = list(module.parameters())

    def look() -> tuple[float, float]:
        module.eval()
        seen = problem.look(module)
        module.train()
        return seen

    course = Course(module, [Look(0, 0.0, *look())])
    seconds = 0.0
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            if peak is not None:
                group["lr"] = peak * share(step)
        inputs, targets = problem.batch(step)
        of_batch = (problem.loss, inputs, targets, course.evaluations)
        if training is None:
            closure = Closure(params, module, *of_batch)
            optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, its optimizers take the tensor
        else:
            training_step(optimizer, TrainingClosure(training, module, step - 1, *of_batch))
        seconds += time.perf_counter() - begin
        if step % evaluate_every == 0 or step == steps:
            course.looks.append(Look(step, seconds, *look()))
            if not math.isfinite(course.looks[-1].loss):
                break
    module.eval()
    course.state_bytes = state_bytes(optimizer)
    return course


def param_groups(
    module: nn.Module, head: Any, embeddings: Collection[Tensor] = (), base_fan_in: int = 0
) -> list[dict[str, Any]]:
    """Return the parameters by role; with ``base_fan_in``, matrices and the head by fan-in as well.

    ``head`` is the last layer's weight, ``embedding`` what is looked up, ``matrix`` every other weight of two or more
    dimensions (kernels of convolutions included), ``vector`` the rest. What asks for no gradient has no role.
    ``rate_scale`` is then ``base_fan_in`` over the fan-in, by which muParam multiplies rates (arXiv 2309.14322);
    embeddings and vectors keep theirs.
    """
    looked_up = {id(p) for p in embeddings}
    groups: dict[tuple[str, int], list[nn.Parameter]] = {}
    for p in module.parameters():
        if not p.requires_grad:
            continue
        if p is head:
            role = "head"
        elif id(p) in looked_up:
            role = "embedding"
        else:
            role = "matrix" if p.ndim >= 2 else "vector"
        fan_in = p[0].numel() if base_fan_in and role in ("matrix", "head") else 0
        groups.setdefault((role, fan_in), []).append(p)
    order = ("matrix", "vector", "embedding", "head")
    return [
        {"params": params, "role": role, **({"rate_scale": base_fan_in / fan_in} if fan_in else {})}
        for (role, fan_in), params in sorted(
            groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
        )
    ]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak rate at ``step`` (from 1): linear to 1, then half a cosine towards 0."""
    rising = round(steps * warmup)
    if step <= rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - rising) / (steps - rising)))


def batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Return the indices of each step's batch: epochs shuffled by ``seed``, without incomplete batches."""
    size = min(size, count)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    while len(chosen) < steps:
        chosen += [
            batch for batch in torch.randperm(count, generator=generator).split(size) if len(batch) == size
        ]
    return chosen[:steps]
