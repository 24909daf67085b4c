"""Tables of the command line on terminals of every width."""

from __future__ import annotations

import os
import shutil
import sys

import click
import pytest

from methodbench.cli.output import table

HEADERS = ("run", "method", "model", "metric", "value", "95 % interval", "note")
ROWS = [
    ("04e45688a445", "a-method w4, symmetric=True", "a-model", "perplexity", "12.34", "[11.10, 13.57]", "long " * 9),
    ("de1d6518dc3a", "another", "a-model", "perplexity", "1.234e+06", "[1.1e+06, 1.4e+06]", ""),
]  # fmt: skip


@pytest.fixture
def printed(monkeypatch, capsys):
    """Return a function that prints a table on a terminal so many columns wide; None is no terminal."""

    def run(width: int | None, *args, **given) -> list[str]:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: width is not None)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda **_: os.terminal_size((width or 80, 24)))
        table(*args, **given)
        found: list[str] = click.unstyle(capsys.readouterr().out).splitlines()
        return found

    return run


@pytest.mark.parametrize("width", [None, 200])
def test_a_wide_terminal_or_a_file_gets_every_column(printed, width):
    lines = printed(width, HEADERS, ROWS, right=("value",))
    assert len(lines) == 3
    assert all(header in lines[0] for header in HEADERS)
    assert all(cell.strip() in lines[1] for cell in ROWS[0])


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_narrow_terminal_keeps_every_number(printed, width):
    lines = printed(width, HEADERS, ROWS, right=("value",))
    assert max(map(len, lines)) <= width
    assert lines[0] == "model: a-model · metric: perplexity"
    assert all(cell in lines[2] for cell in ("04e45688a445", "12.34", "[11.10, 13.57]"))
    assert all(cell in lines[3] for cell in ("another", "1.234e+06", "[1.1e+06, 1.4e+06]"))
    assert lines[2].endswith("…") == (width < 120)


def test_rows_with_numbers_are_paragraphs_where_nothing_else_fits(printed):
    lines = printed(50, HEADERS, ROWS, right=("value",))
    text = " ".join(line.strip() for line in lines)
    assert max(map(len, lines)) <= 50
    for cell in (*ROWS[0], *ROWS[1]):
        assert " ".join(cell.split()) in text


def test_text_is_cut_at_the_end(printed):
    rows = [(f"name-{n}", "x" * (28 + n), "y" * (60 + n)) for n in range(3)]
    lines = printed(60, ("name", "kind", "summary"), rows)
    assert max(map(len, lines)) <= 60
    assert [line.split()[0] for line in lines] == ["name", "name-0", "name-1", "name-2"]
    assert lines[1].endswith("…")
