"""CPU seconds of commands that everybody waits for, against their budget and against lm-eval's command line.

    python benchmarks/startup.py [--rounds 7] [--json FILE]

Figures are starts per CPU second. The budget of ``--help`` and ``list`` is 0.20 CPU seconds with all plugins and 30
more, written as distributions of their own that register ten methods each. The limits are 1: within the budget, which
is what a shell's user takes for at once, and never slower to start than the peer.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Figure, parser, report

BUDGET = 0.20
PLUGINS = 30

_MODULE = """
from methodbench import hookimpl
from methodbench.entries import Method, Paper


@hookimpl
def methodbench_methods():
    return [
        Method(
            name=f"dummy-{number}-{{index}}", kind="compressor", family="dummy", impl="dummy.absent:Absent",
            summary="Does nothing, quickly.", applies_to=("causal-lm",), presets={{"w4": {{"bits": 4}}}},
            paper=Paper(title="A paper", arxiv="0000.00000", year=2026),
        )
        for index in range(10)
    ]
"""


def write_plugins(folder: Path, count: int) -> None:
    """Write ``count`` plugins into ``folder``, as an installer would leave them."""
    for number in range(count):
        (folder / f"dummy_plugin_{number}.py").write_text(_MODULE.format(number=number))
        metadata = folder / f"dummy_plugin_{number}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: dummy-plugin-{number}\nVersion: 1.0\n"
        )
        entry = f"[methodbench]\ndummy{number} = dummy_plugin_{number}\n"
        (metadata / "entry_points.txt").write_text(entry)


def cpu_seconds(folder: Path, *command: str) -> float:
    """Return user and system seconds of ``python -m`` with these arguments, ``folder`` on its path."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-m", *command], capture_output=True, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    arguments = parser(__doc__ or "", rounds=7).parse_args()
    contestants = {
        "--help": ("methodbench.cli", "--help"),
        "list": ("methodbench.cli", "list"),
    }
    if importlib.util.find_spec("lm_eval"):
        contestants["peer"] = ("lm_eval", "--help")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_plugins(folder, PLUGINS)
        listed = subprocess.run(
            [sys.executable, "-m", "methodbench.cli", "list", "plugins"],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": text},
        ).stdout  # fmt: skip
        assert listed.count("dummy_plugin_") == PLUGINS, listed
        for command in contestants.values():
            cpu_seconds(folder, *command)
        for _ in range(arguments.rounds):
            for name, command in contestants.items():
                seconds[name].append(cpu_seconds(folder, *command))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    figures = []
    for name in ("--help", "list"):
        figures.append(Figure(f"{name} / budget", 1 / median[name], 1 / BUDGET, 1.0, "starts per CPU s"))
        if "peer" in median:
            figures.append(
                Figure(
                    f"{name} / lm-eval --help", 1 / median[name], 1 / median["peer"], 1.0, "starts per CPU s"
                )
            )
    return report(figures, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
