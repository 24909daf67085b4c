"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from methodbench.catalog import Catalog, load_catalog
from methodbench.store import Store, open_store

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "tests" / "plugins"
os.environ.setdefault("METHODBENCH_VECTORS", str(ROOT / "tests" / "vectors"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


# The toy plugin: a catalogue that holds it, a cache and a database of one's own.


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the core's tests, so that implementations are asked about their parameters once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def toy_path(monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> Path:
    """Make the toy plugin importable here and in workers."""
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("METHODBENCH_CACHE", str(shared_cache))
    monkeypatch.delenv("METHODBENCH_MODELS", raising=False)
    monkeypatch.delenv("METHODBENCH_DB", raising=False)
    return PLUGINS


@pytest.fixture
def catalog(toy_path: Path) -> Catalog:
    """A catalogue of the core and the toy plugin alone."""
    points = [
        EntryPoint("builtin", "methodbench.builtin.plugin", "methodbench"),
        EntryPoint("toybench", "toybench.plugin", "methodbench"),
    ]
    loaded = load_catalog(points=points)
    assert loaded.problems == []
    return loaded


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened
