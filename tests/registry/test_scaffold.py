"""`methodbench new` writes a package that can be loaded, and never touches what is there."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from methodbench import hookspecs
from methodbench.catalog import Catalog, load_catalog
from methodbench.claims import Claims
from methodbench.errors import MethodbenchError
from methodbench.kinds import KIND_NAMES
from methodbench.scaffold import write_package

FILES = {
    "README.md",
    "pyproject.toml",
    "methodbench_my_method/__init__.py",
    "methodbench_my_method/plugin.py",
    "methodbench_my_method/my_method.py",
    "methodbench_my_method/claims/my-method.toml",
    "tests/test_contract.py",
}


@pytest.fixture(scope="module")
def installed() -> Catalog:
    return load_catalog()


@pytest.mark.parametrize("paper", ["", "2306.00978"])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_every_kind_is_written_loads_and_is_tidy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Catalog, kind: str, paper: str
) -> None:
    made = write_package("my-method", kind, installed, paper=paper, parent=tmp_path)
    written = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert written == FILES
    project = tomllib.loads((made.folder / "pyproject.toml").read_text())["project"]
    (point,) = project["entry-points"]["methodbench"].items()
    monkeypatch.syspath_prepend(str(made.folder))
    for name in [name for name in sys.modules if name.startswith("methodbench_my_method")]:
        monkeypatch.delitem(sys.modules, name)
    catalog = load_catalog(points=[EntryPoint(*point, hookspecs.GROUP)])
    assert catalog.problems == []
    method = catalog.method("my-method")
    assert (method.kind, method.paper is not None) == (kind, bool(paper))
    assert made.family in {*installed.families, kind}
    Claims.model_validate(
        tomllib.loads((made.folder / "methodbench_my_method/claims/my-method.toml").read_text())
    )
    for path in made.folder.rglob("*.py"):
        ast.parse(path.read_text())
        assert max(map(len, path.read_text().splitlines())) <= 110, path
    lint = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "E4,E7,E9,F,I",
        "--line-length",
        "110",
    ]
    done = subprocess.run([*lint, made.folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_nothing_is_overwritten(tmp_path: Path, installed: Catalog) -> None:
    made = write_package("my-method", "probe", installed, parent=tmp_path)
    plugin = made.folder / "methodbench_my_method" / "plugin.py"
    plugin.write_text("mine")
    with pytest.raises(MethodbenchError, match="exists: nothing was written"):
        write_package("my-method", "compressor", installed, parent=tmp_path)
    assert plugin.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "kind", "paper", "message"),
    [
        ("Upper", "probe", "", "cannot be a method's name"),
        ("../escape", "probe", "", "cannot be a method's name"),
        ("identity", "compressor", "", "is taken by an installed plugin"),
        ("mine", "oracle", "", "unknown kind 'oracle'"),
        ("mine", "probe", "attention is all you need", "is no arXiv number"),
    ],
)
def test_mistakes_are_told_and_write_nothing(
    tmp_path: Path, installed: Catalog, name: str, kind: str, paper: str, message: str
) -> None:
    with pytest.raises(MethodbenchError, match=message):
        write_package(name, kind, installed, paper=paper, parent=tmp_path)
    assert list(tmp_path.iterdir()) == []
