"""``why``, ``replay`` and ``diff``: what a record rests on, and whether it holds."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from methodbench.cli.output import db_option, echo_json, get_catalog, json_option, number, table
from methodbench.cli.running import cell_options, wanted_suites

if TYPE_CHECKING:
    from methodbench.engine.parting import Parting, Recorded, ScoreChange
    from methodbench.engine.replay import Replay
    from methodbench.engine.why import Answer, Field

_COLOURS = {
    "hit": "green", "stale": "yellow", "miss": "cyan", "gone": "magenta",
    "bit-identical": "green", "within tolerance": "yellow", "drifted": "red",
}  # fmt: skip
#: Digits that a digest is shown with.
_DIGITS = 12


@click.command()
@click.argument("what", nargs=-1, metavar="[RUN|CELL|SUITES]")
@cell_options
@db_option
@json_option
def why(what: tuple[str, ...], db: str | None, as_json: bool, **chosen: Any) -> None:
    """Explain, field by field, why a cell is a hit, a miss or stale.

    Give the first digits of a run's id or of a cell's key, suites, or the options that describe a cell.

    A hit has a record and is not run again. A record is stale when the method's source, the weights, the data or the
    protocol are other ones today: it is kept and shown as stale, and its cell is run again.
    """
    from methodbench import api
    from methodbench.engine.why import explain, explain_run
    from methodbench.store import open_store

    known = get_catalog()
    with open_store(db, create=False) as store:
        if len(what) == 1 and re.fullmatch(r"[0-9a-f]{4,64}", what[0]) and what[0] not in known.suites:
            answers = [explain_run(store.run_or_cell(what[0]), store, known)]
        else:
            plan = api.plan(wanted_suites(what, chosen, known), catalog=known)
            answers = [explain(cell, store) for cell in plan.cells]
    if as_json:
        echo_json([_answer(answer) for answer in answers])
    elif len(answers) == 1:
        _print_answer(answers[0])
    else:
        _print_answers(answers)


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "verdict": answer.verdict,
        "reason": answer.reason,
        "cell": answer.label,
        "key": answer.key,
        "run": answer.record.id if answer.record else None,
        "fields": [
            {**dataclasses.asdict(field), "same": field.same, "meaning": field.meaning}
            for field in answer.fields
        ],
    }


def _print_answer(answer: Answer) -> None:
    click.secho(answer.label, bold=True)
    click.echo(f"{_verdict(answer.verdict)}: {answer.reason}.\n")
    if not answer.fields:
        return
    different = [field for field in answer.fields if not field.same]
    if different:
        rows = [(f.name, _value(f.recorded), _value(f.wanted), f.meaning) for f in different]
        then = f"run {answer.record.id}" if answer.record else "recorded"
        table(("differs", then, "wanted today", "what it is"), rows)
        click.echo()
    same = [field for field in answer.fields if field.same]
    table(("the same", "value", "what it is"), [(f.name, _value(f.recorded), f.meaning) for f in same])


def _print_answers(answers: Sequence[Answer]) -> None:
    rows = [(answer.verdict, answer.label, answer.key[:_DIGITS], answer.reason) for answer in answers]
    table(("", "cell", "key", "why"), rows)
    counts = Counter(answer.verdict for answer in answers)
    click.echo("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".")


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="Largest difference of a metric, as a share of its value, that is no drift.",
)
@click.option("--executor", default="local", show_default=True, help="Where the worker runs.")
@click.option("--cores", type=click.IntRange(min=1), help="CPU cores to use.  [default: all]")
@click.option(
    "--timeout", type=float, help="Seconds after which it is killed.  [default: 20 times what the run took]"
)
@db_option
@json_option
def replay(
    run_id: str,
    tolerance: float,
    executor: str,
    cores: int | None,
    timeout: float | None,
    db: str | None,
    as_json: bool,
) -> int:
    """Run a recorded run again from its record alone, and compare the two bit by bit.

    The answer is bit-identical, within tolerance or drifted, with what differs between then and now as the list of
    suspects. The replay is kept beside the run as a witness. Exit code 1 when it drifted.
    """
    from methodbench import api
    from methodbench.cli.progress import reporter

    found = api.replay(
        run_id,
        db=db,
        tolerance=tolerance,
        executor=executor,
        cores=cores,
        timeout=timeout,
        reporter=reporter(quiet=as_json),
        catalog=get_catalog(),
    )
    if as_json:
        echo_json(_replay(found))
    else:
        _print_replay(found)
    return 1 if found.verdict == "drifted" else 0


def _replay(found: Replay) -> dict[str, Any]:
    from methodbench.engine.parting import as_dict

    return {
        "verdict": found.verdict,
        "run": found.original.id,
        "witness": found.witness.id,
        "status": found.witness.status,
        "reason": found.witness.reason,
        "tolerance": found.tolerance,
        "parts_at": as_dict(found.parting),
        "scores": [{**dataclasses.asdict(change), "relative": change.relative} for change in found.scores],
        "suspects": [_change(field, "recorded", "replayed") for field in found.suspects],
        "compared": dict(found.compared),
    }


def _print_replay(found: Replay) -> None:
    counted = ", ".join(f"{count} {what}" for what, count in found.compared.items() if count)
    click.echo()
    click.echo(f"{_verdict(found.verdict)}: {_what_came(found, counted)}")
    if found.scores:
        click.echo()
        _print_scores(found.scores, "recorded", "replayed")
    if found.parting is not None:
        click.echo(f"\nThe two part at {click.style(str(found.parting), bold=True)}.")
        _print_parting(found.parting, "recorded", "replayed")
    if found.suspects:
        title = "suspects" if found.verdict != "bit-identical" else "differs, without effect"
        rows = [(f.name, _value(f.recorded), _value(f.wanted)) for f in found.suspects]
        click.echo()
        table((title, "recorded", "replayed"), rows)
    elif found.verdict != "bit-identical":
        click.echo(
            "\nNo suspect: code, weights, data and environment are the same. The method does not repeat itself."
        )
    click.echo(f"\nKept as witness {found.witness.id} of run {found.original.id}.")


def _what_came(found: Replay, counted: str) -> str:
    if found.witness.status != "ok":
        return f"the replay is {found.witness.status}: {found.witness.reason}"
    match found.verdict:
        case "bit-identical":
            return f"{counted} agree in every bit."
        case "within tolerance" if not found.scores:
            return f"all scores agree in every bit, but not all of {counted}."
        case "within tolerance":
            return f"no metric moved by more than {found.tolerance:g} of its value."
        case _:
            return f"a metric moved by more than {found.tolerance:g} of its value."


@click.command()
@click.argument("a", metavar="RUN")
@click.argument("b", metavar="RUN")
@db_option
@json_option
def diff(a: str, b: str, db: str | None, as_json: bool) -> None:
    """Show where two runs part: the first setting, and the first layer, step or unit that differs."""
    from methodbench import api
    from methodbench.engine import parting

    one, other = api.diff(a, b, db=db)
    where = parting.first_parting(one, other)
    settings = parting.setting_changes(one, other)
    environments = parting.environment_changes(one, other)
    scores = parting.score_changes(one, other)
    if as_json:
        echo_json(
            {
                "a": one.run.id,
                "b": other.run.id,
                "parts_at": parting.as_dict(where),
                "settings": [_change(field, "a", "b") for field in settings],
                "environment": [_change(field, "a", "b") for field in environments],
                "scores": [{**dataclasses.asdict(change), "relative": change.relative} for change in scores],
                "compared": parting.compared(one, other),
            }
        )
        return
    _print_diff(one, other, where, settings, environments, scores)


def _print_diff(
    one: Recorded,
    other: Recorded,
    where: Parting | None,
    settings: Sequence[Field],
    environments: Sequence[Field],
    scores: Sequence[ScoreChange],
) -> None:
    from methodbench.engine.parting import compared

    names = (one.run.id, other.run.id)
    for run in (one.run, other.run):
        witness = f", witness of {run.witness_of}" if run.witness_of else ""
        label = " · ".join(filter(None, [f"{run.method} {run.variant}".strip(), run.model, run.task]))
        click.echo(f"{click.style(run.id, bold=True)}  {label} · seed {run.seed}{witness}")
    click.echo()
    if where is None:
        counted = ", ".join(f"{count} {what}" for what, count in compared(one, other).items() if count)
        click.echo(f"{click.style('No difference', fg='green')} in {counted or 'what they recorded'}.")
    else:
        click.echo(f"They part at {click.style(str(where), bold=True)}.")
        _print_parting(where, *names)
    if settings:
        click.echo()
        rows = [(f.name, _value(f.recorded), _value(f.wanted), f.meaning) for f in settings]
        table(("setting", *names, "what it is"), rows)
    if environments:
        click.echo()
        rows_of = [(f.name, _value(f.recorded), _value(f.wanted)) for f in environments]
        table(("environment", *names), rows_of)
    if scores:
        click.echo()
        _print_scores(scores, *names)


def _print_scores(scores: Sequence[ScoreChange], one: str, other: str) -> None:
    rows = [
        (
            change.metric,
            number(change.first, 6),
            number(change.second, 6),
            f"{change.relative:.2g}",
            f"{change.units} of {change.of}",
        )
        for change in scores
    ]
    table(("metric", one, other, "relative", "units that differ"), rows, right=(one, other, "relative"))


def _print_parting(where: Parting, one: str, other: str) -> None:
    names = [name for name in (where.first or where.second) if name not in ("what", "at")]
    rows = [(name, *(_value(side.get(name)) for side in (where.first, where.second))) for name in names]
    table(("", one, other), rows, right=(one, other))


def _change(field: Field, one: str, other: str) -> dict[str, Any]:
    return {"field": field.name, one: field.recorded, other: field.wanted}


def _verdict(verdict: str) -> str:
    return click.style(verdict, fg=_COLOURS[verdict], bold=True)


def _value(value: Any) -> str:
    """Write a setting: digests short, numbers with the digits that a fingerprint keeps."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.10g}"
    text = str(value)
    if re.fullmatch(r"[0-9a-f]{32,64}", text):
        return text[:_DIGITS]
    return text if len(text) <= 60 else text[:59] + "…"
