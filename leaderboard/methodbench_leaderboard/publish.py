"""Puts a built site where a static host takes it from: a folder, or a branch of a git repository."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from methodbench.errors import MethodbenchError
from methodbench_leaderboard.manifest import MARKER
from methodbench_leaderboard.pages import replace_folder

#: Hosts that would otherwise leave out files whose names begin with an underscore look for this.
NO_JEKYLL = ".nojekyll"
BRANCH = "gh-pages"
WORKFLOW = Path(".github/workflows/methodbench-site.yml")

_WORKFLOW_TEXT = """\
# Builds the leaderboard from the database in this repository and publishes it as its pages.
name: leaderboard
on:
  push:
    branches: [main]
    paths: ["{database}", ".github/workflows/methodbench-site.yml"]
  workflow_dispatch:
permissions:
  contents: read
  pages: write
  id-token: write
concurrency: {{group: pages, cancel-in-progress: true}}
jobs:
  publish:
    runs-on: ubuntu-latest
    environment: {{name: github-pages, url: "${{{{ steps.deployment.outputs.page_url }}}}"}}
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {{python-version: "3.11"}}
      - run: pip install 'methodbench[site]'
      - run: methodbench site build --db {database} --out build/site
      - run: methodbench site publish --out build/site --to build/pages
      - uses: actions/upload-pages-artifact@v3
        with: {{path: build/pages}}
      - id: deployment
        uses: actions/deploy-pages@v4
"""


def publish_folder(site: Path, target: Path) -> Path:
    """Copy a site to ``target``, in one step; a folder there is replaced when it is an earlier copy.

    Raises:
        MethodbenchError: there is no site, or ``target`` holds something else.
    """
    _check_site_is_there(site)
    if target.resolve() == site.resolve():
        raise MethodbenchError(f"{target} is the site itself", "Name another folder with --to.")

    def copy(fresh: Path) -> None:
        _copy_tree(site, fresh)
        (fresh / NO_JEKYLL).touch()

    replace_folder(target, copy)
    return target


def publish_branch(site: Path, repository: Path, branch: str = BRANCH) -> str:
    """Commit a site as the whole content of a branch, without touching the working tree or the index.

    Returns:
        The commit, abbreviated; that of the branch where the site is on it already.

    Raises:
        MethodbenchError: there is no site, ``repository`` is no git repository, or git refuses.
    """
    _check_site_is_there(site)
    top = Path(_git(repository, "rev-parse", "--show-toplevel"))
    if _git(top, "rev-parse", "--abbrev-ref", "HEAD") == branch:
        raise MethodbenchError(
            f"the branch {branch} is checked out in {top}", "Switch to another branch first: it is rewritten."
        )
    with tempfile.TemporaryDirectory(prefix="methodbench-publish-") as scratch:
        content = Path(scratch) / "content"
        _copy_tree(site, content)
        (content / NO_JEKYLL).touch()
        index = Path(scratch) / "index"
        # Whatever the repository ignores, a built page is meant.
        _git(top, f"--work-tree={content}", "add", "--all", "--force", ".", cwd=content, index=index)
        tree = _git(top, "write-tree", index=index)
    parent = _git(top, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}", missing_ok=True)
    if parent and _git(top, "rev-parse", f"{parent}^{{tree}}") == tree:
        return parent[:12]
    parents = ["-p", parent] if parent else []
    commit = _git(top, "commit-tree", tree, *parents, "-m", "Leaderboard built by methodbench")
    _git(top, "update-ref", f"refs/heads/{branch}", commit, parent or "0" * 40)
    return commit[:12]


def write_workflow(repository: Path, database: str) -> Path:
    """Write a workflow that builds and publishes the site whenever ``database`` changes on the main branch.

    Raises:
        MethodbenchError: the file is there already and is left as it is, or ``database`` is no plain relative path.
    """
    if not re.fullmatch(r"(?!/)(?!.*\.\.)[A-Za-z0-9._/-]+", database):
        raise MethodbenchError(
            f"{database!r} is no path inside the repository",
            "Give it relative to the repository, in letters, digits, dots, dashes and slashes.",
        )
    path = repository / WORKFLOW
    if path.exists():
        raise MethodbenchError(f"{path} exists already", "Nothing was written: move it away first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_WORKFLOW_TEXT.format(database=database), encoding="utf-8")
    return path


def _check_site_is_there(site: Path) -> None:
    if not (site / MARKER).is_file():
        raise MethodbenchError(
            f"{site} is no site of methodbench", "Build it first: `methodbench site build`."
        )


def _copy_tree(source: Path, target: Path) -> None:
    """Copy files and folders; a link is an error, since what it points to may be anything."""
    for folder, _, names in os.walk(source):
        there = target / Path(folder).relative_to(source)
        there.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = Path(folder) / name
            if path.is_symlink():
                raise MethodbenchError(f"{path} is a link, which a site has none of", "Build the site again.")
            (there / name).write_bytes(path.read_bytes())


def _git(
    repository: Path,
    *arguments: str,
    cwd: Path | None = None,
    index: Path | None = None,
    missing_ok: bool = False,
) -> str:
    """Run git in ``repository`` and return what it prints; empty where it fails and that is allowed.

    Args:
        cwd: folder to run it in, where that is not part of the repository.
        index: file to use in place of the repository's index.
    """
    git_dir = [] if cwd is None else [f"--git-dir={_git(repository, 'rev-parse', '--absolute-git-dir')}"]
    try:
        done = subprocess.run(
            ["git", *git_dir, *arguments],
            cwd=cwd or repository,
            env=os.environ | ({"GIT_INDEX_FILE": str(index)} if index else {}),
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise MethodbenchError(
            f"cannot run git in {repository}: {error.strerror}", "Install git, or publish to a folder."
        ) from error
    if done.returncode == 0:
        return done.stdout.strip()
    if missing_ok:
        return ""
    problem = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise MethodbenchError(
        f"git {arguments[0]} failed in {repository}: {problem}", "Publish to a folder instead."
    )
