"""The contract suite: what every method promises by being one, and what it declares on top.

:func:`contract_checks` generates the checks of a method from its entry alone. A check is called without arguments;
it returns a remark (a score, say), raises AssertionError when the method breaks the contract, and
``unittest.SkipTest`` where it does not apply, so that pytest and unittest understand it as it is.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from methodbench import params
from methodbench.catalog import IMPORT_BUDGET, Catalog, load_catalog
from methodbench.contract import GOOD, Outcome, Status
from methodbench.entries import Method
from methodbench.errors import MissingExtraError, ParameterError
from methodbench.parity import records_of
from methodbench.properties import ALWAYS, PropertyError, parse
from methodbench.protocols import KINDS
from methodbench.testing.subject import Skip, Subject, require

#: Modules that no plugin module may import: they cost more than everything else together.
HEAVY = ("torch", "transformers", "timm", "numpy", "scipy", "sklearn", "pandas", "polars", "sqlmodel", "jax")

#: Kind of method -> (checks, tests of declared properties), as ``module:function`` of this package.
_KINDS = {
    "compressor": ("compressors:checks", "compressors:promises"),
    "optimizer": ("optimizers:checks", "optimizers:promises"),
    "explainer": ("explainers:checks", "explainers:promises"),
    "training": ("others:training_checks", "others:no_promises"),
    "segmenter": ("others:segmenter_checks", "others:no_promises"),
    "probe": ("others:probe_checks", "others:no_promises"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one method."""

    method: str
    name: str
    run: Callable[[], str]
    expected_failure: str = ""
    """Why the method is known to fail it; empty where it must pass."""

    @property
    def id(self) -> str:
        """Stable name of the check, ``method::check``."""
        return f"{self.method}::{self.name}"

    def __call__(self) -> str:
        """Run it; return its remark."""
        return self.run() or ""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a check."""

    check: Check
    status: Status
    detail: str
    """Remark, reason or message."""
    seconds: float

    @property
    def good(self) -> bool:
        """Whether nothing has to be mended."""
        return self.status in GOOD

    @property
    def outcome(self) -> Outcome:
        """The result as records keep it: without the place in the source, which is of this machine."""
        first = self.detail.strip().partition("\n")[0]
        return Outcome(
            name=self.check.name, status=self.status, detail="" if first.startswith("at /") else first
        )


def contract_checks(name: str, catalog: Catalog | None = None, *, run_parity: bool = False) -> list[Check]:
    """Return the checks of the method called ``name``, cheap ones first.

    Args:
        run_parity: also run the parity tests, where they are below the current folder.

    Raises:
        UnknownNameError: no plugin registers it.
    """
    known = catalog or load_catalog()
    entry = known.method(name)
    subject = Subject(entry)
    general: dict[str, Callable[[], str]] = {
        "metadata": lambda: _metadata(entry),
        "import-budget": lambda: _import_budget(entry, known),
        "implementation": lambda: _implementation(subject),
        "presets": lambda: _presets(subject),
        "invalid-parameters": lambda: _invalid_parameters(subject),
        "parity": lambda: _parity(entry, known, run=run_parity),
    }
    found = {**general, **_of_kind(entry.kind, 0, subject)}
    tests = _of_kind(entry.kind, 1, subject)
    for text in entry.properties:
        try:
            promise = parse(text, entry.kind)
        except PropertyError:
            continue  # named by the check of the metadata
        if promise.name not in ALWAYS:
            found[text] = functools.partial(tests[promise.name], promise)
    return [Check(name, title, run, entry.expected_failures.get(title, "")) for title, run in found.items()]


def run_checks(checks: Iterable[Check], only: str = "") -> Iterator[Result]:
    """Run checks one by one and yield what came of each.

    Args:
        only: run the checks whose name, or id, matches this pattern (``*`` and ``?``), or holds it.
    """
    for check in checks:
        pattern = only if "*" in only or "?" in only else f"*{only}*"
        if only and not (fnmatch.fnmatch(check.name, pattern) or fnmatch.fnmatch(check.id, pattern)):
            continue
        start = time.perf_counter()
        status, detail = _outcome(check)
        yield Result(check, status, detail, time.perf_counter() - start)


def _outcome(check: Check) -> tuple[Status, str]:
    try:
        remark = check()
    except (Skip, MissingExtraError) as reason:
        return "skipped", str(reason)
    except AssertionError as error:
        status: Status = "expected-failure" if check.expected_failure else "failed"
        return status, check.expected_failure or str(error) or _where(error)
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip()}\n{_where(error)}"
        return ("expected-failure", check.expected_failure) if check.expected_failure else ("failed", message)
    if check.expected_failure:
        return "unexpected-pass", f"passes although expected_failures says: {check.expected_failure}"
    return "passed", remark


def _where(error: BaseException) -> str:
    """Return the innermost line that is not of a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""


def _of_kind(kind: str, which: int, subject: Subject) -> dict[str, Callable[..., Any]]:
    from importlib import import_module

    module, _, function = _KINDS[kind][which].partition(":")
    return dict(getattr(import_module(f"methodbench.testing.{module}"), function)(subject))


def _metadata(entry: Method) -> str:
    wrong = []
    if not entry.summary.rstrip().endswith(".") or len(entry.summary.split()) < 3:
        wrong.append("summary must be a sentence that says what the method does")
    if entry.paper is None and entry.fidelity != "baseline" and not entry.parity:
        wrong.append(
            "there is neither a paper nor code that it was compared with, and fidelity is not 'baseline'"
        )
    if entry.paper is not None and not (entry.paper.year or entry.paper.arxiv):
        wrong.append("paper has neither a year nor an arXiv number")
    if entry.fidelity in ("authors-code", "reimplementation") and not entry.parity:
        wrong.append(
            f"fidelity is {entry.fidelity!r}, but parity does not say which code it was compared with"
        )
    if entry.kind in ("compressor", "explainer", "probe") and not entry.applies_to:
        wrong.append("applies_to names no kind of model")
    for text in entry.properties:
        try:
            parse(text, entry.kind)
        except PropertyError as error:
            wrong.append(str(error))
    names = {*entry.properties, *_names_of_checks(entry)}
    wrong += [
        f"expected_failures names {name!r}, which is no check"
        for name in entry.expected_failures
        if name not in names
    ]
    require(not wrong, "\n".join(wrong))
    return ""


def _names_of_checks(entry: Method) -> list[str]:
    general = ["metadata", "import-budget", "implementation", "presets", "invalid-parameters", "parity"]
    return [*general, *_of_kind(entry.kind, 0, Subject(entry))]


def _import_budget(entry: Method, catalog: Catalog) -> str:
    owner = catalog.owners.get(("method", entry.name), "")
    module = next((plugin.module for plugin in catalog.plugins if plugin.name == owner), "")
    require(bool(module), "no installed plugin registers the method")
    seconds, heavy, error = _import_alone(module)
    require(not error, f"{module} cannot be imported on its own: {error}")
    require(not heavy, f"{module} imports {', '.join(heavy)}: name implementations as strings instead")
    require(
        seconds <= IMPORT_BUDGET,
        f"{module} takes {seconds:.2f} CPU seconds to import; the budget is {IMPORT_BUDGET:.2f}",
    )
    return f"{seconds * 1000:.0f} ms"


@functools.cache
def _import_alone(module: str) -> tuple[float, tuple[str, ...], str]:
    """Import a module in a process of its own; return CPU seconds, heavy modules that come with it, and the error."""
    code = (
        "import sys, time, methodbench, methodbench.entries, methodbench.hookspecs\n"
        "start = time.process_time()\n"
        f"__import__({module!r})\n"
        f"print(time.process_time() - start, *sorted(sys.modules.keys() & set({HEAVY!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        return 0.0, (), done.stderr.strip()[-300:] or f"exit code {done.returncode}"
    # The module itself may print.
    seconds, *heavy = done.stdout.splitlines()[-1].split()
    return float(seconds), tuple(heavy), ""


def _implementation(subject: Subject) -> str:
    protocol = KINDS[subject.entry.kind]
    asked = [name for name in vars(protocol) if not name.startswith("_") and callable(vars(protocol)[name])]
    missing = [name for name in asked if not callable(getattr(subject.cls, name, None))]
    require(
        not missing,
        f"{subject.entry.impl} has no {' and no '.join(missing)}: a {subject.entry.kind} needs it",
    )
    require(bool((subject.cls.__doc__ or "").strip()), f"{subject.entry.impl} has no docstring")
    try:
        rows = params.describe(subject.cls)
    except Exception as error:
        raise AssertionError(
            f"{subject.entry.impl} is no hyperparameter class: use @hyperparameters ({error})"
        ) from error
    silent = [row["name"] for row in rows if not row["description"]]
    require(not silent, f"no description for {', '.join(silent)}: Annotated[type, Field(description=...)]")
    required = [row["name"] for row in rows if row["required"]]
    require(not required, f"no default for {', '.join(required)}: give the paper's")
    subject.build()
    return f"{len(rows)} parameters"


def _presets(subject: Subject) -> str:
    for name, values in subject.entry.presets.items():
        try:
            subject.build(**values)
        except ParameterError as error:
            raise AssertionError(f"preset {name}: {error.message}") from error
    try:
        subject.build_for_checks({})
    except ParameterError as error:
        raise AssertionError(f"check_params: {error.message}") from error
    return f"{len(subject.entry.presets)} presets"


def _invalid_parameters(subject: Subject) -> str:
    """Pass wrong types, values out of range and an unknown name; each must be refused by the field's name."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(subject.cls).json_schema().get("properties", {})
    tries: list[tuple[str, Any]] = [("no_such_parameter", 1)]
    for name, spec in schema.items():
        options = spec.get("anyOf", [spec])
        if all(option.get("type") != "object" and option for option in options):
            tries.append((name, {"not": "valid"}))
        for key, step in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1), ("exclusiveMaximum", 0)):
            if key in spec:
                tries.append((name, spec[key] + step))
    for name, value in tries:
        try:
            subject.build(**{name: value})
        except ParameterError as error:
            require(
                name in error.message, f"{name} = {value!r} is refused without naming it: {error.message}"
            )
        except Exception as error:
            raise AssertionError(
                f"{name} = {value!r} raises {type(error).__name__}, not ParameterError"
            ) from error
        else:
            raise AssertionError(f"{name} = {value!r} is accepted")
    return f"{len(tries)} refused"


def _parity(entry: Method, catalog: Catalog, *, run: bool) -> str:
    """Hold the records against the fidelity that the entry claims and against the vectors, where they are."""
    from methodbench.testing.parity import vectors_folder

    if not entry.vectors:
        claimed = entry.fidelity in ("authors-code", "reimplementation")
        require(not claimed, f"fidelity is {entry.fidelity!r}, but vectors names no file of its parity tests")
        raise Skip("no numbers of other code to compare with")
    records = {record.vectors: record for record in records_of(entry, catalog)}
    missing = [key for key in entry.vectors if key not in records]
    require(
        not missing, f"no parity record for {', '.join(missing)}: run `pytest tests/parity --record-parity`"
    )
    for record in records.values():
        path = vectors_folder() / f"{record.vectors}.npz"
        if path.is_file() and "METHODBENCH_VECTORS" not in os.environ:
            same = hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256
            require(same, f"the record is not of {path}: run `pytest {record.test} --record-parity`")
        if run and path.is_file():
            files = record.test.split()
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            require(done.returncode == 0, f"{record.test} fails:\n{done.stdout.strip()[-600:]}")
    passed = sum(record.passed for record in records.values())
    return f"{passed} tests against {entry.parity}"
