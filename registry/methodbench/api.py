"""The verbs of the command line as functions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methodbench.catalog import Catalog, load_catalog
from methodbench.errors import MethodbenchError
from methodbench.suite import Suite, load_suite

if TYPE_CHECKING:
    import polars as pl

    from methodbench.claims import ClaimResult
    from methodbench.comparison import ChainResult, PairedResult
    from methodbench.engine.driver import Report, Reporter
    from methodbench.engine.forecast import Budget
    from methodbench.engine.parting import Recorded
    from methodbench.engine.plan import Plan
    from methodbench.engine.replay import Replay
    from methodbench.engine.sequential import Decisions

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
        joined.studies += one.studies
        for cell in one.cells:
            if cell.key not in keys:
                keys.add(cell.key)
                joined.cells.append(cell)
    return joined


def run(
    suites: SuiteLike | Sequence[SuiteLike] | Plan,
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
        suites: as for :func:`plan`, or a plan.
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
    from methodbench.engine.plan import Plan
    from methodbench.engine.tuning import run_with_studies
    from methodbench.store import open_store

    known = catalog or load_catalog()
    joined = suites if isinstance(suites, Plan) else plan(suites, catalog=known)
    with open_store(db) as store:

        def run_part(part: Plan) -> Report:
            return run_plan(
                part,
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

        return run_with_studies(joined, store, run_part)


def run_until_decided(
    suites: SuiteLike | Sequence[SuiteLike],
    *,
    db: str | None = None,
    error_rate: float = 0.05,
    max_seeds: int | None = None,
    catalog: Catalog | None = None,
    **options: Any,
) -> Decisions:
    """Run a suite seed by seed, each method only as long as one of its comparisons is open.

    Args:
        error_rate: bound on the chance that any two methods are told apart wrongly.
        max_seeds: how many seeds a comparison may use; by default those that the suite lists.
        options: as for :func:`run`.
    """
    from methodbench.engine.driver import run_plan
    from methodbench.engine.sequential import run_until_decided
    from methodbench.store import open_store

    known = catalog or load_catalog()
    wanted = [suite.with_seeds(max_seeds) if max_seeds else suite for suite in _suites(suites, known)]
    joined = plan(wanted, catalog=known)
    if joined.studies:
        raise MethodbenchError(
            "a suite that tunes cannot be run until decided: what is compared is known only after the trials",
            "Run it without --until-decided.",
        )
    with open_store(db) as store:
        return run_until_decided(
            joined, store, lambda part: run_plan(part, store, known, **options), error_rate=error_rate
        )


def fit_budget(
    made: Plan,
    seconds: float | None,
    *,
    db: str | None = None,
    cores: int | None = None,
    memory: int | None = None,
) -> Budget:
    """Predict what the missing cells of a plan take, and choose those that fit a budget of wall-clock time.

    Args:
        seconds: the budget; None keeps every cell.
        db: database whose finished runs predictions rest on.
        cores: CPU cores; by default all that this process may use.
        memory: bytes that one cell may hold.

    Raises:
        StoreError: there is no database yet.
        MethodbenchError: it holds no finished run.
    """
    from methodbench.engine.driver import available_cores
    from methodbench.engine.forecast import fit_budget, history_of
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        done = store.latest(cell.key for cell in made.cells)
        todo = [cell for cell in made.cells if cell.key not in done]
        history = history_of(store)
    return fit_budget(todo, history, seconds=seconds, cores=cores or available_cores(), memory=memory)


def results(
    db: str | None = None, *, catalog: Catalog | None = None, last: int | None = None, **wanted: str | None
) -> pl.DataFrame:
    """Return one row per run and metric, as a Polars frame.

    The column ``stale`` says what has changed since a run was made (see :mod:`methodbench.engine.why`); it is null
    for runs that still hold.

    Args:
        last: only so many of the newest runs; all by default.
        wanted: values of columns of the runs, for example ``method="gptq"``.

    Raises:
        StoreError: there is no database yet, or it cannot be read.
    """
    import polars as pl

    from methodbench.engine.why import stale_versions
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        frame = store.frame(last, **wanted)
        versions = store.versions_of(frame["run"])
    stale = stale_versions(dict.fromkeys(versions.values()), catalog or load_catalog())
    reasons = [stale.get(versions[run]) if run in versions else None for run in frame["run"]]
    return frame.with_columns(pl.Series("stale", reasons, dtype=pl.String))


def compare(a: str, b: str, *, db: str | None = None) -> list[PairedResult]:
    """Compare two methods (``name`` or ``name@variant``) on the cells that both share, paired by unit.

    Raises:
        UnknownNameError: no run of that method is in the database.
    """
    from methodbench.comparison import compare_methods
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        return compare_methods(store, a, b)


def interactions(chain: str, *, db: str | None = None) -> list[ChainResult]:
    """Say of a chain of compressors (``a@preset + b@preset``) whether it is more than the sum of its links.

    Raises:
        UnknownNameError: no run of that chain is in the database.
        MethodbenchError: a link, or the baseline, has not run alone on the same model and task.
    """
    from methodbench.comparison import chain_interactions
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        return chain_interactions(store, chain)


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


def replay(
    run: str,
    *,
    db: str | None = None,
    tolerance: float = 1e-3,
    executor: str = "local",
    cores: int | None = None,
    timeout: float | None = None,
    reporter: Reporter | None = None,
    catalog: Catalog | None = None,
) -> Replay:
    """Run a recorded run again from its record alone, compare, and keep the result as a witness.

    Args:
        run: the first digits of the run's id.
        tolerance: largest difference of a metric, as a share of its recorded value, that is no drift.
        timeout: seconds after which it is killed; by default 20 times what the run took, at least 600.

    Raises:
        MethodbenchError: there is no such run, it has no result, or what it needs is not installed any more.
    """
    from methodbench.engine.replay import replay as run_again
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        return run_again(
            store.run(run),
            store,
            catalog or load_catalog(),
            tolerance=tolerance,
            executor=executor,
            cores=cores,
            timeout=timeout,
            reporter=reporter,
        )


def diff(a: str, b: str, *, db: str | None = None) -> tuple[Recorded, Recorded]:
    """Return what is recorded of two runs, for the functions of :mod:`methodbench.engine.parting`."""
    from methodbench.engine.parting import recorded
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        return recorded(store, store.run(a)), recorded(store, store.run(b))


def build_site(out: str | Path = "site", *, db: str | None = None, catalog: Catalog | None = None) -> Path:
    """Build the leaderboard from the database and return the path of its first page."""
    from methodbench.store import open_store
    from methodbench_leaderboard import build

    with open_store(db, create=False) as store:
        return build(store, catalog or load_catalog(), Path(out))
