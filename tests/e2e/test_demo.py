"""The demo, as a newcomer runs it: real models, no hub, a site at the end, and nothing to do the second time."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1500)]


def demo(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("METHODBENCH_")}
    clean |= {"METHODBENCH_CACHE": str(folder / "cache"), **environment}
    command = [sys.executable, "-m", "methodbench.cli", "demo", "--quick", *arguments]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)


def test_the_quick_demo_runs_builds_a_site_and_has_nothing_to_do_the_second_time(tmp_path: Path) -> None:
    done = demo(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Open the leaderboard: site/index.html" in done.stdout
    assert "smollm2-135m · pydoc-ppl" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6 * 2**20
    index = (tmp_path / "site" / "index.html").read_text()
    boards = re.findall(r'href="(boards/[^"#?]+)"', index)
    assert boards
    for board in boards:
        page = (tmp_path / "site" / board).read_text()
        runs = re.findall(r'href="(?:\.\./)+(runs/[^"#?]+)"', page)
        assert runs, board
        assert all((tmp_path / "site" / run).is_file() for run in runs)

    start = time.monotonic()
    again = demo(tmp_path)
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout
    assert time.monotonic() - start < 30  # 10 s on an idle machine; this one may be busy


def test_without_the_package_index_the_demo_goes_on_with_what_needs_no_download(tmp_path: Path) -> None:
    done = demo(tmp_path, METHODBENCH_OFFLINE="1")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"left out \d+ cells: smollm2-135m", done.stdout)
    assert "nonconvex-f1" in done.stdout
    assert (tmp_path / "site" / "index.html").is_file()
    assert "Traceback" not in done.stdout + done.stderr
