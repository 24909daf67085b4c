"""Fixtures of the store's tests: the toy plugin as an installed one, so that the real command line finds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from methodbench.store import Store, open_store

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the toy plugin for processes that the test starts."""
    folder = tmp_path / "site"
    info = folder / "toybench-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toybench\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[methodbench]\ntoybench = toybench.plugin\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(PLUGINS)]))
    monkeypatch.setenv("METHODBENCH_CACHE", str(tmp_path / "cache"))
    for name in ("METHODBENCH_DB", "METHODBENCH_MODELS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def command(toys: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``methodbench`` as a user does."""

    def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "methodbench.cli", *words]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=300, **options)

    return run


@pytest.fixture
def grid(tmp_path: Path) -> Callable[[int], Path]:
    """A suite of so many no-op cells, as a file."""

    def write(cells: int) -> Path:
        values = [index / cells for index in range(cells)]
        comparison = {"methods": [{"name": "noop", "grid": {"value": values}}], "tasks": ["toy-value"]}
        path = tmp_path / "grid.yaml"
        path.write_text(json.dumps({"name": "grid", "comparisons": [comparison]}))
        return path

    return write


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened
