"""The space of hyperparameters in which a method is tuned: one per method, the same for every workload.

This is a rule of AlgoPerf (arXiv 2306.07179). A method declares its space as a class variable::

    SPACE: ClassVar[Space] = {"lr": Decades(3), "weight_decay": Choice((0.0, 0.1))}

Without one, the space of :data:`DEFAULT` is narrowed to the hyperparameters that the method has. The first
name is the one that matters most: the rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol


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
class Between:
    """Uniform in the logarithm between two positive numbers, wherever the configured value lies."""

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


#: How a configuration came about: as configured, by trials, without anything to tune, or as one of the trials.
Regime = Literal["default", "tuned", "self-tuning", "trial"]
_REGIMES: tuple[Regime, ...] = ("tuned", "self-tuning", "trial")


def points(method: Any, trials: int, seed: int) -> list[dict[str, Any]]:
    """Return the hyperparameters of each trial, a scrambled Sobol sequence over :func:`search_space`.

    Empty for a method whose space is: it tunes itself.
    """
    import warnings

    import numpy as np
    from scipy.stats import qmc

    space = search_space(method)
    if not space:
        return []
    with warnings.catch_warnings():
        # Balance is lost where the count is no power of two; AlgoPerf's five trials are none either.
        warnings.simplefilter("ignore")
        shares = qmc.Sobol(len(space), scramble=True, seed=np.random.default_rng(seed)).random(trials)
    return [
        {
            name: distribution.at(float(share), getattr(method, name))
            for (name, distribution), share in zip(space.items(), row, strict=True)
        }
        for row in shares
    ]


def labelled(variant: str, regime: Regime, number: int | None = None) -> str:
    """Return the label of a configuration with how it came about at its end."""
    end = regime if number is None else f"{regime} {number}"
    return f"{variant}, {end}" if variant else end


def regime(variant: str) -> Regime:
    """Return how the configuration with this label came about; see :func:`labelled`."""
    end = variant.rpartition(", ")[2].split(" ")[0]
    return next((one for one in _REGIMES if one == end), "default")


def is_trial(variant: str) -> bool:
    """Return whether the configuration with this label was only tried: it chose another, and is no result."""
    return regime(variant) == "trial"
