"""A board of 100 methods, 20 tasks and 5 seeds in Chromium: first paint, and ranking again after a filter.

    python benchmarks/site_browser.py [--rounds 5] [--json FILE]

Ranks are made from 1,000 bootstrap draws a task, by the page's own script, timed with performance.now() in the page.
The limits are the aims that the project has set itself.
"""

from __future__ import annotations

import runpy
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from common import Figure, parser, report

FIRST_PAINT, RANKS, PAGE = 1000.0, 300.0, 300_000.0
BOARD = "boards/shrink/causal-lm.html"

#: Ranks of every task from scores alone, as on the first filter: nothing is kept from an earlier one.
RANK = """async () => {
  const box = document.querySelector('table.board').dataset;
  const data = await methodbenchTables.load(box.root, box.src);
  const tasks = data.questions.map((asked, question) => ({
    asked, rows: data.cells.filter(cell => cell.question === question).map(cell => cell.scores),
  }));
  const start = performance.now();
  for (const {asked, rows} of tasks) methodbenchStats.rankIntervals(rows, asked.how, asked.lower);
  return {milliseconds: performance.now() - start, tasks: tasks.length, methods: tasks[0].rows.length};
}"""
#: From a choice of the reader to the new ranks on the page.
FILTER = """(words) => new Promise(resolve => {
  const input = document.getElementById('filter'), start = performance.now();
  const root = document.documentElement, before = root.dataset.updated;
  const look = () => root.dataset.updated === before ? setTimeout(look) : resolve(performance.now() - start);
  input.value = words;
  input.dispatchEvent(new Event('input', {bubbles: true}));
  look();
})"""


def main() -> int:
    """Measure, print, and return 1 when a limit is missed."""
    from playwright.sync_api import sync_playwright

    given = parser(__doc__ or "").parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium on this machine: nothing is measured")
        return 0
    paints, ranks, first, later = [], [], [], []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        database, out = Path(scratch) / "results.db", Path(scratch) / "site"
        # Its name is that of a module of Python's own.
        records = runpy.run_path(str(Path(__file__).with_name("site.py")))
        records["fill"](database, 10_000)
        records["build_once"](database, out)
        size = (out / BOARD).stat().st_size
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        for _ in range(given.rounds):
            page = browser.new_page()
            page.goto(f"{out.as_uri()}/{BOARD}")
            page.wait_for_function("performance.getEntriesByType('paint').length > 0")
            paints.append(page.evaluate("performance.getEntriesByType('paint').at(-1).startTime"))
            first.append(page.evaluate(FILTER, "method-0"))
            later.append(page.evaluate(FILTER, "method-"))
            page.close()
            page = browser.new_page()
            page.goto(f"{out.as_uri()}/{BOARD}")
            found = page.evaluate(RANK)
            ranks.append(found["milliseconds"])
            page.close()
        browser.close()
    print(
        f"{found['methods']} methods, {found['tasks']} tasks: ranks {min(ranks):.0f} to {max(ranks):.0f} ms"
    )
    print(
        f"filter to new ranks: first {statistics.median(first):.0f} ms, later {statistics.median(later):.0f} ms"
    )
    print(f"first paint {statistics.median(paints):.0f} ms, page {size / 1e3:.0f} kB")
    figures = [
        # The fastest of fresh pages: whatever else the machine does only adds to it.
        Figure("ranks of 100 x 20 x 1,000", 1e3 / min(ranks), 1e3 / RANKS, 1.0, "1/s"),
        Figure("first paint", 1e3 / statistics.median(paints), 1e3 / FIRST_PAINT, 1.0, "1/s"),
        Figure("size of the board", 1e6 / size, 1e6 / PAGE, 1.0, "1/MB"),
    ]
    return report(figures, given.json)


if __name__ == "__main__":
    sys.exit(main())
