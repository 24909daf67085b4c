"""``site publish``: a folder for a static host, a branch for a repository's pages."""

from __future__ import annotations

import filecmp
import subprocess

import pytest
import yaml

from methodbench.errors import MethodbenchError
from methodbench_leaderboard.publish import publish_branch, publish_folder, write_workflow


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, an ignored pattern, and an uncommitted change."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "A")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "work.txt").write_text("committed")
    (folder / ".gitignore").write_text("*.html\n*.csv\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    (folder / "work.txt").write_text("changed")
    return folder


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_published_folder_is_the_site_and_a_marker_for_hosts(site, tmp_path):
    target = publish_folder(site, tmp_path / "pages")
    assert files(target) == files(site) | {".nojekyll"}
    _, different, missing = filecmp.cmpfiles(site, target, files(site), shallow=False)
    assert not different
    assert not missing


def test_publishing_again_replaces_the_copy_and_nothing_else(site, tmp_path):
    target = publish_folder(site, tmp_path / "pages")
    (target / "stale.html").write_text("x")
    publish_folder(site, target)
    assert not (target / "stale.html").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(MethodbenchError, match="not built by methodbench"):
        publish_folder(site, mine)
    assert files(mine) == {"thesis.txt"}


def test_a_link_in_a_site_is_not_followed(site, tmp_path):
    first = publish_folder(site, tmp_path / "pages")
    (first / "secret").symlink_to("/etc/passwd")
    with pytest.raises(MethodbenchError, match="is a link"):
        publish_folder(first, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_the_branch_holds_the_whole_site_and_the_working_tree_is_untouched(site, repository):
    commit = publish_branch(site, repository)
    assert git(repository, "rev-parse", "gh-pages").startswith(commit)
    assert set(git(repository, "ls-tree", "-r", "--name-only", "gh-pages").splitlines()) == files(site) | {
        ".nojekyll"
    }
    assert git(repository, "rev-parse", "--abbrev-ref", "HEAD") == "main"
    assert git(repository, "status", "--porcelain") == "M work.txt"


def test_publishing_the_same_site_again_makes_no_commit_and_another_adds_one(site, repository):
    first = publish_branch(site, repository)
    assert publish_branch(site, repository) == first
    changed = publish_folder(site, repository.parent / "changed")
    (changed / "results.csv").write_text("x")
    publish_branch(changed, repository)
    assert git(repository, "rev-list", "--count", "gh-pages") == "2"


def test_a_branch_that_is_checked_out_is_not_rewritten(site, repository):
    git(repository, "checkout", "-q", "-b", "gh-pages")
    with pytest.raises(MethodbenchError, match="is checked out"):
        publish_branch(site, repository)


def test_outside_a_repository_the_message_says_what_else_to_do(site, tmp_path):
    with pytest.raises(MethodbenchError, match="git rev-parse failed") as caught:
        publish_branch(site, tmp_path)
    assert "Publish to a folder" in caught.value.hint


def test_what_is_no_site_is_not_published(tmp_path):
    with pytest.raises(MethodbenchError, match="is no site"):
        publish_folder(tmp_path, tmp_path / "pages")


def test_the_workflow_is_valid_names_the_database_and_is_never_overwritten(tmp_path):
    path = write_workflow(tmp_path, "results/bench.db")
    steps = yaml.safe_load(path.read_text())["jobs"]["publish"]["steps"]
    assert "methodbench site build --db results/bench.db --out build/site" in [
        step.get("run") for step in steps
    ]
    with pytest.raises(MethodbenchError, match="exists already"):
        write_workflow(tmp_path, "other.db")


@pytest.mark.parametrize("database", ["/abs.db", "../up.db", "a b.db", "a.db; rm -rf .", "${{ secrets.X }}"])
def test_a_database_name_that_is_no_plain_path_goes_into_no_workflow(tmp_path, database):
    with pytest.raises(MethodbenchError, match="no path inside the repository"):
        write_workflow(tmp_path, database)
    assert not list(tmp_path.iterdir())
