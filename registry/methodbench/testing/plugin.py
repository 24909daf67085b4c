"""The pytest plugin: ``--methodbench=NAME``, the ``vectors`` fixture, and records of parity.

It is loaded by every pytest run in the environment, and so imports nothing of weight before it is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from methodbench.testing.checks import Check
    from methodbench.testing.parity import Vectors


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("methodbench")
    group.addoption(
        "--methodbench",
        action="append",
        default=[],
        metavar="NAME",
        help="run the contract suite of an installed method, alone or beside the tests that are named; repeatable",
    )
    group.addoption(
        "--record-parity",
        action="store_true",
        help="write what the tests of parity vectors compared into the packages of the methods that name them",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "vectors(family, name): the parity vectors that the test compares with"
    )
    if config.getoption("record_parity"):
        config.pluginmanager.register(ParityRecorder(Path(config.rootpath)), "methodbench-parity-recorder")


class ContractItem(pytest.Item):
    """One check of one method as a test."""

    def __init__(self, *, check: Check, **more: Any) -> None:
        super().__init__(**more)
        self.check = check
        if check.expected_failure:
            self.add_marker(pytest.mark.xfail(reason=check.expected_failure, strict=True))

    def runtest(self) -> None:
        remark = self.check()
        if remark:
            self.add_report_section("call", "remark", remark)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        error = excinfo.value
        if isinstance(error, AssertionError):
            return f"{self.check.id}: {error}"
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, None, str]:
        return Path(self.config.rootpath), None, self.check.id


def _items(session: pytest.Session) -> list[pytest.Item]:
    from methodbench.catalog import load_catalog
    from methodbench.errors import MethodbenchError
    from methodbench.testing import contract_checks

    catalog = load_catalog()
    items: list[pytest.Item] = []
    for name in session.config.getoption("methodbench"):
        try:
            checks = contract_checks(name, catalog)
        except MethodbenchError as error:
            raise pytest.UsageError(str(error)) from None
        for check in checks:
            items.append(ContractItem.from_parent(session, name=check.id, check=check, nodeid=check.id))
    return items


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> bool | None:
    """Collect the contract suite alone where no tests are named on the command line."""
    config = session.config
    if not config.getoption("methodbench") or config.args_source is pytest.Config.ArgsSource.ARGS:
        return None
    session.items = _items(session)
    config.hook.pytest_collection_modifyitems(session=session, config=config, items=session.items)
    config.hook.pytest_collection_finish(session=session)
    session.testscollected = len(session.items)
    return True


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if config.getoption("methodbench") and named:
        items += _items(session)


@pytest.fixture
def vectors(request: pytest.FixtureRequest) -> Vectors:
    """The vector file named by ``pytestmark = pytest.mark.vectors(family, name)``; skips where it is absent."""
    from methodbench.errors import SourceError
    from methodbench.testing.parity import load_vectors

    marker = request.node.get_closest_marker("vectors")
    assert marker is not None, "mark the test with pytest.mark.vectors(family, name)"
    try:
        loaded = load_vectors(*marker.args)
    except SourceError as error:
        pytest.skip(str(error))
    request.node.stash[_VECTORS] = loaded
    return loaded


_VECTORS: pytest.StashKey[Vectors] = pytest.StashKey()


@dataclasses.dataclass
class _Seen:
    """What the tests of one vector file did."""

    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    read: set[str] = dataclasses.field(default_factory=set)
    files: set[str] = dataclasses.field(default_factory=set)
    passed: int = 0
    failed: int = 0


class ParityRecorder:
    """Notes which arrays of which vector file the tests read, and writes the records at the end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: dict[str, _Seen] = defaultdict(_Seen)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        outcome: Any = yield
        vectors = item.stash.get(_VECTORS, None)
        marker = item.get_closest_marker("vectors")
        if call.when != "call" or vectors is None or marker is None:
            return
        seen = self.seen["/".join(marker.args)]
        report = outcome.get_result()
        seen.passed += report.passed
        seen.failed += report.failed
        seen.read |= vectors.read
        seen.meta = dict(vectors.meta)
        seen.sha256 = hashlib.sha256(vectors.path.read_bytes()).hexdigest()
        seen.files.add(item.path.relative_to(self.root).as_posix())

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from methodbench.catalog import load_catalog
        from methodbench.parity import describe, package_folder

        catalog = load_catalog()
        terminalreporter.section("parity records")
        for key, seen in sorted(self.seen.items()):
            if seen.failed:
                terminalreporter.write_line(f"{key}: not written, {seen.failed} tests fail")
                continue
            owners = {
                package_folder(catalog, method)
                for method in catalog.methods.values()
                if key in method.vectors
            }
            if not owners:
                terminalreporter.write_line(f"{key}: not written, no method names it in `vectors`")
            record = describe(
                key, seen.sha256, seen.meta, sorted(seen.read), " ".join(sorted(seen.files)), seen.passed
            )
            for folder in owners:
                if folder is None:
                    continue
                path = folder / "parity" / f"{key}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
                terminalreporter.write_line(f"{key}: {path}")
