"""Fair tuning: the same number of quasi-random trials over the space that each method declares.

The rules are those of AlgoPerf (arXiv 2306.07179) in small: one space per method, the same for every workload, and
trials of a scrambled Sobol sequence, which covers the space evenly at any count. A method declares its space as a
class variable::

    SPACE: ClassVar[Space] = {"lr": Decades(3), "weight_decay": Choice((0.0, 0.1))}

Without one, the space of :data:`DEFAULT` is narrowed to the hyperparameters that the method has. The first
name is the one that matters most: the rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Distribution(Protocol):
    """What a hyperparameter may be."""

    def at(self, share: float, configured: Any) -> Any:
        """Return the value at ``share`` in [0, 1) of the space, around the configured value where that matters."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Decades:
    """Uniform in the logarithm, ``width`` powers of ten centred on the configured value."""

    width: float

    def at(self, share: float, configured: Any) -> float:
        return float(configured * 10 ** (self.width * (share - 0.5)))


@dataclasses.dataclass(frozen=True, slots=True)
class LogUniform:
    """Uniform in the logarithm from ``low`` to ``high``."""

    low: float
    high: float

    def at(self, share: float, configured: Any) -> float:
        return float(self.low * (self.high / self.low) ** share)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One of ``values``, each as likely."""

    values: Sequence[Any]

    def at(self, share: float, configured: Any) -> Any:
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]


Space = Mapping[str, Distribution]

#: Three decades of rates, and weight decay in each method's own meaning.
DEFAULT: Space = {"lr": Decades(3.0), "weight_decay": Choice((0.0, 1e-4, 1e-3, 1e-2, 1e-1))}


def search_space(method: Any) -> Space:
    """Return the space that the class of ``method`` declares, or what it has of :data:`DEFAULT`."""
    declared: Space | None = getattr(type(method), "SPACE", None)
    if declared is not None:
        return declared
    fields = (
        {field.name for field in dataclasses.fields(method)} if dataclasses.is_dataclass(method) else set()
    )
    return {name: distribution for name, distribution in DEFAULT.items() if name in fields}


def sobol(method: T, count: int, seed: int) -> list[T]:
    """Return ``count`` variants of ``method``, drawn from its space by a scrambled Sobol sequence.

    Args:
        method: its other hyperparameters are kept. A method without a space is returned as it is, once.
        seed: of the scrambling; the points are the same for every method whose space has as many dimensions.
    """
    space = search_space(method)
    if not space:
        return [method]
    from scipy.stats import qmc

    points = qmc.Sobol(len(space), scramble=True, seed=seed).random_base2(max(0, math.ceil(math.log2(count))))
    return [
        dataclasses.replace(
            method,  # type: ignore[type-var]
            **{
                name: distribution.at(float(share), getattr(method, name))
                for (name, distribution), share in zip(space.items(), point, strict=True)
            },
        )
        for point in points[:count]
    ]


def sensitivity(losses: Sequence[float], start: float) -> float:
    """Return how much a method loses over its trials: mean of min(loss, start) less the lowest loss.

    0 where all trials end alike (LR sensitivity of arXiv 2309.14322, over trials instead of a grid of rates).

    Args:
        losses: final loss of each trial; a diverged one, not finite, counts as ``start``.
        start: loss before the first step.

    Raises:
        ValueError: there is no trial.
    """
    if not losses:
        raise ValueError("there is no trial")
    capped = [min(loss, start) if math.isfinite(loss) else start for loss in losses]
    return sum(capped) / len(capped) - min(capped)
