"""``site build`` and ``site serve``."""

from __future__ import annotations

from pathlib import Path

import click

from methodbench.cli.output import db_option, get_catalog


@click.group()
def site() -> None:
    """Build the leaderboard and look at it."""


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


@site.command()
@click.option(
    "--out", default="site", show_default=True, type=click.Path(path_type=Path), help="Folder of the site."
)
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
