"""A stranger's path: a package from `methodbench new`, built, installed beside the released core, tested, compared."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from methodbench.kinds import KIND_NAMES

pytestmark = [pytest.mark.slow, pytest.mark.network]

ROOT = Path(__file__).resolve().parents[2]


def run(command: Sequence[str | Path], cwd: Path, path: Path | None = None) -> str:
    """Standard output of a command that must succeed, with ``path`` in front of PATH."""
    dropped = ("PYTHON", "METHODBENCH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    if path is not None:
        inherited["PATH"] = f"{path}{os.pathsep}{inherited['PATH']}"
    # Keeps downloads and prepared models of the tests apart from the user's.
    inherited["METHODBENCH_CACHE"] = str(cwd / "cache")
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(project: Path, target: Path) -> Path:
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, project], target)
    return max(target.glob("*.whl"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment with the built wheel; heavy libraries come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    libraries = sysconfig.get_paths()["purelib"]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"import site; site.addsitedir({libraries!r})\n")
    install(folder, build(ROOT, tmp_path_factory.mktemp("core")))
    return folder / "bin"


def install(environment: Path, wheel: Path) -> None:
    python = environment / "bin" / "python" if (environment / "bin").is_dir() else environment / "python"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--force-reinstall",
            wheel,
        ],
        wheel.parent,
    )


def test_every_kind_goes_from_new_to_the_site(environment: Path, tmp_path: Path) -> None:
    where = run([environment / "python", "-c", "import methodbench; print(methodbench.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(environment.parent)
    runs, folders, tools = [], [], 0.0
    for kind in KIND_NAMES:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        name = f"my-{kind}"
        shown = run([environment / "methodbench", "new", name, "--kind", kind], tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        tools += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        folders.append(tmp_path / f"methodbench-{name}")
        commands = shown.split("Next:")[1].strip().splitlines()
        assert len(commands) + 1 < 10
        runs.append(next(line for line in commands if line.strip().startswith("methodbench run")))
        install(environment, build(folders[-1], folders[-1]))
    # The stranger's own time at the machine, beside installing and computing.
    assert tools / len(KIND_NAMES) < 5
    tests = [folder / "tests" for folder in folders]
    outcome = run([environment / "python", "-m", "pytest", "-q", "--import-mode=importlib", *tests], tmp_path)
    assert "passed" in outcome
    assert "failed" not in outcome
    for command in runs:
        run(shlex.split(command), tmp_path, environment)
    run(["methodbench", "site", "build"], tmp_path, environment)
    pages = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    for kind in KIND_NAMES:
        assert f"my-{kind}" in pages
    results = run(["methodbench", "results"], tmp_path, environment)
    for kind in KIND_NAMES:
        assert f"my-{kind}" in results
