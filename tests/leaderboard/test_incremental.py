"""A build takes over what still holds, and the site is the same as if it had not."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest

from methodbench.store import open_store
from methodbench_leaderboard import build
from methodbench_leaderboard.manifest import MARKER


@pytest.fixture
def filled(made_up, tmp_path):
    with made_up.fill(tmp_path / "results.db") as store:
        yield store


def pages(site: Path) -> dict[str, Path]:
    return {str(path.relative_to(site)): path for path in site.rglob("*") if path.is_file()}


def inodes(site: Path) -> dict[str, int]:
    return {name: path.stat().st_ino for name, path in pages(site).items()}


def same(one: Path, other: Path) -> None:
    assert set(pages(one)) == set(pages(other))
    _, different, errors = filecmp.cmpfiles(one, other, sorted(pages(one)), shallow=False)
    assert (different, errors) == ([], [])


def test_a_build_of_the_same_records_takes_pages_over(filled, made_up, tmp_path):
    site = build(filled, made_up.make_catalog(), tmp_path / "site").parent
    before = inodes(site)
    build(filled, made_up.make_catalog(), site)
    after = inodes(site)
    for folder in ("runs/", "boards/", "methods/", "models/", "tasks/", "coverage/", "environments/"):
        names = [name for name in before if name.startswith(folder)]
        assert names, folder
        assert all(after[name] == before[name] for name in names), folder
    same(site, build(filled, made_up.make_catalog(), tmp_path / "fresh").parent)


def test_a_new_run_leaves_the_pages_of_the_others(filled, made_up, tmp_path):
    site = build(filled, made_up.make_catalog(), tmp_path / "site").parent
    before = inodes(site)
    maker = made_up.Maker(filled)
    maker.count = 1000
    run = maker.run(
        "lattice", "valley", {"test-loss": np.linspace(0, 1, 50)}, kind="optimizer", family="descend"
    )
    build(filled, made_up.make_catalog(), site)
    after = inodes(site)
    kept = [name for name in before if name.startswith("runs/")]
    assert all(after[name] == before[name] for name in kept)
    assert f"runs/{run.id}.html" in after
    # The board and the task with the run are other ones; the boards without it are not.
    assert after["boards/descend.html"] != before["boards/descend.html"]
    assert after["tasks/valley.html"] != before["tasks/valley.html"]
    assert after["boards/explain/cnn.html"] == before["boards/explain/cnn.html"]
    same(site, build(filled, made_up.make_catalog(), tmp_path / "fresh").parent)


def test_a_run_that_left_its_board_gets_another_page(filled, made_up, tmp_path):
    site = build(filled, made_up.make_catalog(), tmp_path / "site").parent
    maker = made_up.Maker(filled)
    maker.count = 2000
    replaced = next(run for run in filled.runs() if run.method == "glow")
    maker.run("glow", "insert", {"insertion": np.linspace(0, 1, 30)}, kind="explainer", family="explain",
              model="tiny-cnn", model_kind="cnn")  # fmt: skip
    before = inodes(site)
    build(filled, made_up.make_catalog(), site)
    assert inodes(site)[f"runs/{replaced.id}.html"] != before[f"runs/{replaced.id}.html"]
    assert "on no board" in (site / "runs" / f"{replaced.id}.html").read_text()


def test_an_altered_page_is_written_anew(filled, made_up, tmp_path):
    site = build(filled, made_up.make_catalog(), tmp_path / "site").parent
    page = next((site / "runs").iterdir())
    original = page.read_bytes()
    page.write_bytes(original + b"<!-- mine -->")
    build(filled, made_up.make_catalog(), site)
    assert page.read_bytes() == original


@pytest.mark.parametrize(
    "text", ["", "A site built by methodbench.\n", '{"files": [1]}', '{"files": {"a": 1}}']
)
def test_a_damaged_manifest_costs_time_only(filled, made_up, tmp_path, text):
    site = build(filled, made_up.make_catalog(), tmp_path / "site").parent
    (site / MARKER).write_text(text)
    before = inodes(site)
    build(filled, made_up.make_catalog(), site)
    after = inodes(site)
    assert not [name for name in after if name.startswith("runs/") and after[name] == before[name]]
    same(site, build(filled, made_up.make_catalog(), tmp_path / "fresh").parent)


def test_the_database_that_a_site_offers_builds_the_same_pages(filled, made_up, tmp_path):
    site = build(filled, made_up.make_catalog(), tmp_path / "site").parent
    with open_store(str(site / "results.db"), create=False) as copy:
        again = build(copy, made_up.make_catalog(), tmp_path / "again").parent
    names = [name for name in pages(site) if name.endswith(".html") and name != "about.html"]
    _, different, errors = filecmp.cmpfiles(site, again, names, shallow=False)
    assert (different, errors) == ([], [])
