"""``status``, ``results`` and ``compare``: what the database says."""

from __future__ import annotations

import dataclasses
from collections import Counter

import click

from methodbench.cli.output import db_option, echo_json, get_catalog, interval, json_option, number, table

#: How many runs `results` shows unless told otherwise.
_LAST = 200


@click.command()
@click.argument("suites", nargs=-1)
@db_option
@json_option
def status(suites: tuple[str, ...], db: str | None, as_json: bool) -> None:
    """Count runs by status, or the cells of SUITES that are done, failed, stale and missing.

    Stale records were made with another version of the method, the weights, the data or the protocol (see `why`).
    """
    from methodbench.engine.why import stale_versions, superseded
    from methodbench.store import open_store

    with open_store(db, create=False) as store:
        if suites:
            from methodbench import api

            plan = api.plan(list(suites), catalog=get_catalog())
            latest = store.latest(cell.key for cell in plan.cells)
            before = superseded(store, [cell for cell in plan.cells if cell.key not in latest])
            counts = Counter(
                latest[cell.key].status
                if cell.key in latest
                else "stale"
                if cell.key in before
                else "missing"
                for cell in plan.cells
            )
            if plan.skips:
                counts["skipped"] = len(plan.skips)
            groups = {plan.suite: counts}
        else:
            groups = {}
            found = store.counts()
            old = stale_versions(dict.fromkeys(version for _, _, version, _ in found), get_catalog())
            for name, ended, version, count in found:
                groups.setdefault(name, Counter())["stale" if version in old else ended] += count
        url = store.url
    if as_json:
        echo_json({"database": url, "suites": {name: dict(counts) for name, counts in groups.items()}})
        return
    columns = sorted(
        {name for counts in groups.values() for name in counts}, key=lambda name: (name != "ok", name)
    )
    rows = [(name or "–", *(str(counts[column]) for column in columns)) for name, counts in groups.items()]
    table(("suite", *columns), rows, right=columns)


@click.command()
@click.option("--method", help="Only this method.")
@click.option("--model", help="Only this model.")
@click.option("--task", help="Only this task.")
@click.option("--suite", help="Only runs that this suite made.")
@click.option("--metric", help="This metric instead of the primary one.")
@click.option("--failed", is_flag=True, help="Only runs that are not ok, with the reason.")
@click.option(
    "--last",
    type=click.IntRange(min=0),
    help="Only so many of the newest runs; 0 for all.  [default: 200, all with --json or --failed]",
)
@db_option
@json_option
def results(
    method: str | None,
    model: str | None,
    task: str | None,
    suite: str | None,
    metric: str | None,
    failed: bool,
    last: int | None,
    db: str | None,
    as_json: bool,
) -> None:
    """Print results with their 95 % intervals, newest last; `methodbench show RUN` shows one in full.

    Results of another version of the method, the weights, the data or the protocol are marked as stale.
    """
    import polars as pl

    from methodbench import api
    from methodbench.errors import UnknownNameError
    from methodbench.store import open_store

    wanted = {"method": method, "model": model, "task": task, "suite": suite}
    with open_store(db, create=False) as store:
        for column, name in wanted.items():
            if name is not None and name not in (known := store.names(column)):
                raise UnknownNameError(f"{column} with results", name, known)
        count = store.count(**wanted)
    if last is None and not as_json and not failed:
        last = _LAST
    frame = api.results(db, catalog=get_catalog(), last=last or None, **wanted)
    bad = ~pl.col("status").is_in(["ok"])
    if failed:
        frame = frame.filter(bad)
    elif metric is not None:
        if metric not in frame["metric"].unique():
            raise UnknownNameError(
                "metric with results", metric, [name for name in frame["metric"].unique() if name]
            )
        frame = frame.filter(pl.col("metric") == metric)
    elif not as_json:
        frame = frame.filter(pl.col("primary").fill_null(False) | bad)
    if as_json:
        echo_json(frame.to_dicts())
        return
    if frame.is_empty():
        click.echo("No run failed." if failed else "No results match.")
        return
    rows = []
    for row in frame.iter_rows(named=True):
        good = row["metric"] is not None
        rows.append(
            (
                row["run"],
                f"{row['method']} {row['variant']}".strip(),
                row["model"] or "–",
                row["task"],
                str(row["seed"]),
                row["metric"] or row["status"],
                number(row["value"]) if good else "",
                interval(row["low"], row["high"]) if good else row["reason"],
                f"stale: {row['stale']}" if row["stale"] else "",
            )
        )
    headers = ("run", "method", "model", "task", "seed", "metric", "value", "95 % interval", "note")
    shown = len(headers) if any(row[-1] for row in rows) else len(headers) - 1
    table(headers[:shown], [row[:shown] for row in rows], right=("value", "seed"))
    if last and count > last:
        click.echo(f"The newest {last} of {count:,} runs: --last 0 shows all.")


@click.command()
@click.argument("a", metavar="METHOD[@VARIANT]")
@click.argument("b", metavar="METHOD[@VARIANT]", required=False)
@db_option
@json_option
def compare(a: str, b: str | None, db: str | None, as_json: bool) -> None:
    """Compare two methods on the cells that both share: paired difference, interval, p-value, win or loss.

    A chain alone ('A@X + B@Y') is compared with its links: is it more than their sum, the sum, or harmful?
    """
    from methodbench import api
    from methodbench.composition import is_chain, split_use

    if b is None:
        if not is_chain(a):
            raise click.UsageError("Give two methods, or one chain such as 'A@X + B@Y'.")
        _print_interactions(a, db, as_json)
        return
    found = api.compare(a, b, db=db)
    if as_json:
        echo_json([dataclasses.asdict(row) for row in found])
        return
    first, second = split_use(a)[0], split_use(b)[0]
    if first == second:
        first, second = a, b
    of_first, of_second = f"of {first}", f"of {second}"
    rows = [
        (
            row.verdict,
            row.model or "–",
            row.task,
            row.variant_a
            if row.variant_a == row.variant_b
            else f"{row.variant_a or '–'} / {row.variant_b or '–'}",
            f"{row.metric} {'↓' if row.direction == 'lower' else '↑'}",
            number(row.value_a),
            number(row.value_b),
            number(row.difference),
            interval(row.low, row.high),
            _probability(row.p_value),
            _probability(row.p_holm),
            f"{row.units} × {row.seeds}",
        )
        for row in found
    ]
    headers = (
        first, "model", "task", "settings", "metric", of_first, of_second, "difference", "95 % interval",
        "p", "p (Holm)", "units × seeds",
    )  # fmt: skip
    table(headers, rows, right=(of_first, of_second, "difference", "p", "p (Holm)"))
    counts = Counter(row.verdict for row in found)
    click.echo(
        f"\n{first} against {second}: {_count(counts['win'], 'win')}, {_count(counts['tie'], 'tie')}, "
        f"{_count(counts['loss'], 'loss')}. "
        "A win or a loss is a 95 % interval of the paired difference without zero; p is of the sign-flip test."
    )


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def _probability(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _print_interactions(chain: str, db: str | None, as_json: bool) -> None:
    from methodbench import api

    found = api.interactions(chain, db=db)
    if as_json:
        echo_json([dataclasses.asdict(row) for row in found])
        return
    links = found[0].links if found else ()
    headers = (
        "verdict", "model", "task", "settings", "effect on", *links, "sum", "together", "excess", "95 % interval",
        "units × seeds",
    )  # fmt: skip
    rows = [
        (
            row.verdict, row.model or "–", row.task, row.variant or "–", f"{row.metric} ({row.scale})"
            if row.scale != row.metric else row.metric, *(number(effect) for effect in row.alone),
            number(sum(row.alone)), number(row.together), number(row.excess), interval(row.low, row.high),
            f"{row.units} × {row.seeds}",
        )
        for row in found
    ]  # fmt: skip
    table(headers, rows, right=(*links, "sum", "together", "excess"))
    click.echo(
        "\nEffects are against the untouched model; positive is better. The chain is more than the sum, or harmful, "
        "where the 95 % interval of the excess (together − sum) lies above, or below, zero."
    )
