"""The site in a real browser, opened from files."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

BOARD = "boards/shrink/causal-lm.html"


def _one_of_each(site: Path) -> list[str]:
    runs = sorted((site / "runs").glob("*.html"), key=lambda path: path.stat().st_size)
    boards = [str(path.relative_to(site)) for path in sorted((site / "boards").rglob("*.html"))]
    fixed = ["index.html", "methods.html", "runs.html", "about.html", "methods/round.html", "compare.html"]
    return [*fixed, *boards, f"runs/{runs[0].name}", f"runs/{runs[-1].name}"]


def _screenshot(page, folder: Path, path: str, name: str) -> None:
    """Keep a picture of the page for a person to look at."""
    page.screenshot(path=folder / f"{path.replace('/', '_')}.{name}.png", full_page=True)


@pytest.mark.parametrize(("name", "width", "scheme"), [("desk", 1280, "light"), ("phone", 360, "dark")])
def test_no_page_overflows_complains_or_runs_what_records_say(open_page, site, tmp_path, name, width, scheme):
    for path in _one_of_each(site):
        page = open_page(path, width=width, scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.evaluate("window.pwned") is None, path
        _screenshot(page, tmp_path, path, name)
        page.close()


def test_every_page_opens_from_files_without_a_complaint(open_page, site):
    page = open_page("index.html")
    paths = sorted(site.rglob("*.html"))
    assert len(paths) > 60
    for path in paths:
        page.goto(path.as_uri())
        assert page.title().endswith("methodbench")


def test_pages_are_dark_where_the_reader_wants_it(open_page):
    light = open_page("index.html").evaluate("getComputedStyle(document.body).backgroundColor")
    dark = open_page("index.html", scheme="dark").evaluate("getComputedStyle(document.body).backgroundColor")
    assert light == "rgb(252, 252, 250)"
    assert dark == "rgb(21, 23, 26)"


def _labels(page) -> list[str]:
    return page.locator("table.board tbody.ranked tr:visible th").all_inner_texts()


def test_a_column_sorts_both_ways_keeps_the_baseline_on_top_and_is_kept_in_the_address(open_page):
    page = open_page(BOARD)
    head = page.locator("table.board thead tr:last-child th", has_text="Perplexity")
    values = "rows => rows.map(row => row.querySelectorAll('td.value')[1].dataset.sort).filter(Boolean).map(Number)"
    rows = page.locator("table.board tbody.ranked tr")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    upwards = rows.evaluate_all(values)
    assert len(upwards) >= 5
    assert upwards == sorted(upwards)
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert rows.evaluate_all(values) == upwards[::-1]
    assert page.locator("table.board tbody").first.get_attribute("class") == "pinned"
    order = _labels(page)
    page.reload()
    assert _labels(page) == order


def test_a_board_is_complete_and_sorted_without_scripts(open_page):
    with_script, without = open_page(BOARD), open_page(BOARD, script=False)
    assert _labels(with_script) == _labels(without)
    assert not without.locator("form.filters").is_visible()


def test_a_command_is_copied(open_page, site):
    path = next(str(path.relative_to(site)) for path in sorted((site / "runs").glob("*.html")))
    page = open_page(path)
    page.locator("pre.copy button").first.click()
    page.wait_for_function("document.querySelector('pre.copy button').textContent !== 'Copy'")
    assert page.locator("pre.copy button").first.inner_text() == "Copied"


def test_the_skip_link_is_the_first_stop_of_the_keyboard(open_page):
    page = open_page(BOARD)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_text_stands_out_from_its_background(open_page):
    """WCAG 2.2 AA: 4.5 to 1, for every colour of text on the backgrounds it is set on."""
    for scheme in ("light", "dark"):
        page = open_page(BOARD, scheme=scheme)
        ratios = page.evaluate(
            """() => {
              const probe = document.createElement('span');
              document.body.append(probe);
              const light = name => {
                probe.style.color = `var(--${name})`;
                const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
                const [r, g, b] = parts.map(v => v / 255)
                  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const found = {};
              for (const text of ['fg', 'dim', 'accent', 'ok', 'bad'])
                for (const back of ['bg', 'soft']) {
                  const [a, b] = [light(text), light(back)].sort((x, y) => y - x);
                  found[text + ' on ' + back] = (a + 0.05) / (b + 0.05);
                }
              return found;
            }"""
        )
        assert len(ratios) == 10
        assert min(ratios.values()) >= 4.5, ratios
