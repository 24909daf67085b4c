"""Plugins that are broken in a dozen ways, installed at once: every command works, and names each with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
HOOK = (
    "from methodbench import hookimpl\nfrom methodbench.entries import Method\n"
    "@hookimpl\ndef methodbench_methods():\n"
)
ENTRY = "Method(name={!r}, kind={!r}, family='f', impl='a.b:C', summary='Does something here.')"

#: How a plugin is broken: the source of its module, and the reason that must be told.
BROKEN: dict[str, tuple[str, str]] = {
    "absent-import": ("import a_library_that_is_not_installed", "ModuleNotFoundError"),
    "bad-syntax": ("def (", "SyntaxError"),
    "exits": ("raise SystemExit(3)", "SystemExit"),
    "laborious": ("x = 0\nfor i in range(20_000_000): x += i", "CPU seconds, and the budget is 0.30"),
    "older": ("METHODBENCH_HOOKS = 0", "speaks hook version 0"),
    "newer": ("METHODBENCH_HOOKS = 99", "speaks hook version 99"),
    "unknown-hook": (
        "from methodbench import hookimpl\n@hookimpl\ndef methodbench_typo():\n    return []",
        "methodbench_typo",
    ),
    "raises": (HOOK + "    raise RuntimeError('boom')", "RuntimeError: boom"),
    "nonsense": (HOOK + "    return [42, None, 'text']", "returned int, not Method"),
    "nothing": (HOOK + "    return None", "TypeError"),
    "endless": (HOOK + "    while True:\n        yield 1", "more than 10,000 entries"),
    "takes-a-name": (HOOK + f"    return [{ENTRY.format('noop', 'probe')}]", "'noop' is already registered"),
    "unknown-kind": (HOOK + f"    return [{ENTRY.format('odd', 'oracle')}]", "unknown kind 'oracle'"),
    "bad-entry": (HOOK + f"    return [{ENTRY.format('../up', 'probe')}]", "EntryError"),
}


def install(folder: Path, name: str, module: str) -> None:
    info = folder / f"{module}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[methodbench]\n{name} = {module}\n")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``methodbench`` beside all broken plugins and one that works, which comes last of all."""
    folder = tmp_path_factory.mktemp("broken")
    for name, (source, _) in BROKEN.items():
        module = f"broken_{name.replace('-', '_')}"
        (folder / f"{module}.py").write_text(source)
        install(folder, name, module)
    (folder / "noop_plugin.py").write_text("from toybench.plugin import *")
    install(folder, "good", "noop_plugin")
    path = os.pathsep.join([str(folder), str(PLUGINS)])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("METHODBENCH")},
        "PYTHONPATH": path,
        "METHODBENCH_CACHE": str(folder / "cache"),
        "METHODBENCH_IMPORT_BUDGET": "0.3",
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "methodbench.cli", *words]
        return subprocess.run(
            line, capture_output=True, text=True, cwd=folder, env=environment, timeout=120, check=False
        )

    return run


def test_every_command_works_and_names_each_broken_plugin_on_standard_error(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    listed = command("list", "--json")
    assert listed.returncode == 0, listed.stderr
    names = {method["name"] for method in json.loads(listed.stdout)["methods"]}
    assert {"identity", "noop"} <= names
    assert not {"odd", "../up"} & names
    assert [name for name in BROKEN if name not in listed.stderr] == []
    assert "Traceback" not in listed.stderr
    done = command("run", "--method", "noop", "--task", "toy-value", "--json")
    assert done.returncode == 0, done.stderr
    assert [run["status"] for run in json.loads(done.stdout)["runs"]] == ["ok"]


def test_doctor_gives_the_reason_of_each(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    told = command("doctor")
    assert told.returncode == 1
    text = " ".join((told.stdout + told.stderr).split())
    assert [name for name, (_, reason) in BROKEN.items() if name not in text or reason not in text] == []
    assert "Traceback" not in text


def test_plugins_that_are_left_out_are_not_even_imported(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    without = [word for name in BROKEN for word in ("--no-plugin", name)]
    listed = command(*without, "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert listed.stderr == ""
    assert "noop" in {method["name"] for method in json.loads(listed.stdout)["methods"]}
    gone = command(*without, "--no-plugin", "good", "list", "--json")
    assert "noop" not in {method["name"] for method in json.loads(gone.stdout)["methods"]}
