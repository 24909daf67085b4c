"""The contract of optimizers, on given gradients and on quadratics with a known condition number."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.errors import ParameterError
from methodbench.properties import Promise
from methodbench.testing import planted
from methodbench.testing.subject import Skip, Subject, for_all, quiet, require
from methodbench.torchkit.closures import Closure
from methodbench.tuning import search_space

SEEDS = st.integers(0, 2**16)
SCALES = st.sampled_from([2.0**k for k in range(-4, 5) if k])
STEPS = 12
SCORED_STEPS = 200
CONDITION = 100.0
#: Multiples of the default learning rate that the score may choose from: papers tune it to the problem.
RATES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclasses.dataclass(frozen=True)
class Walk:
    """Parameters and gradients of a matrix [6, 5] and a vector [7] over a few steps."""

    start: tuple[Tensor, Tensor]
    gradients: tuple[Tensor, Tensor]
    """[steps, 6, 5] and [steps, 7]."""


def walk(seed: int, steps: int = STEPS) -> Walk:
    """Draw a start and gradients of about unit size."""
    draw = planted.generator(seed)
    shapes = (6, 5), (7,)
    starts = [torch.randn(shape, generator=draw) for shape in shapes]
    gradients = [torch.randn(steps, *shape, generator=draw) for shape in shapes]
    return Walk((starts[0], starts[1]), (gradients[0], gradients[1]))


class Optimizers:
    """Runs one optimizer on given gradients and on planted problems."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.forward_only = "forward-only" in subject.entry.needs
        self.by_gradient = not {"forward-only", "closure"} & set(subject.entry.needs)

    def optimizer(
        self, groups: Sequence[dict[str, Any]], changes: Mapping[str, Any] | None = None
    ) -> torch.optim.Optimizer:
        torch.manual_seed(0)
        built: torch.optim.Optimizer = self.subject.build_for_checks(changes or {}).build(groups, quiet())
        return built

    def follow(self, given: Walk, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return the parameters after each step of given gradients, flat: a tensor [42] per step.

        The closure's loss is linear in the parameters, so that its gradient is the given one wherever they are.
        """
        params = [nn.Parameter(start.to(dtype, copy=True)) for start in given.start]
        optimizer = self.optimizer(
            [{"params": [params[0]], "role": "matrix"}, {"params": [params[1]], "role": "vector"}]
        )
        path = []
        for step in range(len(given.gradients[0])):
            optimizer.step(self._linear(params, [g[step].to(dtype) for g in given.gradients]))  # type: ignore[arg-type]
            path.append(torch.cat([p.detach().flatten() for p in params]))
        return path

    def _linear(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Closure:
        def model(_: None) -> Tensor:
            return torch.stack([(p * g).sum() for p, g in zip(params, gradients, strict=True)])

        return Closure(params, model, lambda outputs, _: outputs.sum())

    # What is checked of every optimizer.

    def runs(self) -> str:
        given = walk(1)
        params = [nn.Parameter(start.clone()) for start in given.start]
        optimizer = self.optimizer([{"params": params, "role": "matrix"}])
        require(
            isinstance(optimizer, torch.optim.Optimizer),
            f"build returned {type(optimizer).__name__}, not torch.optim.Optimizer",
        )
        closure = self._linear(params, [g[0] for g in given.gradients])
        with torch.no_grad():
            expected = sum(float((p * g[0]).sum()) for p, g in zip(params, given.gradients, strict=True))
        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
        require(loss is not None, "step(closure) returned None, not the closure's loss")
        loss = float(torch.as_tensor(loss).detach())
        # A forward-only method may return the loss at its perturbed point, as it sees no other.
        require(
            math.isclose(loss, expected, rel_tol=1e-4, abs_tol=0.1 * self.forward_only),
            f"step(closure) returned {loss:.6g}; the loss before the step is {expected:.6g}",
        )
        for index, (parameter, start) in enumerate(zip(params, given.start, strict=True)):
            require(bool(parameter.isfinite().all()), f"parameter {index} is not finite after a step")
            require(not torch.equal(parameter, start), f"parameter {index} has not moved")
        return ""

    def no_input_mutation(self) -> str:
        if not self.by_gradient:
            raise Skip("the method does not use the gradients of parameters")
        given = walk(2)
        params = [nn.Parameter(start.clone()) for start in given.start]
        optimizer = self.optimizer([{"params": params, "role": "matrix"}])
        for step in range(STEPS):
            for parameter, gradient in zip(params, given.gradients, strict=True):
                parameter.grad = gradient[step].clone()
            optimizer.step(lambda: 0.0)
            for index, (parameter, gradient) in enumerate(zip(params, given.gradients, strict=True)):
                kept = parameter.grad is not None and torch.equal(parameter.grad, gradient[step])
                require(kept, f"the gradient of parameter {index} has changed after step {step + 1}")
        return ""

    def deterministic(self) -> str:
        first, second = (self.follow(walk(3)) for _ in range(2))
        for step, (a, b) in enumerate(zip(first, second, strict=True)):
            require(torch.equal(a, b), f"two runs with one seed part at step {step + 1}")
        return ""

    def state_dict(self) -> str:
        """Stop half way, go on from the state dict in an optimizer of its own, and arrive at the same place."""
        given = walk(4)
        expected = self.follow(given)[-1]
        params = [nn.Parameter(start.clone()) for start in given.start]
        groups = [{"params": [params[0]], "role": "matrix"}, {"params": [params[1]], "role": "vector"}]
        optimizer = self.optimizer([dict(group) for group in groups])
        for step in range(STEPS):
            if step == STEPS // 2:
                state = optimizer.state_dict()
                optimizer = self.subject.build_for_checks({}).build(
                    [dict(group) for group in groups], quiet()
                )
                optimizer.load_state_dict(state)
            optimizer.step(self._linear(params, [g[step] for g in given.gradients]))  # type: ignore[arg-type]
        actual = torch.cat([p.detach().flatten() for p in params])
        require(
            torch.equal(actual, expected),
            f"a run that goes on from state_dict ends {float((actual - expected).abs().max()):.2g} away",
        )
        return ""

    def score(self) -> str:
        """Score the gap on quadratics of condition 100 after 200 steps, at the best of a few learning rates."""
        best = self.best_gaps(SCORED_STEPS, seeds=2)
        ratio, rate = min(best)
        bound = ((CONDITION - 1) / (CONDITION + 1)) ** (2 * SCORED_STEPS)
        require(
            ratio < 0.9, f"the gap is {ratio:.3g} of its start after {SCORED_STEPS} steps at every rate tried"
        )
        at = f" at {rate:g} x the default rate" if rate else ""
        return f"gap {ratio:.2g} of its start after {SCORED_STEPS} steps{at} (gradient descent's bound {bound:.2g})"

    def best_gaps(self, steps: int, seeds: int) -> list[tuple[float, float]]:
        """Return (gap after the steps over the gap before, multiple of the default rate) for every rate."""
        configured = self.subject.build_for_checks({})
        name = next(iter(search_space(configured)), "")
        rate = getattr(configured, name, None)
        choices: list[dict[str, Any]] = [{name: rate * k} for k in RATES] if isinstance(rate, float) else [{}]
        found = []
        for changes in choices:
            ratios = []
            for seed in range(seeds):
                problem = planted.quadratic(seed, CONDITION)
                try:
                    gaps = planted.descend(problem, functools.partial(self.optimizer, changes=changes), steps)
                except ParameterError:
                    continue
                ratios.append(float(gaps[-1] / gaps[0]))
            if len(ratios) == seeds:
                mean = math.exp(sum(math.log(max(ratio, 1e-300)) for ratio in ratios) / seeds)
                multiple = changes[name] / rate if changes and rate else 0.0
                found.append((mean if math.isfinite(mean) else math.inf, multiple))
        return found

    # Declared properties.

    def gradient_scale_invariant(self, _: Promise) -> str:
        def holds(scale: float, seed: int) -> None:
            given = walk(seed)
            scaled = Walk(given.start, (given.gradients[0] * scale, given.gradients[1] * scale))
            self._same(self.follow(scaled), self.follow(given), f"gradients times {scale}")

        for_all(holds, SCALES, SEEDS, examples=12)
        return ""

    def channel_permutation_equivariant(self, _: Promise) -> str:
        def holds(seed: int) -> None:
            given = walk(seed)
            rows = torch.randperm(6, generator=planted.generator(seed))
            moved = Walk(
                (given.start[0][rows], given.start[1]), (given.gradients[0][:, rows], given.gradients[1])
            )
            expected = [torch.cat([p[:30].view(6, 5)[rows].flatten(), p[30:]]) for p in self.follow(given)]
            self._same(self.follow(moved), expected, "permuted rows")

        for_all(holds, SEEDS, examples=12)
        return ""

    def dtype_stable(self, _: Promise) -> str:
        given = walk(5)
        single = self.follow(given)
        for dtype, resolution in ((torch.float64, 1e-4), (torch.bfloat16, 0.05)):
            path = self.follow(given, dtype=dtype)
            require(path[-1].dtype == dtype, f"{dtype} parameters became {path[-1].dtype}")
            require(bool(path[-1].isfinite().all()), f"{dtype} parameters are not finite after {STEPS} steps")
            distance = float((path[-1].double() - single[-1].double()).norm() / single[-1].double().norm())
            require(
                distance <= resolution,
                f"{dtype} ends {distance:.2g} of the parameters' norm away from float32",
            )
        return ""

    def _same(self, path: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
        moved = float((expected[-1] - expected[0]).norm())
        away = float((path[-1] - expected[-1]).norm())
        require(away <= 1e-4 * moved, f"{what} end {away:.3g} away, after a way of {moved:.3g}")


def checks(subject: Subject) -> Mapping[str, Callable[[], str]]:
    """Return the checks that every optimizer must pass, by name."""
    bench = Optimizers(subject)
    return {
        "runs": bench.runs,
        "no-input-mutation": bench.no_input_mutation,
        "deterministic": bench.deterministic,
        "state-dict": bench.state_dict,
        "planted-quadratic": bench.score,
    }


def promises(subject: Subject) -> Mapping[str, Callable[[Promise], str]]:
    """Return the tests of the properties that an optimizer can declare, by name."""
    bench = Optimizers(subject)
    return {
        "gradient-scale-invariant": bench.gradient_scale_invariant,
        "channel-permutation-equivariant": bench.channel_permutation_equivariant,
        "dtype-stable": bench.dtype_stable,
    }
