"""``sources fetch``: weights ahead of time."""

from __future__ import annotations

import click

from methodbench.cli.output import get_catalog, size


@click.group()
def sources() -> None:
    """Fetch weights ahead of time."""


@sources.command()
@click.argument("models", nargs=-1)
@click.option("--offline", is_flag=True, help="Only say whether they are there.")
def fetch(models: tuple[str, ...], offline: bool) -> int:
    """Fetch the weights of MODELS (all listed models by default) into the cache, checked by their digest."""
    from methodbench import sources as origin
    from methodbench.errors import SourceError

    catalog = get_catalog()
    entries = [catalog.model(name) for name in models] or list(catalog.models.values())
    failures = 0
    for model in entries:

        def show(received: int, total: int | None, name: str = model.name) -> None:
            of = f" of {size(total)}" if total else ""
            click.echo(f"\r{name}: {size(received)}{of}   ", nl=False, err=True)

        try:
            fetched = origin.fetch(model.source, sha256=model.sha256, offline=offline or None, progress=show)
        except SourceError as error:
            failures += 1
            click.secho(f"{model.name}: {error.message}", fg="red", err=True)
            if error.hint:
                click.echo(f"  {error.hint}", err=True)
            continue
        where = fetched.path if fetched.path else "made here when first used"
        click.echo(f"{model.name}: {where}  {fetched.digest[:16]}")
    return 1 if failures else 0
