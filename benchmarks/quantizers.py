"""Quantizers against rounding to nearest: fills the tables of a page from databases of results.

    python benchmarks/quantizers.py --db FILE [--db FILE ...] [--page docs/explanation/quantizers.md]

Without ``--page`` the tables are printed. Every number is read from the records. There is a table of results for each
task and device, and one of claims for each task; those of tasks that the databases lack stay as they are. A value is
the mean over seeds of each unit's score (windows of a text, pictures), with a 95 % interval over the units; a
difference is paired by unit over the seeds that both configurations ran.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from _tables import (
    BySeed,
    device_class,
    fill,
    header,
    interval,
    label,
    line,
    metrics_of,
    options,
    primary,
    value,
    verdicts,
)

from methodbench.catalog import load_catalog
from methodbench.comparison import PairedResult, compare_methods
from methodbench.errors import MethodbenchError
from methodbench.store import Run, Store, open_store


@dataclass(frozen=True)
class Rounding:
    """What rounds to nearest on models of one kind."""

    method: str
    variants: dict[str, tuple[str, ...]]
    """Variants that a grid is held against: the first of them that ran on the same model, data and device."""
    own: dict[str, dict[str, tuple[str, ...]]]
    """The same for methods whose grids are others (symmetric ones, and a cache of few bits)."""


#: By kind of model, the first that has a variant for the grid.
ROUNDINGS = {
    "causal-lm": (
        Rounding(
            "rtn",
            {
                grid: (grid,)
                for grid in ("w8a8", "w6a6", "w4a8", "w4a4", "w4", "w4g64", "w3", "w3g64", "w2g64")
            }
            | {"w4a8g64": ("w4a8g64", "w4a8, group_size=64")},
            {
                "quarot": {"w4a4": ("w4a4-symmetric",), "w4": ("w4-absmax",), "w3": ("w3-absmax",)},
                "cbq": {"w4a4": ("w4a4-absmax", "w4a4-symmetric")},
                "smoothquant": {"w4a4": ("w4a4-absmax",), "w4a8": ("w4a8-absmax",), "w6a6": ("w6a6-absmax",)},
                "nupes": {"w4": ("w4-absmax",), "w3": ("w3-absmax",)},
                "eaquant": {"w4a4": ("w4a4, kv_bits=4",)},
            },
        ),
    ),
    "vit": (Rounding("minmax-vit", {grid: (grid,) for grid in ("w8a8", "w6a6", "w4a4", "w3a3")}, {}),),
    "cnn": (
        Rounding("adaround", {grid: (f"nearest-{grid}",) for grid in ("w4", "w3", "w2")}, {}),
        Rounding("adaquant", {"w4a4": ("rounded-w4a4",)}, {}),
    ),
}
#: Bits of weights, of activations and size of groups in a label; mixed precisions count as their mean.
GRID = re.compile(r"(?<![a-z0-9])(w\d(?:a\d)?(?:g\d+)?|mp\d)(?![a-z0-9.])")
WORDS = {"win": "better", "tie": "undecided", "loss": "worse"}
COMPARED = ("against", "difference", "verdict")
Rows = list[BySeed]


def main() -> int:
    """Read, and print or fill in."""
    given = options(__doc__).parse_args()
    tables: dict[str, list[str]] = {}
    for db in given.db:
        with open_store(db, create=False) as store:
            rows = configurations(store)
            parts = {}
            for task in sorted({first(row).task for row in rows}):
                asked = [row for row in rows if first(row).task == task]
                name = task.replace("-", "_")
                parts[f"claims_{name}"] = list(verdicts([run for row in asked for run in row.values()], db))
                for device in sorted({device_class(first(row)) for row in asked}):
                    here = [row for row in asked if device_class(first(row)) == device]
                    parts[f"results_{device}_{name}"] = list(results(store, here))
        for name, lines in parts.items():
            tables[name] = [*tables.get(name, lines[:2]), *lines[2:]]
    # Weights that were loaded by another version of their loader make rows of their own, which may say the same.
    fill(
        given.page, {name: list(dict.fromkeys(lines)) for name, lines in sorted(tables.items(), reverse=True)}
    )
    return 0


def first(by_seed: BySeed) -> Run:
    """Return a run of a configuration."""
    return next(iter(by_seed.values()))


def configurations(store: Store) -> Rows:
    """Return the newest finished run of every configuration of a quantizer and seed, the dense model first."""
    family = {name for name, method in load_catalog().methods.items() if method.family == "quant"}
    found: dict[tuple[str, ...], BySeed] = {}
    for run in sorted(store.runs(), key=lambda run: run.started_at):
        if run.status == "ok" and run.method in family | {"identity"}:
            where = (run.task, run.model or "", device_class(run), run.method, label(run))
            found.setdefault(where, {})[run.seed] = run
    return sorted(found.values(), key=order)


def order(by_seed: BySeed) -> tuple[str, str, bool, str, bool, str, str]:
    """Sort by the grid, the rounding to it first."""
    run = first(by_seed)
    against = rounding(run)
    is_rounding = against is None or run.method == against.method
    return (
        run.task,
        run.model or "",
        run.method != "identity",
        grid(run),
        not is_rounding,
        run.method,
        label(run),
    )


def grid(run: Run) -> str:
    """Return the bits that a label names; empty where it names none."""
    match = GRID.search(label(run))
    return "" if match is None else re.sub(r"^mp(\d)$", r"w\1a\1", match[1])


def rounding(run: Run) -> Rounding | None:
    """Return what rounds to the grid of a run."""
    return next((one for one in ROUNDINGS.get(run.model_kind or "", ()) if grid(run) in one.variants), None)


def results(store: Store, rows: Rows) -> Iterator[str]:
    """Lines of the table of one kind of device."""
    metrics = metrics_of(store, (run for row in rows for run in row.values()))
    yield from header(
        "model",
        "method",
        "configuration",
        "seeds",
        "bits a weight",
        "metric",
        "value",
        "against",
        "difference",
        "verdict",
    )
    for by_seed in rows:
        run, metric = first(by_seed), primary(by_seed, metrics)
        if metric is None:
            continue
        pair, same_grid = paired(store, run)
        bits = run.accounted_bits if run.accounted_bits is not None else run.bits_per_weight
        against = rounding(run)
        yield line(
            f"{run.model}, {run.task}",
            f"`{run.method}`",
            label(run) or "defaults",
            str(len(by_seed)),
            "" if bits is None else f"{bits:.2f}",
            metric.title or metric.name,
            value(by_seed, metric, metrics),
            f"`{against.method}` {pair.variant_b}{'' if same_grid else ' (other grids)'}"
            if pair and against
            else "",
            interval(pair.difference, pair.low, pair.high) if pair else "",
            WORDS[pair.verdict] if pair else "",
        )


def paired(store: Store, run: Run) -> tuple[PairedResult | None, bool]:
    """Return the comparison of a run with rounding to nearest, where both ran, and whether the grids are alike."""
    against = rounding(run)
    if against is None or run.method == "identity":
        return None, False
    same = against.variants[grid(run)]
    if run.method == against.method and run.variant in {
        name for names in against.variants.values() for name in names
    }:
        return None, False
    own = against.own.get(run.method, {}).get(grid(run), ())
    if run.method == against.method and not own and run.model_kind == "causal-lm":
        return None, False
    for variant in (*own, *same):
        try:
            rows = compare_methods(store, f"{run.method}@{run.variant}", f"{against.method}@{variant}")
        except MethodbenchError:
            continue
        for row in rows:
            if run.id in row.runs_a:
                return row, not own or variant in own
    return None, False


if __name__ == "__main__":
    sys.exit(main())
