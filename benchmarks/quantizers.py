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

#: What rounding to nearest a configuration is held against, by how its label starts; the longest that fits counts.
NEAREST = {
    "w4a4": "w4a4",
    "w4a8": "w4a8",
    "w8a8": "w8a8",
    "w4": "w4",
    "w3": "w3",
    "w3g64": "w3g64",
    "w2g64": "w2g64",
}
#: Methods whose grids are symmetric, and so the rounding that they are held against.
SYMMETRIC = {"quarot": {"w4a4": "w4a4-symmetric"}, "cbq": {"w4a4": "w4a4-symmetric"}}
MARKER = re.compile(r"(<!-- {name} -->\n).*?(<!-- end -->)".replace("{name}", r"(\w+)"), re.DOTALL)
WORDS = {"win": "better", "tie": "undecided", "loss": "worse"}


def main() -> int:
    """Read, and print or fill in."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--db", required=True)
    options.add_argument("--page", type=Path)
    given = options.parse_args()
    with open_store(given.db, create=False) as store:
        sections = {"results": "\n".join(results(store)), "claims": "\n".join(verdicts(store, given.db))}
    if given.page is None:
        print("\n\n".join(sections.values()))
        return 0
    text = given.page.read_text(encoding="utf-8")
    given.page.write_text(
        MARKER.sub(lambda match: f"{match[1]}\n{sections[match[2]]}\n\n{match[3]}", text), encoding="utf-8"
    )
    return 0


def newest(store: Store) -> list[Run]:
    """Return the newest finished run of every cell of a quantizer, the dense model first."""
    family = {name for name, method in load_catalog().methods.items() if method.family == "quant"}
    found = {
        run.cell_key: run
        for run in store.runs()
        if run.status == "ok" and run.method in family | {"identity"}
    }
    return sorted(found.values(), key=lambda run: (run.task, run.model, run.method != "identity", order(run)))


def order(run: Run) -> tuple[str, bool, str, str]:
    """Sort by the rounding that a run is held against, that first."""
    return nearest(run) or run.variant, run.method != "rtn", run.method, run.variant


def nearest(run: Run) -> str:
    """Return the variant of ``rtn`` that ``run`` is held against; empty where there is none."""
    fits = [start for start in NEAREST if re.match(rf"{start}(?![a-z0-9])", run.variant)]
    if not fits:
        return ""
    start = max(fits, key=len)
    return SYMMETRIC.get(run.method, {}).get(start, NEAREST[start])


def results(store: Store) -> Iterator[str]:
    """Lines of the table of perplexities."""
    runs = newest(store)
    values = {row.run_id: row for row in store.metrics([run.id for run in runs]) if row.primary}
    seen: set[tuple[str, str, str, str]] = set()
    yield from header(
        "model", "method", "configuration", "bits a weight", "perplexity", "against", "difference", "verdict"
    )
    for run in runs:
        key = (run.task, run.model, run.method, run.variant)
        if key in seen or run.id not in values:
            continue
        seen.add(key)
        value, pair = values[run.id], paired(store, run)
        bits = run.accounted_bits if run.accounted_bits is not None else run.bits_per_weight
        yield line(
            f"{run.model}, {run.task}",
            f"`{run.method}`",
            run.variant or "defaults",
            "" if bits is None else f"{bits:.2f}",
            f"{number(value.value)} [{number(value.low)}, {number(value.high)}]",
            f"`rtn` {pair.variant_b}" if pair else "",
            f"{pair.difference:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}]" if pair else "",
            WORDS[pair.verdict] if pair else "",
        )


def paired(store: Store, run: Run) -> PairedResult | None:
    """Return the comparison of a configuration with rounding to nearest, where both ran."""
    against = nearest(run)
    if not against or run.method in ("rtn", "identity"):
        return None
    try:
        rows = compare_methods(store, f"{run.method}@{run.variant}", f"rtn@{against}")
    except MethodbenchError:
        return None
    return next((row for row in rows if (row.model, row.task) == (run.model, run.task)), None)


def verdicts(store: Store, db: str) -> Iterator[str]:
    """Lines of the table of claims that the records can judge."""
    yield from header("method", "claim", "left", "right", "difference", "verdict")
    for name in sorted({run.method for run in newest(store)} - {"identity"}):
        for judged in claims(name, db=db):
            for row in judged.conditions:
                if row.verdict != "not attempted" and row.left is not None and row.right is not None:
                    interval = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
                    sides = (number(row.left), number(row.right), interval)
                    yield line(f"`{name}`", judged.claim.text, *sides, row.verdict)


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
