"""Explainers and weakly supervised methods: fills the tables of a page from databases of results.

    python benchmarks/explanations.py --db FILE [--db FILE ...] [--page docs/explanation/explainers.md]

Without ``--page`` the tables are printed. Every number is read from the records: means over seeds with 95 % intervals
over pictures, or over seeds where a run has one score. A difference is paired over the pictures and seeds that both
sides ran.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from _tables import fill, header, label, line, metrics_of, options, value, verdicts

from methodbench.catalog import load_catalog
from methodbench.store import Run, Store, open_store

_REAL = ("insertion-auc", "deletion-auc", "average-drop", "increase", "road", "sparseness")
#: The metrics of each task that the page shows.
SHOWN = {
    "pointing-game": ("pointing-object", "pointing-head", "relevance-mass"),
    "shapes-wsol": ("max-box-acc-v2", "max-box-acc", "pxap"),
    "shapes-faithfulness": ("road", "sparseness", "infidelity"),
    "shapes-randomization": ("map-similarity-head", "map-similarity-all"),
    "shapes-robustness": ("map-iou", "map-correlation"),
    "shapes-several": ("seed-miou", "image-miou", "wrong-class"),
    "shapes-weak-localization": ("max-box-acc-v2", "max-box-acc", "pxap", "accuracy"),
    "shapes-wsss": (
        "seed-miou",
        "image-miou",
        "wrong-class",
        "over-activation",
        "under-activation",
        "seed-area",
    ),
    "nuclei": ("pseudo-iou", "dice", "aji", "pq"),
    "cifar10-faithfulness": _REAL,
    "imagenet-samples-faithfulness": _REAL,
}
#: Order of the rows: controls first.
CONTROLS = ("random", "centre-gaussian", "full-image", "oracle-mask", "random-cam", "cam-seeds")


def main() -> int:
    """Read, and print or fill in."""
    given = options(__doc__).parse_args()
    sections: dict[str, list[str]] = {}
    judged: list[str] = []
    for path in given.db:
        with open_store(path, create=False) as store:
            runs = newest(store)
            for task in SHOWN:
                here = [run for run in runs if run.task == task]
                if here:
                    name = task.replace("-", "_")
                    rows = list(results(store, task, here))
                    sections[name] = [*sections.get(name, rows[:2]), *rows[2:]]
            claimed = list(verdicts(runs, path))
            judged = [*(judged or claimed[:2]), *sorted(claimed[2:])]
    fill(given.page, {**sections, "claims": judged})
    return 0


def newest(store: Store) -> list[Run]:
    """Return the newest finished run of every configuration and seed of a method of vision, controls first."""
    family = {name for name, method in load_catalog().methods.items() if method.family == "vision"}
    found = {
        (run.task, run.model, run.method, label(run), run.seed): run
        for run in sorted(store.runs(), key=lambda run: run.started_at)
        if run.status == "ok" and run.method in family
    }
    return sorted(
        found.values(), key=lambda run: (run.task, run.model or "", rank(run.method), label(run), run.seed)
    )


def rank(method: str) -> tuple[int, str]:
    """Sort controls first, in their order."""
    return (CONTROLS.index(method) if method in CONTROLS else len(CONTROLS), method)


def results(store: Store, task: str, runs: list[Run]) -> Iterator[str]:
    """Lines of the table of one task, one for each configuration, over its seeds."""
    metrics = metrics_of(store, runs)
    yield from header("model", "method", "configuration", "seeds", *SHOWN[task])
    for (model, method, configuration), group in itertools.groupby(
        runs, key=lambda run: (run.model or "", run.method, label(run))
    ):
        by_seed = {run.seed: run for run in group}
        cells = []
        for name in SHOWN[task]:
            rows = [metrics.get(run.id, {}).get(name) for run in by_seed.values()]
            # A metric that older records lack stays empty.
            cells.append("" if None in rows or rows[0] is None else value(by_seed, rows[0], metrics))
        seeds = ", ".join(map(str, by_seed))
        yield line(model, f"`{method}`", configuration or "defaults", seeds, *cells)


if __name__ == "__main__":
    sys.exit(main())
