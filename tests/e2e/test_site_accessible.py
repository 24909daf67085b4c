"""WCAG 2.2 AA by axe-core, over a page of every kind, in light and dark, on phones, tablets and desks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

RULES = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]},
    # Style sheets are not asked for again: what is computed is looked at.
    "preload": False,
}
KINDS = ("boards", "methods", "models", "tasks", "runs", "environments")
BOARD = "boards/shrink/causal-lm.html"
FILTERED = f"{BOARD}#bits-max=8&task=text-ppl"


def _one_of_each_kind(site: Path) -> list[str]:
    pages = sorted(path.name for path in site.glob("*.html"))
    for kind in KINDS:
        found = sorted((site / kind).rglob("*.html"), key=lambda path: path.stat().st_size)
        pages += [found[-1].relative_to(site).as_posix()] if found else []
    return pages


def _open_everything(page: Any) -> None:
    """Open a menu of filters and the menu that copies a cell."""
    page.wait_for_function("document.querySelector('#filter-status').textContent.includes('are among these')")
    page.locator("summary", has_text="Columns").click()
    page.locator("table.board tbody.ranked td.value:visible a").last.focus()
    page.get_by_label("Copy this cell").press("Enter")
    page.get_by_role("menu").wait_for()


def test_no_page_violates_wcag_2_2_aa(open_page, site):
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")
    pages = _one_of_each_kind(site)
    assert len(pages) >= 10
    found = {}
    for path in [*pages, BOARD, FILTERED]:
        page = open_page(path)
        if path == "compare.html":
            page.locator("#cells").wait_for()
        if path == FILTERED:
            _open_everything(page)
        page.evaluate(axe.AXE_SCRIPT)
        for width in (360, 768, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            # Until the page has been laid out at this width.
            page.evaluate(
                "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
            )
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                results = page.evaluate("rules => axe.run(document, rules)", RULES)
                assert results["passes"], path
                for violation in results["violations"]:
                    nodes = [node["html"][:160] for node in violation["nodes"][:3]]
                    found[path, width, scheme, violation["id"]] = nodes
        page.close()
    assert not found
