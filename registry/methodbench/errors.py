"""Errors that a user can mend. Each says what is wrong, where, and how to mend it.

The command line prints them as one message without a traceback and exits with code 2 (``--debug`` shows the
traceback). Anything else that escapes is a bug of methodbench and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MethodbenchError(Exception):
    """A problem that the user can mend.

    Args:
        message: what is wrong and where.
        hint: how to mend it; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UnknownNameError(MethodbenchError):
    """A name that no plugin registers; the hint lists the nearest ones."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        if near:
            hint = f"Did you mean {' or '.join(near)}?"
        elif names:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            hint = f"Known {what}s: {shown}"
        else:
            hint = f"No {what} is registered: see `methodbench doctor`."
        super().__init__(f"unknown {what} {name!r}", hint)


class ParameterError(MethodbenchError):
    """A hyperparameter that does not exist, has the wrong type or lies outside its range."""


class SuiteError(MethodbenchError):
    """A suite file that does not say what it must; the message names file, line and key."""


class ClaimsError(MethodbenchError):
    """A file of claims that does not say what it must; the message names file, line and key."""


class SourceError(MethodbenchError):
    """Weights or data that cannot be fetched, or are not what they should be."""


class MissingExtraError(MethodbenchError):
    """An optional dependency that is not installed; the hint is the install line.

    Args:
        what: what needs it.
        module: the package that is missing.
        install: what to give to ``pip install``, for example ``"methodbench[quant]"``; by default the package.
    """

    def __init__(self, what: str, module: str, install: str = "") -> None:
        super().__init__(
            f"{what} needs the package {module!r}, which is not installed",
            f"pip install '{install or module}'",
        )


class StoreError(MethodbenchError):
    """A database that cannot be opened, read or written."""


class NotApplicableError(MethodbenchError):
    """Raised inside a worker by a method that cannot run on this model: recorded as not-applicable."""


class DivergedError(MethodbenchError):
    """Raised inside a worker when the result is not finite: recorded as failed with this reason."""


class CapsuleError(MethodbenchError):
    """A file of records that cannot be written, or that is not to be trusted."""
