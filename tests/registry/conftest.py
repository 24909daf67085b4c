"""Fixtures of the core's tests: the toy plugin, a catalogue that holds it, a cache and a database of one's own."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from methodbench import provenance
from methodbench.catalog import Catalog, load_catalog
from methodbench.cli import main
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


@pytest.fixture
def edit(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str, str], None]]:
    """Copy the plugin that changes to where it can be imported; returns what edits it: file, old text, new text."""
    package = tmp_path / "plugins" / "changing"
    shutil.copytree(PLUGINS / "changing", package, ignore=shutil.ignore_patterns("__pycache__"))
    # Before the folder that holds the original.
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ["PYTHONPATH"]]))

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "changing"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        provenance.source_digest.cache_clear()
        provenance._source.cache_clear()

    def change(file: str, old: str, new: str) -> None:
        path = package / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        forget()

    forget()
    yield change
    forget()


@pytest.fixture
def changing(edit: object) -> Catalog:
    """A catalogue of the core, the toy plugin and the one that changes."""
    points = [
        EntryPoint("builtin", "methodbench.builtin.plugin", "methodbench"),
        EntryPoint("toybench", "toybench.plugin", "methodbench"),
        EntryPoint("changing", "changing.plugin", "methodbench"),
    ]
    loaded = load_catalog(points=points)
    assert loaded.problems == []
    return loaded


@pytest.fixture
def cli(
    changing: Catalog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command against the catalogue ``changing``; returns exit code, output and errors."""
    monkeypatch.setattr("methodbench.catalog.load_catalog", lambda **options: changing)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call
