"""What plugin authors and the test suite run against a method.

>>> from methodbench.testing import contract
>>> @contract("my-method")
... def test_contract(check):
...     check()

``methodbench check NAME`` and ``pytest --methodbench=NAME`` run the same checks without a file of tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.testing.checks import Check, Result


def contract_checks(name: str, catalog: Catalog | None = None, *, run_parity: bool = False) -> list[Check]:
    """Return the checks of the method called ``name``; see :func:`methodbench.testing.checks.contract_checks`."""
    from methodbench.testing import checks as suite

    return suite.contract_checks(name, catalog, run_parity=run_parity)


def run_checks(checks: Iterable[Check], only: str = "") -> Iterator[Result]:
    """Run checks and yield what came of each; see :func:`methodbench.testing.checks.run_checks`."""
    from methodbench.testing import checks as suite

    return suite.run_checks(checks, only)


def contract(*names: str) -> Any:
    """Return the pytest decorator that calls a test with every check of these methods as ``check``.

    Failures that an entry expects are marked as strict xfail with their reason.
    """
    import pytest

    marked = []
    for name in names:
        for check in contract_checks(name):
            marks = (
                [pytest.mark.xfail(reason=check.expected_failure, strict=True)]
                if check.expected_failure
                else []
            )
            marked.append(pytest.param(check, id=check.id, marks=marks))
    return pytest.mark.parametrize("check", marked)
