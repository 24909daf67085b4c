"""``doctor``: is everything as it should be?"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from methodbench.cli.output import db_option, size

if TYPE_CHECKING:
    from methodbench.catalog import Catalog

Say = Callable[[bool | None, str], None]


@click.command()
@db_option
def doctor(db: str | None) -> int:
    """Check the installation, the plugins, the cache and the database; exit code 1 when something is wrong."""
    import psutil

    from methodbench import __version__, sources
    from methodbench.catalog import load_catalog

    root = click.get_current_context().find_root()
    catalog = load_catalog(without=(root.obj or {}).get("without", ()))
    wrong = 0

    def say(good: bool | None, text: str) -> None:
        mark, colour = {True: ("ok  ", "green"), False: ("bad ", "red"), None: ("note", "yellow")}[good]
        click.echo(f"{click.style(mark, fg=colour)} {text}")

    say(True, f"methodbench {__version__}, Python {platform.python_version()}, {platform.platform()}")
    say(
        hasattr(os, "fork"),
        "isolated workers (fork)" if hasattr(os, "fork") else "no fork here: cells cannot be run",
    )
    wrong += not hasattr(os, "fork")
    memory = psutil.virtual_memory()
    say(True, f"{psutil.cpu_count()} cores, {size(memory.total)} memory, {size(memory.available)} free")
    for plugin in catalog.plugins:
        say(True, f"plugin {plugin.name} {plugin.version} ({plugin.module})")
    for problem in catalog.problems:
        say(False, f"plugin {problem.plugin}: {problem.error}")
        wrong += 1
    _check_extras(catalog, say)
    wrong += _check_claims(catalog, say)
    cache = sources.cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = psutil.disk_usage(str(cache)).free
        say(free > 2**30, f"cache {cache}, {size(free)} free")
    except OSError as error:
        say(False, f"cache {cache}: {error.strerror}")
        wrong += 1
    for variable, what in (("METHODBENCH_DATA", "data sets"), ("METHODBENCH_MODELS", "weights")):
        value = os.environ.get(variable)
        say(
            True if value else None,
            f"{variable}={value}" if value else f"{variable} is not set: no local {what}",
        )
    if sources.is_offline():
        say(None, "offline: nothing will be fetched")
    wrong += _check_database(db, say)
    return 1 if wrong else 0


def _check_extras(catalog: Catalog, say: Say) -> None:
    from methodbench.extras import missing_requirements

    entries = [
        *(("method", method.name, method.extra) for method in catalog.methods.values()),
        *(("model", model.name, model.extra) for model in catalog.models.values()),
        *(("task", task.name, task.extra) for task in catalog.tasks.values()),
    ]
    wanted = dict.fromkeys(
        (catalog.distribution(kind, name), extra) for kind, name, extra in entries if extra
    )
    for distribution, extra in wanted:
        missing = missing_requirements(distribution, extra)
        if missing:
            say(
                None,
                f"extra {extra} is incomplete ({', '.join(missing)}): pip install '{distribution}[{extra}]'",
            )
        else:
            say(True, f"extra {extra} is installed")


def _check_claims(catalog: Catalog, say: Say) -> int:
    from methodbench.claims import load_claims
    from methodbench.errors import MethodbenchError

    wrong = good = 0
    for method in catalog.methods.values():
        if method.claims:
            try:
                load_claims(catalog, method.name)
                good += 1
            except MethodbenchError as error:
                say(False, f"claims of {method.name}: {error}")
                wrong += 1
    if good:
        say(True, f"claims of {good} methods")
    return wrong


def _check_database(db: str | None, say: Say) -> int:
    from sqlalchemy import text

    from methodbench.errors import StoreError
    from methodbench.store import open_store
    from methodbench.store.location import default_url

    where = db or default_url()
    if "://" not in where and not Path(where).exists():
        say(None, f"database {where} does not exist yet")
        return 0
    try:
        with open_store(db, create=False) as store:
            count = len(store.runs())
            if store.engine.dialect.name == "sqlite":
                with store.engine.connect() as connection:
                    verdict = connection.execute(text("PRAGMA integrity_check")).scalar()
                if verdict != "ok":
                    say(False, f"database {where} is damaged: {verdict}")
                    return 1
    except StoreError as error:
        say(False, str(error))
        return 1
    say(True, f"database {where}: {count} runs")
    return 0
