"""The built wheel, in an environment that holds nothing but it and the core's dependencies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    ROOT / "registry" / "methodbench",
    *(
        ROOT / "plugins" / family / f"methodbench_{family}"
        for family in ("quant", "sparse", "vision", "optim")
    ),
    ROOT / "leaderboard" / "methodbench_leaderboard",
)
PLUGINS = {"builtin", "quant", "sparse", "vision", "optim"}
HEAVY = ("torch", "transformers", "timm", "sklearn", "scipy", "skimage", "datasets", "lm_eval", "gguf")


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, run without the variables that reach this checkout."""
    dropped = ("PYTHON", "METHODBENCH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, ROOT], target)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel and its required dependencies alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    run([*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel], folder)
    return folder / "bin"


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(package.parent).as_posix()
        for package in PACKAGES
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == expected


@pytest.mark.parametrize(
    "pattern",
    [
        r"methodbench_leaderboard/templates/.+\.(html|j2|jinja)",
        r"methodbench_leaderboard/static/.+\.css",
        r"methodbench_leaderboard/static/.+\.js",
        r"methodbench(_\w+)?/(.+/)?suites/.+\.(ya?ml|toml)",
        r"methodbench/store/migrations/env\.py",
        r"methodbench/store/migrations/versions/\d+_\w+\.py",
        r"methodbench-[^/]+\.dist-info/licenses/LICENSE",
    ],
)
def test_wheel_holds_what_is_read_at_run_time(wheel: Path, pattern: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if re.fullmatch(pattern, name)]


def test_required_dependencies_bring_no_framework(environment: Path, tmp_path: Path) -> None:
    script = f"import importlib.util as u; print([name for name in {HEAVY} if u.find_spec(name)])"
    assert run([environment / "python", "-c", script], tmp_path).strip() == "[]"


def test_entry_points_name_the_five_plugins(environment: Path, tmp_path: Path) -> None:
    script = (
        "import importlib.metadata as m, json; "
        "print(json.dumps([(p.name, p.load().__name__) for p in m.entry_points(group='methodbench')]))"
    )
    loaded = dict(json.loads(run([environment / "python", "-c", script], tmp_path)))
    assert set(loaded) == PLUGINS


def test_command_explains_itself(environment: Path, tmp_path: Path) -> None:
    shown = run([environment / "methodbench", "--help"], tmp_path)
    for command in ("list", "show", "run", "results", "compare", "doctor", "demo"):
        assert re.search(rf"^\s+{command}\s", shown, re.MULTILINE), f"--help lacks {command}"


def test_list_shows_every_plugin_without_torch(environment: Path, tmp_path: Path) -> None:
    listed = json.loads(run([environment / "methodbench", "list", "--json"], tmp_path))
    assert {method["family"] for method in listed["methods"]} >= PLUGINS - {"builtin"}
    names = {entry["name"] for what in ("methods", "models", "tasks") for entry in listed[what]}
    assert names >= {"identity", "gptq", "wanda", "grad-cam", "lion", "smollm2-135m", "pydoc-ppl"}
    plain = run([environment / "methodbench", "list"], tmp_path)
    assert [name for name in names if name not in plain] == []
