"""CPU seconds of commands that everybody waits for, against their budget and against lm-eval's command line.

    python benchmarks/startup.py [--rounds 7] [--json FILE]

Figures are starts per CPU second. The budget of ``--help`` and ``list`` is 0.20 CPU seconds with all plugins.
"""

from __future__ import annotations

import importlib.util
import resource
import statistics
import subprocess
import sys

from common import Figure, parser, report

BUDGET = 0.20


def cpu_seconds(*command: str) -> float:
    """Return user and system seconds of one run of ``python -m`` with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", *command], capture_output=True, check=True)
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
    for _ in range(arguments.rounds):
        for name, command in contestants.items():
            seconds[name].append(cpu_seconds(*command))
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
