"""What scripts add to boards, in a real browser: filters that rank again, charts, copies, comparisons."""

from __future__ import annotations

import re

import numpy as np
import pytest

from methodbench import stats
from methodbench_leaderboard.aggregate import Row, Table, make_boards
from methodbench_leaderboard.boarddata import row_id
from methodbench_leaderboard.records import Records

pytestmark = pytest.mark.browser

BOARD = "boards/shrink/causal-lm.html"
STATUS = "#filter-status"
VISIBLE = "table.board tbody.ranked tr:visible"


@pytest.fixture(scope="module")
def table(made_up, made_up_store) -> Table:
    """The only table of the board, as the builder sees it."""
    boards = make_boards(Records(made_up_store), made_up.make_catalog())
    (found,) = next(board for board in boards if board.family.name == "shrink").tables
    return found


def _expected(rows: list[Row], table: Table) -> dict[str, list[str]]:
    """Ranks of some rows on each question, from the package's own statistics."""
    found: dict[str, list[str]] = {row_id(row): [] for row in rows}
    for question in table.questions:
        ranked = [
            row
            for row in rows
            if question.key in row.cells
            and row.cells[question.key].primary
            and not row.cells[question.key].failed
        ]
        places = stats.rank_intervals(
            np.stack([row.cells[question.key].primary.scores for row in ranked]),
            question.metric.aggregate,
            lower_is_better=question.metric.lower_is_better,
        )
        by_row = {
            row_id(row): str(low) if low == high else f"{low}–{high}"
            for row, (_, low, high) in zip(ranked, places, strict=True)
        }
        for row in rows:
            found[row_id(row)].append(by_row.get(row_id(row), "–"))
    return found


def _shown(page) -> dict[str, list[str]]:
    return {
        row["id"]: row["ranks"]
        for row in page.locator(VISIBLE).evaluate_all(
            "rows => rows.map(row => ({id: row.dataset.row, "
            "ranks: Array.from(row.querySelectorAll('td.rank'), cell => cell.textContent.trim())}))"
        )
    }


def _when(page, words: str) -> None:
    page.wait_for_function(
        "([id, words]) => document.querySelector(id).textContent.includes(words)", arg=[STATUS, words]
    )


def _ranked(table: Table) -> list[Row]:
    return [row for group in table.groups for row in group.rows]


@pytest.mark.parametrize(
    ("state", "keeps"),
    [
        ("bits-max=8", lambda row: "b3" in row.variant or "b4" in row.variant),
        ("bits-min=3.4&bits-max=4", lambda row: row.method == "search"),
        ("q=b3", lambda row: "b3" in row.variant),
        ("q=round", lambda row: row.method == "round"),
        ("storage=real", lambda row: "b3" in row.variant or "b4" in row.variant),
    ],
)
def test_a_filter_ranks_again_as_the_package_does(open_page, table, state, keeps):
    kept = [row for row in _ranked(table) if keeps(row)]
    assert 0 < len(kept) < len(_ranked(table))
    page = open_page(f"{BOARD}#{state}")
    _when(
        page,
        f"{len(kept)} of {len(_ranked(table))} configurations; ranks and their intervals are among these",
    )
    assert _shown(page) == _expected(kept, table)
    assert page.locator("table.board tbody.pinned tr:visible").count() == len(table.baselines)
    page.get_by_role("button", name="Reset").click()
    _when(page, "among all rows")
    whole = _shown(page)
    assert len(whole) == len(_ranked(table))
    assert whole == _shown(open_page(BOARD))


def test_ranks_that_a_script_makes_of_all_rows_are_those_of_the_page(open_page, table):
    built, again = open_page(BOARD), open_page(f"{BOARD}#bits-min=0")
    _when(again, "are among these")
    made = _shown(again)
    assert len(made) >= 5
    # Rows without bits are not among them, and the row that was diverging or not a number is always last.
    before = _shown(built)
    assert set(made) < set(before)


def test_the_state_is_in_the_address_and_the_back_button_undoes_a_step(open_page):
    page = open_page(BOARD)
    whole = _shown(page)
    page.locator("select[name=storage]").select_option("real")
    _when(page, "are among these")
    filtered = _shown(page)
    assert "storage=real" in page.url
    page.locator("table.board thead tr:last-child th", has_text="Perplexity").locator("button").click()
    assert "sort.table-1-t" in page.url
    order = page.locator(VISIBLE).evaluate_all("rows => rows.map(row => row.dataset.row)")
    page.reload()
    _when(page, "are among these")
    assert _shown(page) == filtered
    assert page.locator(VISIBLE).evaluate_all("rows => rows.map(row => row.dataset.row)") == order
    page.go_back()
    page.wait_for_function("!location.hash.includes('sort')")
    assert _shown(page) == filtered
    page.go_back()
    _when(page, "among all rows")
    assert _shown(page) == whole
    assert page.locator("select[name=storage]").input_value() == ""
    page.go_forward()
    _when(page, "are among these")
    assert _shown(page) == filtered


def test_tasks_and_columns_are_chosen_with_the_keyboard(open_page):
    page = open_page(BOARD)
    heads = page.locator("table.board thead tr:last-child th:visible")
    before = heads.all_inner_texts()
    page.locator("summary", has_text="Tasks").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.value") == "choice-acc"
    page.keyboard.press("Space")
    page.wait_for_function("location.hash.includes('task=text-ppl')")
    assert not any("Accuracy" in head for head in heads.all_inner_texts())
    assert len(heads.all_inner_texts()) == len(before) - 2
    assert page.locator("table.board tr.tasks th:visible").count() == 1
    assert page.locator("section[data-question='0']").is_hidden()
    assert page.locator("table.board thead th[aria-sort]").inner_text().startswith("Perplexity")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == "Tasks"
    assert not page.locator("details.menu[open]").count()
    page.locator("summary", has_text="Columns").press("Enter")
    page.get_by_label("Throughput").uncheck()
    page.get_by_label("Rank", exact=True).uncheck()
    assert "hide=throughput" in page.url
    titles = heads.all_inner_texts()
    assert not any("Throughput" in title or "Rank" in title for title in titles)
    page.reload()
    page.wait_for_function("document.querySelector('tr.tasks td.costs').colSpan === 5")
    assert heads.all_inner_texts() == titles


def test_nothing_moves_while_a_page_opens(open_page, site):
    run = next(str(path.relative_to(site)) for path in sorted((site / "runs").glob("*.html")))
    for path in (BOARD, "methods.html", "compare.html", run):
        page = open_page(path)
        page.wait_for_timeout(300)
        shift = page.evaluate(
            """() => new Promise(resolve => {
              const found = {sum: 0, moved: []};
              new PerformanceObserver(list => {
                for (const entry of list.getEntries()) {
                  found.sum += entry.value;
                  found.moved.push(...entry.sources.map(each => each.node && (each.node.outerHTML || '').slice(0, 90)));
                }
              }).observe({type: 'layout-shift', buffered: true});
              setTimeout(() => resolve(found), 200);
            })"""
        )
        assert shift["sum"] < 0.005, (path, shift)


def test_a_chart_is_drawn_with_other_axes_and_for_what_is_left(open_page):
    page = open_page(BOARD)
    figure = page.locator("figure[data-pareto='0']")
    before = figure.locator("svg a").count()
    figure.get_by_label("Across").select_option("wall_seconds")
    figure.get_by_text("time of the run, seconds", exact=False).last.wait_for()
    page.wait_for_function("location.hash.includes('x.table-1-0=wall_seconds')")
    assert "against time of the run" in figure.locator("svg title").first.text_content()
    assert figure.locator("svg a").count() == before
    figure.get_by_label("Up").select_option("acc-norm")
    page.wait_for_function(
        "document.querySelector('figure[data-pareto] svg title').textContent.includes('normalized')"
    )
    page.get_by_label("Find").fill("lattice")
    _when(page, "are among these")
    assert figure.locator("svg a").count() == 3
    link = figure.locator("svg a").first
    assert re.fullmatch(r"\.\./\.\./runs/[0-9a-f]+\.html", link.get_attribute("href"))
    page.go_back()
    page.go_back()
    page.wait_for_function("!location.hash")
    assert figure.locator("svg a").count() == before
    assert "bits per weight" in figure.locator("svg title").first.text_content()


def test_a_cell_is_copied_as_value_command_latex_or_bibtex(open_page, table):
    page = open_page(BOARD)
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    row = next(row for row in _ranked(table) if row.label == "round b4")
    cell = row.cells[table.questions[0].key]
    line = page.locator(f"table.board tr[data-row='{row_id(row)}']")
    line.locator("td.value a").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Copy this cell"

    def copied(steps: int) -> str:
        page.keyboard.press("Enter")
        page.get_by_role("menu").wait_for()
        for _ in range(steps):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.get_by_role("menu").wait_for(state="detached")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Copy this cell"
        found: str = page.evaluate("window.copied")
        return found

    assert float(copied(0)) == cell.primary.value
    assert copied(1) == cell.run.command
    latex = copied(2)
    assert latex.startswith("round b4 & $0.7100$ (")
    assert latex.count(" & ") == len(table.questions)
    assert latex.endswith("\\\\")
    assert copied(3) == row.entry.paper.bibtex("round")
    page.keyboard.press("Enter")
    page.get_by_role("menu").wait_for()
    page.keyboard.press("Escape")
    assert page.get_by_role("menu").count() == 0


def test_what_records_say_stays_text_in_what_scripts_draw(open_page):
    page = open_page(f"{BOARD}#q=evil")
    _when(page, "1 of ")
    page.locator(f"{VISIBLE} td.value").first.hover()
    page.get_by_label("Copy this cell").click()
    page.get_by_role("menu").wait_for()
    compared = open_page("compare.html#board=boards/shrink/causal-lm.html")
    compared.locator("#cells").wait_for()
    options = compared.locator("select[name=a] option").evaluate_all(
        "options => options.map(o => [o.value, o.label])"
    )
    evil = next(value for value, label in options if "<script>" in label)
    compared.locator("select[name=a]").select_option(evil)
    compared.wait_for_function("document.getElementById('compare-status').textContent !== ''")
    assert "share no cell" in compared.locator("#compare-status").inner_text()
    for each in (page, compared):
        assert each.evaluate("window.pwned") is None
        assert each.locator("main img, main script").count() == 0


def test_two_configurations_compare_as_the_package_does(open_page, table):
    a, b = (
        next(row for row in _ranked(table) if row.label == label) for label in ("lattice b4", "search b3")
    )
    page = open_page(f"compare.html#board={BOARD}&a={row_id(a)}&b={row_id(b)}")
    page.locator("#cells").wait_for()
    rows = page.locator("#cells tbody tr").all()
    assert len(rows) == len(table.questions) == 2
    for line, question in zip(rows, table.questions, strict=True):
        left, right = (row.cells[question.key].primary for row in (a, b))
        expected = stats.paired_difference(left.scores, right.scores, question.metric.aggregate)
        cells = [text.replace("−", "-") for text in line.locator("td").all_inner_texts()]
        low, high = (float(end) for end in cells[5].split(" to "))
        found = [float(cells[2]), float(cells[3]), float(cells[4]), low, high, float(cells[6])]
        wanted = [
            expected.value_a,
            expected.value_b,
            expected.difference,
            expected.low,
            expected.high,
            expected.p_value,
        ]
        assert found == pytest.approx(wanted, rel=2e-3, abs=6e-5)
        assert cells[7] == "win"
    assert "2 wins, 0 ties, 0 losses on 2 shared cells" in page.locator(".outcome").inner_text()
    assert page.locator("figure svg.square").count() == 2
    assert page.locator("figure svg.square").last.locator("circle").count() == 64
    differing = page.locator("section", has_text="Settings that differ").locator("tbody th").all_inner_texts()
    assert {"method", "bits", "draws"} <= set(differing)
    page.locator("select[name=b]").select_option(row_id(a))
    page.wait_for_function("document.getElementById('compare-status').textContent.includes('different')")
    page.go_back()
    page.locator("#cells").wait_for()
    assert page.locator("select[name=b]").input_value() == row_id(b)


def test_without_scripts_a_comparison_says_what_to_run(open_page):
    page = open_page("compare.html", script=False)
    assert "methodbench compare" in page.locator("noscript").inner_text()
    assert not page.locator("form").is_visible()


def test_pages_lead_to_the_comparison(open_page):
    page = open_page("methods/round.html")
    page.get_by_role("link", name=re.compile("Compare b4 with another")).click()
    page.locator("#cells").wait_for()
    assert "round b4" in page.locator(".outcome").inner_text()
    board = open_page(BOARD)
    board.get_by_role("link", name="Compare two").click()
    board.locator("#cells").wait_for()
