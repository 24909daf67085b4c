"""The leaderboard: a static site that is a pure function of the result database and the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.store import Store

__all__ = ["build"]


def build(store: Store, catalog: Catalog, out: Path) -> Path:
    """Write the site to the folder ``out`` and return the path of its first page.

    The folder is replaced in one step when every page is written; a build that fails leaves it as it was.

    Raises:
        MethodbenchError: ``out`` holds something that is not a site, or cannot be written.
    """
    from methodbench_leaderboard.pages import write_site

    return write_site(store, catalog, out)
