"""Fixtures of the core's tests: a plugin whose source changes, and the command line against it."""

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

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"


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
