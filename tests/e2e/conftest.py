"""A site of made-up records in a real browser, opened from files."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from methodbench_leaderboard import build

RECORDS = Path(__file__).resolve().parent.parent / "leaderboard" / "records.py"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _missing(reason: str) -> None:
    if os.environ.get("METHODBENCH_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def made_up() -> SimpleNamespace:
    """What the module of made-up records defines."""
    return SimpleNamespace(**runpy.run_path(str(RECORDS)))


@pytest.fixture(scope="session")
def made_up_store(made_up, tmp_path_factory):
    with made_up.fill(tmp_path_factory.mktemp("records") / "results.db") as store:
        yield store


@pytest.fixture(scope="session")
def site(made_up, made_up_store, tmp_path_factory) -> Path:
    return build(made_up_store, made_up.make_catalog(), tmp_path_factory.mktemp("site") / "site").parent


@pytest.fixture(scope="module")
def browser() -> Iterator:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        _missing("no Chromium on this machine")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _missing("playwright is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, site):
    """Return a function that opens a page of the site; complaints and requests of all pages fail the test."""
    contexts, complaints, requests = [], [], []

    def opener(
        path: str,
        *,
        width: int = 1280,
        scheme: str = "light",
        script: bool = True,
        folder: Path = site,
    ):
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            java_script_enabled=script,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{folder.as_uri()}/{path}")
        return page

    yield opener
    for context in contexts:
        context.close()
    assert not complaints
    assert requests
    assert not [url for url in requests if not url.startswith("file://")]
