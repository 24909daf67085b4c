"""Pictures of a site's main pages, to be looked at: on a desk, on a phone, and in the dark.

python tests/e2e/screenshots.py SITE FOLDER
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

#: name: (width, colour scheme)
SCREENS = {"desk": (1280, "light"), "phone": (360, "light"), "dark": (1280, "dark")}


def main_pages(site: Path) -> list[str]:
    """Return a page of each kind, the largest, and the four largest boards, also filtered."""
    pages = [f"{name}.html" for name in ("index", "methods", "tasks", "runs", "about", "compare", "coverage")]
    for kind in ("boards", "methods", "tasks", "models", "runs", "environments"):
        found = sorted((site / kind).rglob("*.html"), key=lambda path: path.stat().st_size)
        most = 4 if kind == "boards" else 1
        pages += [path.relative_to(site).as_posix() for path in found[-most:]]
    boards = [page for page in pages if page.startswith("boards/")]
    return [page for page in pages if (site / page).is_file()] + [f"{board}#bits-max=8" for board in boards]


def take(browser: Any, site: Path, folder: Path) -> list[Path]:
    """Save pictures of the main pages of ``site`` to ``folder``; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    for name, (width, scheme) in SCREENS.items():
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        for path in main_pages(site):
            page = context.new_page()
            page.goto(f"{site.resolve().as_uri()}/{path}")
            page.wait_for_timeout(300)
            file = folder / f"{path.replace('/', '_').replace('#', '_')}.{name}.png"
            page.screenshot(path=file, full_page=True)
            taken.append(file)
            page.close()
        context.close()
    return taken


if __name__ == "__main__":
    from playwright.sync_api import sync_playwright

    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("site", type=Path)
    options.add_argument("folder", type=Path)
    given = options.parse_args()
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        opened = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        print(*take(opened, given.site, given.folder), sep="\n")
        opened.close()
