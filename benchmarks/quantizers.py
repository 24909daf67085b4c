"""Quantizers of language models against rounding to nearest: fills the tables of a page from a database of results.

    python benchmarks/quantizers.py --db FILE [--page docs/explanation/quantizers.md]

Without ``--page`` the tables are printed. Every number is read from the records; a row's difference is paired over the
windows of the text (and seeds) that both configurations ran.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from methodbench.api import claims
from methodbench.catalog import load_catalog
from methodbench.comparison import PairedResult, compare_methods
from methodbench.errors import MethodbenchError
from methodbench.store import Run, Store, open_store

#: What variants of ``rtn`` a configuration is held against, by how its label starts: the longest start that fits,
#: and of its variants the first that ran on the same model, text and kind of device.
NEAREST = {
    "w8a8": ("w8a8",),
    "w6a6": ("w6a6",),
    "w4a8": ("w4a8",),
    "w4a8g64": ("w4a8g64", "w4a8, group_size=64"),
    "w4a4": ("w4a4",),
    "w4": ("w4",),
    "w4g64": ("w4g64",),
    "w3": ("w3",),
    "w3g64": ("w3g64",),
    "w2g64": ("w2g64",),
}
#: Methods whose grids differ from those (symmetric ones, and a cache of few bits), with the rounding to the same grids.
OWN_GRIDS = {
    "quarot": {"w4a4": ("w4a4-symmetric",), "w4": ("w4-absmax",), "w3": ("w3-absmax",)},
    "cbq": {"w4a4": ("w4a4-absmax", "w4a4-symmetric")},
    "smoothquant": {"w4a4": ("w4a4-absmax",), "w4a8": ("w4a8-absmax",), "w6a6": ("w6a6-absmax",)},
    "nupes": {"w4": ("w4-absmax",), "w3": ("w3-absmax",)},
    "eaquant": {"w4a4": ("w4a4, kv_bits=4",)},
}
MARKER = re.compile(r"(<!-- {name} -->\n).*?(<!-- end -->)".replace("{name}", r"(\w+)"), re.DOTALL)
WORDS = {"win": "better", "tie": "undecided", "loss": "worse"}


def main() -> int:
    """Read, and print or fill in."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--db", required=True)
    options.add_argument("--page", type=Path)
    given = options.parse_args()
    with open_store(given.db, create=False) as store:
        runs = newest(store)
        sections = {"claims": "\n".join(verdicts(runs, given.db))}
        for device in sorted({device_class(run) for run in runs}):
            here = [run for run in runs if device_class(run) == device]
            sections[f"results_{device}"] = "\n".join(results(store, here))
    if given.page is None:
        print("\n\n".join(sections.values()))
        return 0
    text = given.page.read_text(encoding="utf-8")
    given.page.write_text(
        MARKER.sub(lambda match: f"{match[1]}\n{sections.get(match[2], 'No records.')}\n\n{match[3]}", text),
        encoding="utf-8",
    )
    return 0


def newest(store: Store) -> list[Run]:
    """Return the newest finished run of every configuration of a quantizer, the dense model first."""
    family = {name for name, method in load_catalog().methods.items() if method.family == "quant"}
    found = {
        (run.task, run.model, device_class(run), run.method, label(run)): run
        for run in sorted(store.runs(), key=lambda run: run.started_at)
        if run.status == "ok" and run.method in family | {"identity"}
    }
    return sorted(found.values(), key=lambda run: (run.task, run.model, run.method != "identity", order(run)))


def label(run: Run) -> str:
    """Return the preset whose hyperparameters a run has: a preset's name may mean others since it ran."""
    presets = load_catalog().methods[run.method].presets
    if presets.get(run.variant) == run.params_passed:
        return run.variant
    same = [name for name, params in presets.items() if params == run.params_passed]
    return same[0] if run.variant in presets and same else run.variant


def device_class(run: Run) -> str:
    """Return ``cpu`` or ``cuda``."""
    return run.device.partition(":")[0]


def order(run: Run) -> tuple[str, bool, str, str]:
    """Sort by the rounding that a run is held against, that first."""
    return start_of(run) or label(run), run.method != "rtn", run.method, label(run)


def start_of(run: Run) -> str:
    """Return the key of ``NEAREST`` that fits a run; empty where there is none."""
    fits = (start for start in NEAREST if re.match(rf"{start}(?![a-z0-9])", label(run)))
    return max(fits, key=len, default="")


def results(store: Store, runs: list[Run]) -> Iterator[str]:
    """Lines of the table of perplexities of one kind of device."""
    values = {row.run_id: row for row in store.metrics([run.id for run in runs]) if row.primary}
    yield from header(
        "model", "method", "configuration", "bits a weight", "perplexity", "against", "difference", "verdict"
    )
    for run in runs:
        if run.id not in values:
            continue
        value, (pair, same_grid) = values[run.id], paired(store, run)
        bits = run.accounted_bits if run.accounted_bits is not None else run.bits_per_weight
        yield line(
            f"{run.model}, {run.task}",
            f"`{run.method}`",
            label(run) or "defaults",
            "" if bits is None else f"{bits:.2f}",
            f"{number(value.value)} [{number(value.low)}, {number(value.high)}]",
            f"`rtn` {pair.variant_b}{'' if same_grid else ' (other grids)'}" if pair else "",
            interval(pair.difference, pair.low, pair.high) if pair else "",
            WORDS[pair.verdict] if pair else "",
        )


def paired(store: Store, run: Run) -> tuple[PairedResult | None, bool]:
    """Return the comparison of a run with rounding to nearest, where both ran, and whether the grids are alike."""
    start = start_of(run)
    if not start or run.method in ("rtn", "identity"):
        return None, False
    own = OWN_GRIDS.get(run.method, {}).get(start, ())
    for against in (*own, *NEAREST[start]):
        try:
            rows = compare_methods(store, f"{run.method}@{run.variant}", f"rtn@{against}")
        except MethodbenchError:
            continue
        for row in rows:
            if run.id in row.runs_a:
                return row, not own or against in own
    return None, False


def verdicts(runs: list[Run], db: str) -> Iterator[str]:
    """Lines of the table of claims that the records can judge."""
    yield from header("method", "claim", "where", "left", "right", "difference", "verdict")
    places = {run.id: f"{run.model}, {run.task}, {device_class(run)}" for run in runs}
    for name in sorted({run.method for run in runs} - {"identity"}):
        for judged in claims(name, db=db):
            for row in judged.conditions:
                where = next((places[run] for run in row.runs_left if run in places), None)
                if where is None or row.verdict == "not attempted" or row.left is None or row.right is None:
                    continue
                difference = interval(row.difference, row.low, row.high)
                sides = (where, number(row.left), number(row.right), difference)
                yield line(f"`{name}`", judged.claim.text, *sides, row.verdict)


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return a difference with its 95 % interval, four digits each; empty without them."""
    if value is None or low is None or high is None:
        return ""
    return f"{value:+.4g} [{low:+.4g}, {high:+.4g}]"


def header(*names: str) -> Iterable[str]:
    """Lines that open a table."""
    return line(*names), line(*("---" for _ in names))


def line(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """Return a perplexity with four digits."""
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
