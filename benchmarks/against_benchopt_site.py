"""The leaderboard beside benchopt's HTML page of the same results: seconds to build, bytes, requests, seconds to load.

    python benchmarks/against_benchopt_site.py --benchopt PYTHON [--rounds 5] [--json FILE]

PYTHON is an interpreter of an environment with benchopt (``pip install benchopt``). The results are made up: 20
methods on 5 data sets with 5 repetitions. benchopt keeps one value a run, the database here 32 scores of units
besides. Both are rendered by their command lines, from start to exit, and opened in Chromium from ``file://``.
Requests to other hosts are refused at once, apart from plotly's, which is served from the interpreter's own copy of
plotly where it has one: the times to load are those of a network without delay.
"""

from __future__ import annotations

import json
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, add_benchopt, alternate, benchopt_of, parser, report

METHODS, TASKS, SEEDS = 20, 5, 5

_OBJECTIVE = """
from benchopt import BaseObjective


class Objective(BaseObjective):
    name = "toy"
    url = "https://example.org/toy"

    def set_data(self, scale):
        self.scale = scale

    def evaluate_result(self, value):
        return {"value": value}

    def get_one_result(self):
        return {"value": 0.0}

    def get_objective(self):
        return {"scale": self.scale}
"""
#: Reads runs from a database and writes what benchopt would have kept of them.
_CONVERT = """
import json, sys
import pandas
from benchopt.results.parquet import to_parquet

rows = json.load(open(sys.argv[1]))
frame = pandas.DataFrame(rows)
frame["objective_name"] = "toy"
frame["stop_val"] = 1
frame["sampling_strategy"] = "run_once"
frame["run_date"] = "2026-01-01"
frame["version-numpy"] = "2"
to_parquet(frame, sys.argv[2])
"""
_ABOUT = """
import json, pathlib, sys
import benchopt
found = {"version": benchopt.__version__}
try:
    import plotly
    found["plotly"] = str(pathlib.Path(plotly.__file__).parent / "package_data" / "plotly.min.js")
except ImportError:
    found["plotly"] = ""
json.dump(found, sys.stdout)
"""
#: Milliseconds until everything that a page loads at first is there.
_LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def _ask(python: str, code: str, *arguments: str) -> str:
    done = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def _rows(database: Path) -> list[dict[str, Any]]:
    from methodbench.store import open_store

    with open_store(str(database), create=False) as store:
        runs = store.runs()
        values = {row.run_id: row.value for row in store.metrics(run.id for run in runs)}
    return [
        {"solver_name": run.method, "dataset_name": run.task, "idx_rep": run.seed, "time": run.wall_seconds,
         "objective_value": values[run.id]}
        for run in runs
    ]  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Visit:
    """What a browser does with a page."""

    def __init__(self, browser: Any, page: Path, plotly: Path | None) -> None:
        self._browser, self._page, self._plotly = browser, page, plotly
        self.milliseconds: list[float] = []
        self.requests: set[str] = set()
        self.own_bytes = 0
        self.complaints = 0
        self.shown = 0

    def __call__(self) -> None:
        """Open the page once in a context of its own."""
        context = self._browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        seen: set[str] = set()
        complaints: list[str] = []

        def answer(route: Any) -> None:
            address = route.request.url
            seen.add(address)
            if address.startswith("file:"):
                route.continue_()
            elif "plotly" in address and self._plotly is not None:
                route.fulfill(path=self._plotly, content_type="text/javascript")
            else:
                route.abort()

        context.route("**/*", answer)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(self._page.as_uri(), wait_until="load")
        page.wait_for_timeout(500)
        self.milliseconds.append(page.evaluate(_LOADED))
        self.requests = {address for address in seen if not address.startswith(("file:", "data:"))}
        files = [Path(address.removeprefix("file://")) for address in seen if address.startswith("file:")]
        self.own_bytes = sum(path.stat().st_size for path in files if path.is_file())
        self.complaints = len(complaints)
        self.shown = page.locator("main svg, .js-plotly-plot svg.main-svg, table tbody tr").count()
        context.close()


def main() -> int:
    """Measure, print, and return 1 when a limit is missed."""
    options = parser(__doc__ or "")
    add_benchopt(options)
    given = options.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    python = benchopt_of(given)
    if python is None:
        return 0
    if chromium is None:
        print("no Chromium on this machine: nothing is measured")
        return 0
    from playwright.sync_api import sync_playwright

    about = json.loads(_ask(python, _ABOUT))
    plotly = Path(about["plotly"]) if about["plotly"] and Path(about["plotly"]).is_file() else None
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        root = Path(scratch)
        database, out, theirs = root / "results.db", root / "site", root / "toy"
        # Its name is that of a module of Python's own.
        made_up = runpy.run_path(str(Path(__file__).with_name("site.py")))
        made_up["fill"](database, METHODS * TASKS * SEEDS, methods=METHODS, tasks=TASKS)
        for name in ("solvers", "datasets", "outputs"):
            (theirs / name).mkdir(parents=True)
        (theirs / "objective.py").write_text(_OBJECTIVE)
        (root / "rows.json").write_text(json.dumps(_rows(database)))
        results = theirs / "outputs" / "made_up.parquet"
        _ask(python, _CONVERT, str(root / "rows.json"), str(results))

        def build() -> None:
            shutil.rmtree(out, ignore_errors=True)
            command = [
                str(Path(sys.executable).with_name("methodbench")),
                "site",
                "build",
                "--db",
                str(database),
                "--out",
                str(out),
            ]
            subprocess.run(command, check=True, capture_output=True)

        def render() -> None:
            command = [
                python,
                "-m",
                "benchopt",
                "plot",
                str(theirs),
                "-f",
                str(results),
                "--html",
                "--no-display",
            ]
            subprocess.run(command, check=True, capture_output=True)

        seconds = alternate({"ours": build, "benchopt": render}, given.rounds)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        page = next(path for path in (theirs / "outputs").glob("*.html") if "made_up" in path.name)
        board = max((out / "boards").rglob("*.html"), key=lambda path: path.stat().st_size)
        visits = {
            "ours": Visit(browser, board, None), "benchopt": Visit(browser, page, plotly),
            "benchopt without plotly": Visit(browser, page, None),
        }  # fmt: skip
        for _ in range(given.rounds):
            for visit in visits.values():
                visit()
        version = browser.version
        browser.close()
        whole = {"ours": _bytes(out), "benchopt": _bytes(theirs / "outputs") - results.stat().st_size}
        pages = len(list(out.rglob("*.html")))
    plotly_bytes = plotly.stat().st_size if plotly is not None else 0
    for name, visit in visits.items():
        contestant = name.split()[0]
        loaded = visit.own_bytes + (plotly_bytes if name == "benchopt" else 0)
        print(
            f"{name}: built in {seconds[contestant]:.2f} s, {whole[contestant] / 1e6:.2f} MB in all; the page with "
            f"what it loads {loaded / 1e3:.0f} kB in {statistics.median(visit.milliseconds):.0f} ms; "
            f"{len(visit.requests)} requests to other hosts, {visit.complaints} errors, "
            f"{visit.shown} rows and charts on show"
        )
        for address in sorted(visit.requests):
            print(f"    {address}")
    print(
        f"benchopt {about['version']}, Chromium {version}; {pages} pages of ours, plotly from "
        f"{'disk' if plotly is not None else 'nowhere'}"
    )
    ours, peer = visits["ours"], visits["benchopt"]
    if ours.requests or ours.complaints:
        print("a page of ours asked another host, or complained")
        return 1
    figures = [
        Figure("load of the page", 1e3 / statistics.median(ours.milliseconds),
               1e3 / statistics.median(peer.milliseconds), 1.0, "1/s"),
        Figure("bytes of the page with what it loads", 1e6 / ours.own_bytes,
               1e6 / (peer.own_bytes + plotly_bytes), 1.0, "1/MB"),
        # A hundred pages and the downloads, beside two pages.
        Figure("build of everything, whole command", 1 / seconds["ours"], 1 / seconds["benchopt"], 0.5, "1/s"),
    ]  # fmt: skip
    return report(figures, given.json)


if __name__ == "__main__":
    sys.exit(main())
