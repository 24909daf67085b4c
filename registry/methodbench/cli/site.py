"""``site build``, ``site check``, ``site publish`` and ``site serve``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from methodbench.cli.output import db_option, echo_json, get_catalog, json_option

if TYPE_CHECKING:
    from methodbench_leaderboard.check import Problem


_site_option = click.option(
    "--out", default="site", show_default=True, type=click.Path(path_type=Path), help="Folder of the site."
)


@click.group()
def site() -> None:
    """Build the leaderboard, look at it and publish it."""


@site.command()
@click.option(
    "--out", default="site", show_default=True, type=click.Path(path_type=Path), help="Folder to write."
)
@db_option
def build(out: Path, db: str | None) -> None:
    """Build the static site from the database; it opens by double click and needs no server."""
    from methodbench import api

    page = api.build_site(out, db=db, catalog=get_catalog())
    click.echo(f"Built {page}")


def _problems(out: Path) -> list[Problem]:
    from methodbench.errors import MissingExtraError

    try:
        from methodbench_leaderboard.check import check_site
    except ModuleNotFoundError as error:
        raise MissingExtraError("site check", error.name or "", "methodbench[site]") from error
    return check_site(out)


@site.command()
@_site_option
@json_option
def check(out: Path, as_json: bool) -> None:
    """Look for dead links, requests to other hosts, missing titles and invalid HTML; exit code 1 when there are."""
    problems = _problems(out)
    if as_json:
        echo_json([dataclasses.asdict(problem) for problem in problems])
    else:
        for problem in problems:
            click.echo(problem)
        click.echo(f"{len(problems) or 'No'} problem{'' if len(problems) == 1 else 's'} in {out}")
    if problems:
        raise click.exceptions.Exit(1)


@site.command()
@_site_option
@click.option(
    "--to", required=True, help="Folder to write, or `gh-pages` for that branch of this repository."
)
@click.option(
    "--workflow",
    metavar="DATABASE",
    help="Also write a workflow file that builds and publishes the site when DATABASE changes.",
)
@click.option("--unchecked", is_flag=True, help="Publish without `site check`.")
def publish(out: Path, to: str, workflow: str | None, unchecked: bool) -> None:
    """Put the built site where a static host takes it from."""
    from methodbench.errors import MethodbenchError
    from methodbench_leaderboard import publish as publishing

    if not unchecked and (problems := _problems(out)):
        raise MethodbenchError(
            f"{out} has {len(problems)} problem{'' if len(problems) == 1 else 's'}; the first is {problems[0]}",
            "`methodbench site check` lists them; --unchecked publishes all the same.",
        )
    if to == publishing.BRANCH:
        commit = publishing.publish_branch(out, Path.cwd())
        click.echo(f"Branch {to} is at {commit}. Send it with: git push origin {to}")
    else:
        click.echo(f"Published {publishing.publish_folder(out, Path(to))}")
    if workflow is not None:
        click.echo(f"Wrote {publishing.write_workflow(Path.cwd(), workflow)}")


@site.command()
@_site_option
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 picks a free one."
)
def serve(out: Path, port: int) -> None:
    """Serve the site on this machine until Ctrl-C."""
    import functools
    import http.server

    from methodbench.errors import MethodbenchError

    if not (out / "index.html").is_file():
        raise MethodbenchError(f"no site in {out}", "Build it first: `methodbench site build`.")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(out))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise MethodbenchError(
            f"cannot listen on port {port}: {error.strerror}", "Choose another with --port."
        ) from error
    with server:
        click.echo(f"Serving {out} at http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C stops)")
        server.serve_forever()
