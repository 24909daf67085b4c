"""The verbs of the command line as functions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methodbench.catalog import Catalog, load_catalog
from methodbench.suite import Suite, load_suite

if TYPE_CHECKING:
    import polars as pl

    from methodbench.claims import ClaimResult
    from methodbench.comparison import PairedResult
    from methodbench.engine.driver import Report, Reporter
    from methodbench.engine.plan import Plan

SuiteLike = str | Path | Suite | Mapping[str, Any]


@functools.cache
def catalog() -> Catalog:
    """Return the catalogue of all installed plugins, loaded once."""
    return load_catalog()


def _suites(suites: SuiteLike | Sequence[SuiteLike], known: Catalog) -> list[Suite]:
    many = suites if isinstance(suites, Sequence) and not isinstance(suites, str) else [suites]
    found = []
    for suite in many:
        if isinstance(suite, Suite):
            found.append(suite)
        elif isinstance(suite, Mapping):
            found.append(Suite.model_validate(suite))
        else:
            found.append(load_suite(suite, known))
    return found


def plan(suites: SuiteLike | Sequence[SuiteLike], *, catalog: Catalog | None = None) -> Plan:
    """Expand suites into one plan in which every cell appears once.

    Args:
        suites: names of shipped suites, paths of suite files, :class:`Suite` objects or plain mappings.

    Raises:
        SuiteError, UnknownNameError, ParameterError, MissingExtraError: with a message that says how to mend it.
    """
    from methodbench.engine.plan import Plan, make_plan

    known = catalog or load_catalog()
    loaded = _suites(suites, known)
    plans = [make_plan(suite, known) for suite in loaded]
    joined = Plan(" + ".join(plan.suite for plan in plans))
    keys: set[str] = set()
    for one in plans:
        joined.skips += one.skips
        for cell in one.cells:
            if cell.key not in keys:
                keys.add(cell.key)
                joined.cells.append(cell)
    return joined


def run(
    suites: SuiteLike | Sequence[SuiteLike],
    *,
    db: str | None = None,
    executor: str = "local",
    address: str = "",
    cores: int | None = None,
    memory_limit: int | None = None,
    batch: int = 1,
    retry: bool = False,
    reporter: Reporter | None = None,
    catalog: Catalog | None = None,
) -> Report:
    """Run what is missing of one or several suites, and return the newest run of every cell.

    Args:
        db: path of an SQLite file or an SQLAlchemy URL; by default ``METHODBENCH_DB`` or ``methodbench.db``.
        executor: ``local``, or a name that a plugin knows.
        address: where the executor's cluster is; empty for this machine.
        cores: CPU cores to use; by default all that this process may.
        memory_limit: bytes above which a worker is ended, with everything that it started; by default 90 % of the
            machine's memory.
        batch: how many cells one worker may run, one after the other; 1 isolates every cell.
        retry: also run cells whose newest record is a failure.
        reporter: shows progress; silent by default.
    """
    from methodbench.engine.driver import run_plan
    from methodbench.store import open_store

    known = catalog or load_catalog()
    joined = plan(suites, catalog=known)
    with open_store(db) as store:
        return run_plan(
            joined,
            store,
            known,
            executor=executor,
            address=address,
            cores=cores,
            memory_limit=memory_limit,
            batch=batch,
            retry=retry,
            reporter=reporter,
        )


def results(db: str | None = None) -> pl.DataFrame:
    """Return one row per run and metric, as a Polars frame.

    Raises:
        StoreError: there is no database yet, or it cannot be read.
    """
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        return store.frame()


def compare(a: str, b: str, *, db: str | None = None) -> list[PairedResult]:
    """Compare two methods (``name`` or ``name@variant``) on the cells that both share, paired by unit.

    Raises:
        UnknownNameError: no run of that method is in the database.
    """
    from methodbench.comparison import compare_methods
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        return compare_methods(store, a, b)


def claims(method: str, *, db: str | None = None, catalog: Catalog | None = None) -> list[ClaimResult]:
    """Return the claims of a method, each with its verdict and the conditions that it was tested under.

    Raises:
        UnknownNameError: no such method.
        ClaimsError: it has no claims, or their file does not say what it must.
        StoreError: there is no database yet, or it cannot be read.
    """
    from methodbench.claims import judge_claims, load_claims
    from methodbench.store import open_store

    known = catalog or load_catalog()
    found = load_claims(known, method)
    with open_store(db, create=False) as store:
        return judge_claims(store, known, found)


def build_site(out: str | Path = "site", *, db: str | None = None, catalog: Catalog | None = None) -> Path:
    """Build the leaderboard from the database and return the path of its first page."""
    from methodbench.store import open_store
    from methodbench_leaderboard import build

    with open_store(db, create=False) as store:
        return build(store, catalog or load_catalog(), Path(out))
