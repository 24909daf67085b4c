"""``doctor``: is everything as it should be?"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from methodbench.cli.output import db_option, size
from methodbench.variables import VARIABLES

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.store import Store
    from methodbench.store.repair import Findings

Say = Callable[[bool | None, str], None]


@click.command()
@click.option(
    "--repair", is_flag=True, help="Put the database right where that can be done; the original is kept."
)
@db_option
def doctor(repair: bool, db: str | None) -> int:
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
    for remark in catalog.remarks:
        say(None, f"plugin {remark.plugin}: {remark.error}")
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
    for variable in VARIABLES:
        value = os.environ.get(variable)
        # The address of a database server may hold a password.
        if value and "://" not in value:
            say(True, f"{variable}={value}")
    for variable, what in (("METHODBENCH_DATA", "data sets"), ("METHODBENCH_MODELS", "weights")):
        if not os.environ.get(variable):
            say(None, f"{variable} is not set: no local {what}")
    if sources.is_offline():
        say(None, "offline: nothing will be fetched")
    wrong += _check_database(db, repair, say)
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


def _check_database(db: str | None, repair: bool, say: Say) -> int:
    from methodbench.errors import StoreError
    from methodbench.store import open_store
    from methodbench.store.location import default_url
    from methodbench.store.repair import examine, mend, rebuild

    where = db or default_url()
    path = None if "://" in where else Path(where)
    if path is not None and not path.exists():
        say(None, f"database {where} does not exist yet")
        return 0
    try:
        with open_store(db, create=False) as store:
            findings = examine(store)
            if findings.good:
                return _tell_good(store, findings, mend(store, findings) if repair else 0, repair, say)
            problems = findings.damage or [
                f"{_runs(len(findings.broken))} with a broken seal: what they say was changed"
            ]
            count = len(findings.broken)
    except StoreError as error:
        problems, count = [error.message], 0
        if path is None or "cannot be read" not in error.message:
            say(False, str(error))
            return 1
    say(
        False,
        f"database {where} is damaged: {problems[0]}"
        + (f" (and {len(problems) - 1} more)" if problems[1:] else ""),
    )
    if not repair or path is None:
        if path is not None:
            click.echo("     `methodbench doctor --repair` saves what can be read, and keeps the original.")
        elif count:
            click.echo("     Restore the server's database from a backup.")
        return 1
    try:
        done = rebuild(path)
    except StoreError as error:
        say(False, str(error))
        return 1
    say(True, f"repaired: {_runs(done.saved)} saved; the damaged file is {done.kept}")
    if done.lost:
        say(None, f"{_runs(done.lost)} could not be saved: `methodbench run` makes them again")
    return 0


def _tell_good(store: Store, findings: Findings, sealed: int, repair: bool, say: Say) -> int:
    say(True, f"database {store.url}: {_runs(len(store.runs()))}, every seal holds")
    if findings.dead:
        killed = f"{len(findings.dead)} run{'s that were' if len(findings.dead) != 1 else ' that was'} killed"
        say(None, f"claims of {killed}" + (": given back" if repair else "; the next run takes them over"))
    if sealed:
        say(True, f"{_runs(sealed)} of an older version sealed")
    elif findings.unsealed:
        say(None, f"{_runs(findings.unsealed)} of an older version without a seal: --repair seals them")
    return 0


def _runs(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"
