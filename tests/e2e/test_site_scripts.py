"""What scripts add to boards, in a real browser: filters that rank again, charts, copies, comparisons."""

from __future__ import annotations

import re

import numpy as np
import pytest

from methodbench import stats
from methodbench_leaderboard import charts, diagrams, formats
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


def _labelled(figure) -> list[str]:
    return [text.split("\n")[0] for text in figure.locator("svg text.name.end > title").all_text_contents()]


def test_a_forest_plot_is_drawn_again_for_what_is_left(open_page, table):
    page = open_page(BOARD)
    figure = page.locator("figure[data-chart=forest][data-of='1']")
    whole = figure.inner_html()
    page.get_by_label("Find").fill("b3")
    _when(page, "are among these")
    question = table.questions[1]
    kept = [row for row in table.rows if row.baseline or "b3" in row.variant]
    cells = [(row, row.cells[question.key]) for row in kept]
    expected = charts.forest_chart(
        [
            charts.Whisker(
                row.label, "", cell.primary.value, cell.primary.low, cell.primary.high, row.baseline
            )
            for row, cell in cells
        ]
    )
    assert _labelled(figure) == [row.label for row in kept]
    middles = figure.locator("svg circle").evaluate_all(
        "all => all.map(each => Number(each.getAttribute('cx')))"
    )
    assert middles == pytest.approx([line.at for line in expected.lines], abs=0.11)
    ends = figure.locator("svg line.iv").evaluate_all(
        "all => all.map(each => [Number(each.getAttribute('x1')), Number(each.getAttribute('x2'))])"
    )
    assert np.array(ends) == pytest.approx(
        np.array([[line.low, line.high] for line in expected.lines]), abs=0.11
    )
    page.get_by_role("button", name="Reset").click()
    _when(page, "among all rows")
    assert figure.inner_html() == whole


def test_mean_ranks_and_the_heat_map_are_drawn_again_for_what_is_left(open_page, table):
    page = open_page(BOARD)
    mean_ranks, heat = (page.locator(f"figure[data-chart={name}]") for name in ("critical", "heat"))
    whole = mean_ranks.inner_html(), heat.inner_html()
    page.get_by_label("Find").fill("b3")
    _when(page, "are among these")
    kept = [row for row in _ranked(table) if "b3" in row.variant]
    values = np.array(
        [
            [
                row.cells[question.key].primary.value * (1 if question.metric.lower_is_better else -1)
                for question in table.questions
            ]
            for row in kept
        ]
    )
    expected = diagrams.critical_difference([row.label for row in kept], values)
    caption = mean_ranks.locator("figcaption").inner_text()
    assert f"critical difference {formats.number(expected.distance)};" in caption
    assert f"over {len(kept)} configurations: p = {formats.number(expected.p_value)})" in caption
    assert _titles(mean_ranks.locator("svg text.name")) == [item.label for item in expected.methods]
    places = mean_ranks.locator("svg path.lead").evaluate_all(
        "all => all.map(each => each.getAttribute('d').match(/^M([\\d.]+),/)[1]).map(Number)"
    )
    assert places == pytest.approx([item.x for item in expected.methods], abs=0.11)
    shown = [*table.baselines, *kept]
    wanted = [
        shade
        for row in zip(
            *(
                diagrams.shades(
                    [_heat_cell(row.cells[question.key], question) for row in shown],
                    question.metric.lower_is_better,
                )
                for question in table.questions
            ),
            strict=True,
        )
        for shade in row
    ]
    assert heat.locator("rect").evaluate_all("all => all.map(each => each.getAttribute('class'))") == wanted
    page.get_by_label("Find").fill("round b")
    _when(page, "3 of ")
    assert "fewer than three" in mean_ranks.locator("figcaption").inner_text()
    assert not mean_ranks.locator("svg").count()
    page.get_by_role("button", name="Reset").click()
    _when(page, "among all rows")
    assert (mean_ranks.inner_html(), heat.inner_html()) == whole


def _titles(texts) -> list[str]:
    return [text.locator("title").text_content() for text in texts.all()]


def _heat_cell(cell, question) -> diagrams.HeatCell:
    sign = -1.0 if question.metric.lower_is_better else 1.0
    better = None if cell.difference is None else sign * cell.difference.difference
    return diagrams.HeatCell(cell.primary.value, better, "")


def test_shades_of_a_script_are_those_of_the_builder(open_page):
    page = open_page(BOARD)
    rng = np.random.default_rng(4)
    for lower in (True, False):
        for compared in (True, False):
            values = np.round(rng.normal(size=17), 1)
            values[3], values[4] = np.inf, -np.inf
            cells: list[diagrams.HeatCell | None] = [
                diagrams.HeatCell(
                    float(value), float(-value) if compared and np.isfinite(value) and n % 3 else None, ""
                )
                for n, value in enumerate(values)
            ]
            cells[5] = None
            sent = [
                cell and {"value": str(cell.value).replace("inf", "Infinity"), "better": cell.difference}
                for cell in cells
            ]
            found = page.evaluate(
                """([cells, lower]) => methodbenchCharts.shades(cells.map((cell) => cell && {
                  value: Number(cell.value), better: cell.better === null ? undefined : cell.better}), lower)""",
                [sent, lower],
            )
            assert found == diagrams.shades(cells, lower)


def test_the_tasks_that_are_chosen_make_the_mean_ranks(open_page):
    page = open_page(f"{BOARD}#task=text-ppl")
    page.wait_for_function("document.documentElement.dataset.updated")
    assert "two tasks" in page.locator("figure[data-chart=critical] figcaption").inner_text()
    assert "tasks are left" in page.locator("figure[data-chart=heat] figcaption").inner_text()


def test_curves_of_hidden_rows_are_hidden(open_page):
    page = open_page("boards/descend.html#q=walk")
    _when(page, "are among these")
    figures = page.locator("figure[data-chart=curves]")
    assert figures.count() == 2
    for figure in figures.all():
        assert figure.locator("path.curve[data-line]:not([hidden])").count() == 1
        assert figure.locator("ul.legend li:visible a").all_inner_texts() == ["walk"]
    page.get_by_role("button", name="Reset").click()
    _when(page, "among all rows")
    assert figures.first.locator("ul.legend li:visible").count() == 3


def test_what_has_no_score_is_listed_for_what_is_left(open_page):
    page = open_page(f"{BOARD}#q=round")
    _when(page, "are among these")
    assert page.locator(".missing li").count() > page.locator(".missing li:visible").count() > 0
    assert all("round" in text for text in page.locator(".missing li:visible").all_inner_texts())


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
    page.locator("p", has_text="Compare with another").get_by_role("link", name="b4", exact=True).click()
    page.locator("#cells").wait_for()
    assert "round b4" in page.locator(".outcome").inner_text()
    board = open_page(BOARD)
    board.get_by_role("link", name="Compare two").click()
    board.locator("#cells").wait_for()
