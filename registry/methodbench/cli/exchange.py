"""``export``, ``import`` and ``merge``: records that travel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from methodbench.cli.output import db_option, echo_json, json_option, size

if TYPE_CHECKING:
    from methodbench.store.capsule import Content
    from methodbench.store.merging import Merged

_FORMATS = ("capsule", "csv", "parquet", "json", "every-eval-ever")


def _selection(function: Any) -> Any:
    options = [
        click.option("--run", "runs", multiple=True, metavar="ID", help="Only this run; repeatable."),
        click.option("--method", help="Only runs of this method."),
        click.option("--model", help="Only runs on this model."),
        click.option("--task", help="Only runs of this task."),
        click.option("--suite", help="Only runs that this suite made."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@_selection
@click.option(
    "--format",
    "kind",
    type=click.Choice(_FORMATS),
    default="capsule",
    show_default=True,
    help="What to write.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the capsule or the documents, or the file.  [default: here]",
)
@db_option
@json_option
def export(
    runs: tuple[str, ...], kind: str, out: Path | None, db: str | None, as_json: bool, **chosen: str | None
) -> None:
    """Write records as a capsule that anybody can check, or as a table for another program.

    A capsule is named by the digest of its content: the same records always make the same capsule.
    """
    from methodbench.errors import CapsuleError
    from methodbench.store import every_eval_ever, tables
    from methodbench.store.capsule import write_capsule

    content = _content(runs, chosen, db)
    if not content.records:
        raise CapsuleError("no run fits", "`methodbench results` lists the runs.")
    if kind == "capsule":
        paths = [write_capsule(content, out or Path())]
    elif kind == "every-eval-ever":
        paths = every_eval_ever.write_documents(content, out or Path("every_eval_ever"))
    else:
        paths = [out or Path(f"results.{kind}")]
        {"csv": tables.write_csv, "parquet": tables.write_parquet, "json": tables.write_json}[kind](
            content, paths[0]
        )
    if as_json:
        echo_json({"files": [str(path) for path in paths], "runs": len(content.records)})
        return
    what = str(paths[0]) if len(paths) == 1 else f"{len(paths)} documents in {out or 'every_eval_ever'}"
    click.echo(
        f"Wrote {what}: {_count(len(content.records))}, {size(sum(path.stat().st_size for path in paths))}."
    )


def _content(runs: tuple[str, ...], chosen: dict[str, str | None], db: str | None) -> Content:
    from sqlalchemy import and_, or_, true

    from methodbench.store import open_store
    from methodbench.store.merging import content_of
    from methodbench.store.records import RUN

    with open_store(db, create=False) as store:
        wanted: list[Any] = [RUN.c[column] == name for column, name in chosen.items() if name is not None]
        if runs:
            identifiers = [store.run(run).id for run in runs]
            wanted.append(or_(RUN.c.id.in_(identifiers), RUN.c.witness_of.in_(identifiers)))
        return content_of(store, and_(true(), *wanted))


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@db_option
@json_option
def import_records(files: tuple[Path, ...], db: str | None, as_json: bool) -> None:
    """Check capsules, or documents of every_eval_ever, and put their records into the database.

    Nothing is believed: every digest is computed again. Doing it twice changes nothing. A cell that has a result keeps
    it; another result of the same cell stands beside it as a witness, whether it agrees or not.
    """
    from methodbench.store import every_eval_ever, open_store
    from methodbench.store.capsule import read_capsule
    from methodbench.store.merging import merge

    # All of them are checked before the first one is written.
    contents = [
        (str(path), every_eval_ever.read_document(path) if path.suffix == ".json" else read_capsule(path))
        for path in files
    ]
    with open_store(db) as store:
        _report([(name, merge(store, content)) for name, content in contents], as_json)


@click.command("merge")
@click.argument("databases", nargs=-1, required=True, metavar="DATABASE...")
@db_option
@json_option
def merge_databases(databases: tuple[str, ...], db: str | None, as_json: bool) -> None:
    """Put the records of other databases into this one; they are left as they are.

    As with `import`, every digest is computed again, doing it twice changes nothing, and results that disagree stay
    side by side.
    """
    from methodbench.errors import StoreError
    from methodbench.store import open_store
    from methodbench.store.merging import content_of_database, is_same_database, merge

    for url in databases:
        if is_same_database(url, db):
            raise StoreError(f"{url} is the database itself", "Give another database to merge.")
    contents = [(url, content_of_database(url)) for url in databases]
    with open_store(db) as store:
        _report([(name, merge(store, content)) for name, content in contents], as_json)


def _report(merged: list[tuple[str, Merged]], as_json: bool) -> None:
    if as_json:
        echo_json(
            [
                {
                    "from": name,
                    "new": one.new,
                    "known": one.known,
                    "agreeing": one.agreeing,
                    "disagreeing": one.disagreeing,
                }
                for name, one in merged
            ]
        )
        return
    for name, one in merged:
        parts = [f"{len(one.new)} new"]
        if one.known:
            parts.append(f"{one.known} known already")
        if one.agreeing:
            parts.append(f"{len(one.agreeing)} kept as witnesses")
        click.echo(f"{name}: {', '.join(parts)}.")
        if one.disagreeing:
            click.secho(
                f"  {_count(len(one.disagreeing))} of cells that have a result here with other scores, kept beside it:"
                f" {', '.join(one.disagreeing[:8])}{' ...' if len(one.disagreeing) > 8 else ''}",
                fg="yellow",
            )


def _count(number: int) -> str:
    return f"{number} run{'s' if number != 1 else ''}"
