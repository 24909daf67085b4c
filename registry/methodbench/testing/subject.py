"""What the checks of all kinds share: the method under test, failing, skipping, and drawing examples."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import unittest
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor, nn

from methodbench import params
from methodbench.catalog import load_implementation
from methodbench.context import Context
from methodbench.entries import Method

#: Raised by a check that does not apply; unittest and pytest know it as a skipped test.
Skip = unittest.SkipTest


@dataclasses.dataclass(frozen=True)
class Subject:
    """A method under test: its entry and, imported when it is asked for, its implementation."""

    entry: Method

    @functools.cached_property
    def cls(self) -> type:
        """The implementation.

        Raises:
            AssertionError: it cannot be imported.
        """
        try:
            found: type = load_implementation(self.entry.impl)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            mend = "" if self.entry.impl.startswith(missing) else f": pip install {missing}"
            raise AssertionError(
                f"{self.entry.impl} needs the module {missing!r}, which is not there{mend}"
            ) from error
        except (Exception, SystemExit) as error:
            raise AssertionError(
                f"cannot import {self.entry.impl}: {type(error).__name__}: {error}"
            ) from error
        return found

    def build(self, **changes: object) -> Any:
        """Return the implementation at its defaults, with ``changes``."""
        return params.build(self.cls, changes, self.entry.name)

    def build_for_checks(self, changes: Mapping[str, object]) -> Any:
        """Return the implementation at its defaults but for ``check_params`` of the entry, with ``changes``."""
        return self.build(**{**self.entry.check_params, **changes})


class QuietContext(Context):
    """A context whose log is not shown: planted models are small, and remarks on that are no news."""

    def log(self, message: str) -> None:
        """Drop one line."""


def quiet(seed: int = 0) -> Context:
    """Return a context that keeps what a method has to say to itself."""
    return QuietContext(seed=seed)


def require(condition: bool, message: str) -> None:
    """Fail a check with ``message`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(message)


def for_all(holds: Callable[..., None], *draws: st.SearchStrategy, examples: int) -> None:
    """Run ``holds`` on examples drawn from ``draws``, the same ones every time, and shrink what fails.

    ``METHODBENCH_CHECK_EXAMPLES`` limits how many, for suites of many methods.

    Raises:
        AssertionError: with the message of the smallest failing example.
    """

    @settings(
        max_examples=min(examples, int(os.environ.get("METHODBENCH_CHECK_EXAMPLES") or examples)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(st.tuples(*draws))
    def run(drawn: tuple[Any, ...]) -> None:
        holds(*drawn)

    run()


def values_of(subject: Subject, field: str) -> list[Any]:
    """Return values of a hyperparameter to try, ascending: its choices, or five from its range.

    Raises:
        AssertionError: there is no such field, or its range has no end.
    """
    rows = {row["name"]: row for row in params.describe(subject.cls)}
    require(field in rows, f"{subject.entry.name} has no parameter {field!r}")
    choices = get_args(get_type_hints(subject.cls)[field])
    if choices and all(isinstance(choice, (int, float)) for choice in choices):
        return sorted(choices)
    schema = TypeAdapter(subject.cls).json_schema()["properties"][field]
    low, high = (
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum", schema.get("exclusiveMaximum")),
    )
    if low is None or high is None:
        raise AssertionError(f"{field} has no range: give its Field a lower and an upper bound")
    values = [low + (high - low) * k / 4 for k in range(5)]
    if rows[field]["type"] == "int":
        values = sorted({round(value) for value in values})
    open_ends = {schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")}
    return [value for value in values if value not in open_ends]


def fingerprint(what: nn.Module | Tensor) -> str:
    """Return a digest of a tensor's bytes, or of all tensors and hooks of a module."""
    digest = hashlib.sha256()
    tensors = what.state_dict() if isinstance(what, nn.Module) else {"": what}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(what, nn.Module):
        for name, module in what.named_modules():
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)
            digest.update(f"{name} {hooks}".encode())
        for name, parameter in what.named_parameters():
            digest.update(f"{name} {parameter.requires_grad} {parameter.grad is None}".encode())
    return digest.hexdigest()
