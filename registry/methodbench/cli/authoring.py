"""``new`` and ``check``: from an idea to a method that keeps its promises."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from methodbench.cli.output import duration, echo_json, get_catalog, json_option
from methodbench.kinds import KIND_NAMES

if TYPE_CHECKING:
    from methodbench.testing.checks import Result

_MARKS = {
    "passed": ("ok  ", "green"),
    "skipped": ("skip", "cyan"),
    "expected-failure": ("xfail", "yellow"),
    "unexpected-pass": ("XPASS", "red"),
    "failed": ("FAIL", "red"),
}


@click.command()
@click.argument("name")
@click.option("--kind", required=True, type=click.Choice(KIND_NAMES), help="What the method is.")
@click.option("--paper", default="", metavar="ARXIV", help="Number of the paper, for example 2306.00978.")
@click.option(
    "--family", default="", help="Board to appear on.  [default: where most methods of the kind are]"
)
@click.option(
    "--in",
    "parent",
    default=".",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write it into.  [default: here]",
)
def new(name: str, kind: str, paper: str, family: str, parent: Path) -> None:
    """Write the package methodbench-NAME: a method that works, to be turned into yours.

    Nothing that exists is overwritten.
    """
    from methodbench.scaffold import write_package

    made = write_package(name, kind, get_catalog(), paper=paper, family=family, parent=parent)
    click.echo(f"{click.style(str(made.folder), bold=True)}  {kind} {name}, on the board {made.family}")
    for path in made.files:
        click.echo(f"  {path.relative_to(made.folder)}")
    click.echo("\nNext:")
    for command in made.commands:
        click.echo(f"  {command}")


@click.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "everything", is_flag=True, help="Check every installed method.")
@click.option(
    "--only", default="", metavar="PATTERN", help="Only checks whose name holds this, or matches it."
)
@click.option("--parity", is_flag=True, help="Also run the parity tests below the current folder.")
@click.option(
    "--record",
    is_flag=True,
    help="Write what came of them into the method's package, for `show` and its page.",
)
@click.option("--list", "listing", is_flag=True, help="List the checks without running them.")
@json_option
def check(
    names: tuple[str, ...],
    everything: bool,
    only: str,
    parity: bool,
    record: bool,
    listing: bool,
    as_json: bool,
) -> int:
    """Check methods by their names; exit code 1 when a check fails.

    The checks follow from a method's entry alone: its metadata, its parameters, what its kind promises, the
    properties that it declares, and its scores on models whose right answer is known.
    """
    from methodbench.contract import write_check_record
    from methodbench.errors import MethodbenchError, MissingExtraError

    catalog = get_catalog()
    if not names and not everything:
        raise MethodbenchError("no method is named", "Name one or more methods, or pass --all.")
    if record and only:
        raise MethodbenchError("--record keeps what came of all checks of a method", "Leave out --only.")
    for name in names:
        catalog.method(name)
    try:
        from methodbench.testing import contract_checks, run_checks
        from methodbench.testing.checks import Check  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("methodbench check", str(error.name), "methodbench[testing]") from error
    wanted = sorted(catalog.methods) if everything else list(dict.fromkeys(names))
    checks = {name: contract_checks(name, catalog, run_parity=parity) for name in wanted}
    if listing:
        for one in (one for many in checks.values() for one in many):
            click.echo(one.id)
        return 0
    results: list[Result] = []
    for name in wanted:
        if not as_json:
            method = catalog.method(name)
            title = f"{click.style(name, bold=True)}  {method.kind}, {method.impl}"
            click.echo(("\n" if results else "") + title)
        of_method = []
        for result in run_checks(checks[name], only):
            of_method.append(result)
            if not as_json:
                _print(result)
        results += of_method
        if record:
            method = catalog.method(name)
            path = write_check_record(method, catalog, [result.outcome for result in of_method])
            click.echo(f"  recorded in {path}", err=as_json)
    if not results:
        raise MethodbenchError(
            f"no check matches {only!r}", "`methodbench check NAME --list` lists the checks."
        )
    if as_json:
        echo_json([_row(result) for result in results])
    else:
        _summarize(results)
    return 0 if all(result.good for result in results) else 1


def _row(result: Result) -> dict[str, Any]:
    return {
        "id": result.check.id,
        "status": result.status,
        "detail": result.detail,
        "seconds": round(result.seconds, 3),
    }


def _print(result: Result) -> None:
    mark, colour = _MARKS[result.status]
    name = result.check.name
    slow = f"{duration(result.seconds)}" if result.seconds >= 1 else ""
    detail = "  ".join(part for part in (result.detail, slow) if part)
    first, *rest = detail.splitlines() or [""]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    lines = textwrap.wrap(first, max(40, width - 42), break_long_words=False) or [""]
    click.echo(f"  {click.style(mark.ljust(5), fg=colour)} {name.ljust(32)} {lines[0]}".rstrip())
    for line in [*lines[1:], *rest]:
        click.echo(f"{' ' * 40} {line}")


def _summarize(results: list[Result]) -> None:
    from methodbench.contract import counted

    said = counted(result.status for result in results)
    good = all(result.good for result in results)
    total = duration(sum(result.seconds for result in results))
    click.echo("\n" + click.style(f"{said} in {total}", fg="green" if good else "red"))
