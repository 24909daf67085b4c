"""Fixtures of the core's tests: the toy plugin, a catalogue that holds it, a cache and a database of one's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from methodbench.catalog import Catalog, load_catalog
from methodbench.store import Store, open_store

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"


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
