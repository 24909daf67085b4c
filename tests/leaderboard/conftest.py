"""A site built from made-up records, shared by the tests of this folder."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from methodbench_leaderboard import build


@pytest.fixture(scope="session")
def made_up() -> SimpleNamespace:
    """What ``records.py`` defines."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("records.py"))))


@pytest.fixture(scope="session")
def store(made_up, tmp_path_factory):
    with made_up.fill(tmp_path_factory.mktemp("records") / "results.db") as opened:
        yield opened


@pytest.fixture(scope="session")
def site(made_up, store, tmp_path_factory) -> Path:
    """The folder of a site built from the records."""
    return build(store, made_up.make_catalog(), tmp_path_factory.mktemp("site") / "site").parent
