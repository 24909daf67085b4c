"""Data of boards: what scripts rank again from."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methodbench_leaderboard import boarddata
from methodbench_leaderboard.aggregate import Table, make_boards
from methodbench_leaderboard.records import Records


def _read(path: Path) -> tuple[str, dict[str, Any], np.ndarray]:
    """Return name, document and scores of a file, unpacked as a page does."""
    text = path.read_bytes().decode("ascii")
    found = re.fullmatch(r'methodbenchTable\("([^"\\]+)","([A-Za-z0-9+/=]+)","([A-Za-z0-9+/=]+)"\);\n', text)
    assert found, text[:100]
    document, scores = (zlib.decompress(base64.b64decode(part)) for part in found.groups()[1:])
    plain = np.frombuffer(scores, np.uint8).reshape(8, -1).T.tobytes()
    return found[1], json.loads(document), np.frombuffer(plain, "<f8")


@pytest.fixture(scope="module")
def table(made_up, store) -> Table:
    boards = make_boards(Records(store), made_up.make_catalog())
    (found,) = next(board for board in boards if board.family.name == "shrink").tables
    return found


def _write(table: Table, folder: Path) -> Path:
    costs = {row.key: row.cost_cell(table.questions) for row in table.rows}
    boarddata.write_table(folder, "boards/toy.html", table, costs, "runs/{}".format, "methods/{}".format)
    return folder / boarddata.table_path("boards/toy.html", table)


def test_every_table_of_a_site_has_its_data_and_the_page_names_it(site):
    pages = {path: path.read_text(encoding="utf-8") for path in (site / "boards").rglob("*.html")}
    named = {
        (path.parent / root / source).resolve()
        for path, text in pages.items()
        for root, source in re.findall(r'data-root="([^"]*)" data-src="([^"]*)"', text)
    }
    files = set((site / "data" / "boards").resolve().rglob("*.js"))
    assert len(files) >= 5
    assert named == files
    for file in files:
        assert _read(file)[0] == file.relative_to((site / "data").resolve()).with_suffix("").as_posix()
    index = (site / "data" / "boards.js").read_text(encoding="ascii")
    boards = json.loads(index.removeprefix("methodbenchIndex(").removesuffix(");\n"))
    assert {(site / listed["src"]).resolve() for board in boards for listed in board["tables"]} == files


def test_scores_travel_bit_by_bit(table, tmp_path):
    _, document, scores = _read(_write(table, tmp_path))
    compared = 0
    for cell in document["cells"]:
        row, question = table.rows[cell["row"]], table.questions[cell["question"]]
        primary = row.cells[question.key].primary
        if primary is None:
            assert "value" not in cell
            continue
        found = scores[cell["at"] : cell["at"] + cell["units"]]
        assert found.tobytes() == primary.scores.astype("<f8").tobytes()
        assert float(cell["value"]) == pytest.approx(primary.value, rel=0, nan_ok=True)
        compared += 1
    assert compared >= 12
    assert np.isnan(scores).any()
    assert len(scores) == sum(cell.get("units", 0) for cell in document["cells"])


def test_what_filters_need_is_there(table, tmp_path):
    _, document, _ = _read(_write(table, tmp_path))
    by_label = {row["label"]: row for row in document["rows"]}
    row = by_label["search b3"]
    assert (row["bits"], row["storage"], row["family"]) == (3.5, "real", "shrink")
    assert row["params"] == {"bits": "3", "draws": "10"}
    assert "draws" in row["find"]
    assert by_label["nothing"]["baseline"]
    assert len({row["id"] for row in document["rows"]}) == len(table.rows)
    first = next(cell for cell in document["cells"] if cell["row"] == document["rows"].index(row))
    assert first["seeds"] == 3
    assert first["command"].startswith("methodbench run --method search")


def test_a_simulated_format_is_filtered_by_the_bits_that_it_accounts_for(made_up, store, tmp_path):
    boards = make_boards(Records(store), made_up.make_catalog())
    (table,) = next(board for board in boards if board.family.name == "mask").tables
    _, document, _ = _read(_write(table, tmp_path))
    assert {row["bits"] for row in document["rows"] if row["method"] == "cut"} == {15.0, 16.0}


def test_texts_of_records_are_harmless_and_bounded(table, made_up, tmp_path):
    _, document, _ = _read(_write(table, tmp_path))
    text = json.dumps(document, ensure_ascii=False)
    assert not set(text) & {"\u202e", "\u2066", "\x07"}
    assert made_up.SCRIPT in text
    assert "wordword" * 40 not in text


def test_beyond_a_bound_scores_of_later_questions_stay_out(table, tmp_path, monkeypatch):
    sizes = [
        sum(row.cells[question.key].primary.scores.size for row in table.rows
            if question.key in row.cells and row.cells[question.key].primary)
        for question in table.questions
    ]  # fmt: skip
    monkeypatch.setattr(boarddata, "MOST_SCORES", sizes[0])
    _, document, scores = _read(_write(table, tmp_path))
    assert [question["kept"] for question in document["questions"]] == [True, False]
    assert len(scores) == sizes[0]
    assert not any("at" in cell for cell in document["cells"] if cell["question"] == 1)
