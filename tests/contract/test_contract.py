"""The contract suite finds every fault that it is there for, and nothing in a method without one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from methodbench import hookspecs
from methodbench.catalog import Catalog, load_catalog
from methodbench.properties import PROPERTIES, PropertyError, parse
from methodbench.testing import contract_checks, run_checks
from methodbench.testing.checks import Result

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"


@pytest.fixture(scope="module")
def faulty() -> Catalog:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLUGINS))
        patch.setenv("PYTHONPATH", str(PLUGINS))
        catalog = load_catalog(points=[EntryPoint("faulty", "faulty.plugin", hookspecs.GROUP)])
        assert catalog.problems == []
        yield catalog


@pytest.fixture
def outcome(faulty: Catalog) -> Callable[[str, str], Result]:
    def run(method: str, check: str) -> Result:
        checks = {one.name: one for one in contract_checks(method, faulty)}
        (result,) = run_checks([checks[check]])
        return result

    return run


FAULTS = [
    ("compressor-writes", "no-input-mutation", "changed the weights"),
    ("compressor-random", "deterministic", "two runs with one seed differ"),
    ("compressor-zeros", "planted-outliers", "blocks of zeros"),
    ("compressor-zeros", "planted-codes", "zeros would give 1"),
    ("compressor-hidden-state", "state-dict", "lacks what they depend on"),
    ("compressor-dense", "runs-on-causal-lm", "storage is 'dense'"),
    ("compressor-not-monotone", "monotone:bits", "relative error"),
    ("compressor-absolute-grid", "scale-equivariant", "weights times"),
    ("compressor-neighbours", "channel-permutation-equivariant", "permuted channels"),
    ("compressor-wrong-dtype", "dtype-stable", "are torch.float32"),
    ("optimizer-forgets", "state-dict", "goes on from state_dict"),
    ("optimizer-writes", "no-input-mutation", "the gradient of parameter 0 has changed after step 1"),
    ("optimizer-ascends", "planted-quadratic", "at every rate tried"),
    ("optimizer-no-loss", "runs", "returned None"),
    ("explainer-hook", "no-input-mutation", "hooks"),
    ("explainer-off-target", "planted-evidence", "of the maps' mass"),
    ("explainer-batch-scale", "batch-split-invariant", "in parts of"),
    ("explainer-range", "runs-on-cnn", "not in [0, 1]"),
    ("zeroer", "metadata", "summary must be a sentence"),
    ("zeroer", "metadata", "'sparkling' is not in the vocabulary"),
    ("zeroer", "metadata", "must read 'monotone:FIELD or -FIELD'"),
    ("zeroer", "exact-sparsity:sparsity", "zeros at sparsity"),
    ("zeroer", "identity-at:sparsity=0", "at sparsity=0"),
    ("undescribed", "implementation", "no description for first"),
    ("undescribed", "presets", "no parameter 'third'"),
    ("undescribed", "metadata", "parity does not say"),
    ("undescribed", "parity", "names no file"),
    ("absent", "implementation", "Absent"),
]


@pytest.mark.parametrize(("method", "check", "message"), FAULTS, ids=[f"{m}::{c}" for m, c, _ in FAULTS])
def test_a_fault_is_found_by_its_check(
    outcome: Callable[[str, str], Result], method: str, check: str, message: str
) -> None:
    result = outcome(method, check)
    assert result.status == "failed"
    assert message in result.detail


@pytest.mark.parametrize("kind", ["compressor", "optimizer", "explainer"])
def test_a_method_without_fault_passes_everything(faulty: Catalog, kind: str) -> None:
    results = list(run_checks(contract_checks(f"{kind}-none", faulty)))
    assert [(r.check.id, r.detail) for r in results if not r.good] == []
    assert len(results) > 10


def test_expected_failures_are_told_from_passes_that_were_not_expected(
    outcome: Callable[[str, str], Result],
) -> None:
    expected = outcome("forgiven", "state-dict")
    assert (expected.status, expected.detail, expected.good) == (
        "expected-failure",
        "the count of steps is not kept",
        True,
    )
    surprise = outcome("forgiven", "runs")
    assert (surprise.status, surprise.good) == ("unexpected-pass", False)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("quick", "compressor", "not in the vocabulary"),
        ("idempotent", "optimizer", "not for a optimizer"),
        ("idempotent:bits", "compressor", "must read 'idempotent'"),
        ("identity-at:bits", "compressor", "must read 'identity-at:FIELD=VALUE"),
        ("channel-permutation-equivariant:out", "compressor", "must read"),
    ],
)
def test_properties_are_read_strictly(text: str, kind: str, message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        parse(text, kind)


def test_settings_of_a_property_are_typed() -> None:
    settings = parse("identity-at:sparsity=0.5,transform=false,mask_by=topk", "compressor").settings()
    assert settings == {"sparsity": 0.5, "transform": False, "mask_by": "topk"}


def test_every_property_has_a_test_for_every_kind_that_it_names(faulty: Catalog) -> None:
    from methodbench.properties import ALWAYS
    from methodbench.testing.checks import _of_kind
    from methodbench.testing.subject import Subject

    for kind in ("compressor", "optimizer", "explainer"):
        tests = _of_kind(kind, 1, Subject(faulty.method(f"{kind}-none")))
        named = {name for name, word in PROPERTIES.items() if kind in word.meaning and name not in ALWAYS}
        assert tests.keys() == named


def test_a_heavy_plugin_module_is_over_its_import_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy_plugin.py").write_text(
        textwrap.dedent(
            """
            import numpy
            from methodbench import hookimpl
            from methodbench.entries import Method

            @hookimpl
            def methodbench_methods():
                return [Method(name="heavy", kind="probe", family="f", impl="a.b:C", summary="Imports the world.")]
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    catalog = load_catalog(points=[EntryPoint("heavy", "heavy_plugin", hookspecs.GROUP)])
    check = next(one for one in contract_checks("heavy", catalog) if one.name == "import-budget")
    (result,) = run_checks([check])
    assert "heavy_plugin imports numpy" in result.detail
    sys.modules.pop("heavy_plugin", None)


def test_pytest_runs_the_contract_of_an_installed_method(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--methodbench=identity",
            "-q",
            "-k",
            "metadata or presets or parity",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    unknown = subprocess.run(
        [sys.executable, "-m", "pytest", "--methodbench=identty", "-q"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Did you mean identity" in unknown.stderr + unknown.stdout
