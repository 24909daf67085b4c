"""Every installed method keeps its contract, as ``methodbench check`` has it."""

from __future__ import annotations

import pytest

from methodbench.catalog import load_catalog
from methodbench.testing import contract_checks, run_checks

INSTALLED = load_catalog()
NAMES = sorted(INSTALLED.methods)
#: Checks of the entry and its hyperparameters, which run no method.
OF_THE_ENTRY = ("metadata", "import-budget", "implementation", "presets", "invalid-parameters", "parity")


def wrong(name: str, *, of_the_entry: bool) -> list[tuple[str, str, str]]:
    pytest.importorskip("torch")
    checks = [one for one in contract_checks(name, INSTALLED) if (one.name in OF_THE_ENTRY) == of_the_entry]
    assert checks
    return [
        (result.check.id, result.status, result.detail) for result in run_checks(checks) if not result.good
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_of_every_method_is_what_it_should_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Records are of the vectors that come with the project.
    monkeypatch.delenv("METHODBENCH_VECTORS", raising=False)
    assert wrong(name, of_the_entry=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_method_does_what_its_kind_and_its_properties_promise(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `methodbench check` draws more examples of each property; here every method has its turn.
    monkeypatch.setenv("METHODBENCH_CHECK_EXAMPLES", "1")
    assert wrong(name, of_the_entry=False) == []
