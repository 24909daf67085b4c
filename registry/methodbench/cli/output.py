"""What the commands share: options, the catalogue, tables, numbers."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from methodbench.catalog import Catalog

F = TypeVar("F", bound=Callable[..., Any])


def db_option(function: F) -> F:
    """``--db``: the result database."""
    return click.option(
        "--db",
        metavar="PATH|URL",
        envvar="METHODBENCH_DB",
        help="Result database: an SQLite file or an SQLAlchemy URL.  [default: methodbench.db]",
    )(function)


def json_option(function: F) -> F:
    """``--json``: answers for machines."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def get_catalog() -> Catalog:
    """Load the catalogue; plugins that were left out are named on standard error."""
    from methodbench.catalog import load_catalog

    root = click.get_current_context().find_root()
    catalog = load_catalog(without=(root.obj or {}).get("without", ()))
    for problem in catalog.problems:
        click.secho(
            f"Plugin {problem.plugin}: {problem.error} (left out; see `methodbench doctor`)",
            fg="yellow",
            err=True,
        )
    return catalog


def echo_json(value: Any) -> None:
    """Print ``value`` as JSON; infinities and NaN become strings, which JSON has room for."""
    click.echo(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


#: Columns of text are not shortened further than this on a narrow terminal.
_LEAST_TEXT = 14


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """Print aligned columns.

    Where a terminal is too narrow for them, columns that say the same in every row are said once above, then columns
    of text are shortened, the last first; numbers and intervals are not. Where that is not enough, each row with
    numbers is a paragraph, and text is cut.

    Args:
        right: headers of columns to align at the right, for numbers.
    """
    body = [list(row) for row in rows]
    names, numbers = list(headers), set(right)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if width and sum(_widths(names, body)) + 2 * (len(names) - 1) > width:
        names, body = _without_constants(names, body, width)
        short = _shortened(names, body, numbers, width)
        if numbers and sum(_widths(names, short)) + 2 * (len(names) - 1) > width:
            for row in body:
                said = " · ".join(
                    f"{name} {cell}".strip() for name, cell in zip(names, row, strict=True) if cell
                )
                click.echo(textwrap.fill(said, width, subsequent_indent="    ", break_on_hyphens=False))
            return
        body = short
    widths = _widths(names, body)

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(widths[index]) if names[index] in numbers else cell.ljust(widths[index])
            for index, cell in enumerate(cells)
        ]
        text = "  ".join(padded).rstrip()
        return text if not width or len(text) <= width else text[: width - 1] + "…"

    click.echo(click.style(line(names), dim=True))
    for row in body:
        click.echo(line(row))


def _widths(headers: Sequence[str], body: Sequence[Sequence[str]]) -> list[int]:
    return [max([len(header), *(len(row[index]) for row in body)]) for index, header in enumerate(headers)]


def _without_constants(
    headers: Sequence[str], body: Sequence[list[str]], width: int
) -> tuple[list[str], list[list[str]]]:
    """Say the columns that are the same in every row, and return the others."""
    same = [
        index
        for index, header in enumerate(headers)
        if index and header and len(body) > 1 and len({row[index] for row in body}) == 1
    ]
    said = [f"{headers[index]}: {body[0][index]}" for index in same if body[0][index]]
    if said:
        click.secho(textwrap.fill(" · ".join(said), width, break_on_hyphens=False), dim=True)
    kept = [index for index in range(len(headers)) if index not in same]
    return [headers[index] for index in kept], [[row[index] for index in kept] for row in body]


def _shortened(
    headers: Sequence[str], body: Sequence[list[str]], numbers: set[str], width: int
) -> list[list[str]]:
    """Return the rows with text shortened until they fit, or as far as text may be."""
    widths = _widths(headers, body)
    texts = [
        index
        for index, header in enumerate(headers)
        if header not in numbers and not all(row[index].startswith("[") for row in body if row[index])
    ]
    for index in (*texts[-1:], *sorted(texts[:-1], key=lambda index: -widths[index])):
        over = sum(widths) + 2 * (len(widths) - 1) - width
        if over > 0 and widths[index] > _LEAST_TEXT:
            widths[index] = max(_LEAST_TEXT, widths[index] - over)
    return [
        [
            cell if len(cell) <= widths[index] else cell[: widths[index] - 1] + "…"
            for index, cell in enumerate(row)
        ]
        for row in body
    ]


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with four significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def interval(low: float | None, high: float | None) -> str:
    """Write an interval, or nothing where there is none."""
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def duration(seconds: float) -> str:
    """Write a time span in the two units that matter."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """Write a count of bytes in binary units."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
