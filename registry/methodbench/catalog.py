"""The catalogue: what every installed plugin offers, and what fits what.

Plugins are found through the entry-point group ``methodbench``. One that cannot be imported or takes too long to
import, that speaks hooks of another version or returns nonsense, is left out and named in
:attr:`Catalog.problems`; everything else works.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

import pluggy

from methodbench import hookspecs
from methodbench.entries import Family, Method, Model, SuiteFile, Task
from methodbench.errors import UnknownNameError

E = TypeVar("E", Family, Method, Model, Task, SuiteFile)

#: CPU seconds that the import of a plugin's module may take; ``METHODBENCH_IMPORT_BUDGET`` overrides it.
IMPORT_BUDGET = 0.5
#: Seconds after which an import that hangs is broken off.
IMPORT_LIMIT = 10.0
#: Entries that one hook may return: a generator without an end must not stop every command.
MOST_ENTRIES = 10_000

#: Kinds of methods that, where they name no kind of model, train whatever a task gives them.
_TRAINERS = ("optimizer", "training")


@dataclass(frozen=True, slots=True)
class PluginProblem:
    """A plugin, or one of its entries, that was left out."""

    plugin: str
    error: str


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """An installed plugin."""

    name: str
    module: str
    distribution: str
    version: str
    import_seconds: float


@dataclass(slots=True)
class Catalog:
    """Entries of all plugins by name."""

    manager: pluggy.PluginManager
    families: dict[str, Family] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    suites: dict[str, SuiteFile] = field(default_factory=dict)
    plugins: list[PluginInfo] = field(default_factory=list)
    problems: list[PluginProblem] = field(default_factory=list)
    remarks: list[PluginProblem] = field(default_factory=list)
    """Plugins that work, and use what a later version will no longer have."""
    owners: dict[tuple[str, str], str] = field(default_factory=dict)
    """Plugin of each entry, by (kind of entry, name)."""

    def method(self, name: str) -> Method:
        """Return the method called ``name``; ``a + b`` is the chain of both.

        Raises:
            UnknownNameError: no such method; with the nearest names.
            ChainError: the links cannot follow each other.
        """
        if "+" in name:
            from methodbench.composition import compose

            return compose(self, name)
        return _lookup("method", name, self.methods)

    def family(self, name: str) -> Family:
        """Return the family called ``name``; one that no plugin describes is described by its name."""
        return self.families.get(name) or Family(name=name, title=name, summary="")

    def model(self, name: str) -> Model:
        """Return a listed model, or one that a plugin can describe from a qualified name."""
        return (
            self.models.get(name) or self._named("model", name, Model) or _lookup("model", name, self.models)
        )

    def task(self, name: str) -> Task:
        """Return a listed task, or one that a plugin can describe from a qualified name."""
        return self.tasks.get(name) or self._named("task", name, Task) or _lookup("task", name, self.tasks)

    def suite(self, name: str) -> SuiteFile:
        """Return the shipped suite called ``name``."""
        return _lookup("suite", name, self.suites)

    def distribution(self, kind: str, name: str) -> str:
        """Return the distribution whose plugin registered the entry; empty when that is not known."""
        owner = self.owners.get((kind, name))
        return next((plugin.distribution for plugin in self.plugins if plugin.name == owner), "")

    def _named(self, kind: str, name: str, cls: type[E]) -> E | None:
        if ":" not in name:
            return None
        hook = getattr(self.manager.hook, f"methodbench_{kind}_named")
        for impl in reversed(hook.get_hookimpls()):
            try:
                entry = impl.function(name)
            except (Exception, SystemExit) as error:
                self.problems.append(PluginProblem(impl.plugin_name, f"{hook.name}({name!r}): {_say(error)}"))
                continue
            if isinstance(entry, cls):
                self.owners[kind, name] = impl.plugin_name
                return entry
        return None

    def mismatch(self, method: Method, model: Model | None, task: Task) -> str:
        """Return why this cell makes no sense, or an empty string when it does."""
        if method.kind not in task.kinds:
            return f"task {task.name} evaluates {' and '.join(task.kinds)} methods, {method.name} is a {method.kind}"
        if model is None:
            return f"task {task.name} needs a model" if task.accepts else ""
        if not task.accepts:
            return f"task {task.name} brings its own model"
        if model.kind not in task.accepts:
            return f"task {task.name} accepts {', '.join(task.accepts)}; {model.name} is a {model.kind}"
        if not method.applies_to and method.kind in _TRAINERS:
            return ""
        if "*" not in method.applies_to and model.kind not in method.applies_to:
            return f"{method.name} applies to {', '.join(method.applies_to)}; {model.name} is a {model.kind}"
        return ""


def load_catalog(
    *,
    without: Iterable[str] = (),
    points: Iterable[EntryPoint] | None = None,
    specs: ModuleType = hookspecs,
) -> Catalog:
    """Load every plugin and join what they offer.

    Args:
        without: names of plugins to leave out (also ``METHODBENCH_NO_PLUGIN``, separated by commas).
        points: entry points to load instead of the installed ones.
        specs: module of hook specifications.
    """
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(specs)
    catalog = Catalog(manager)
    skipped = {*without, *filter(None, os.environ.get("METHODBENCH_NO_PLUGIN", "").split(","))}
    found = entry_points(group=hookspecs.GROUP) if points is None else points
    for point in sorted(found, key=lambda point: (point.name != "builtin", point.name)):
        if point.name not in skipped:
            _register(catalog, point)
    manager.check_pending()
    _collect(catalog, "families", Family, catalog.families)
    _collect(catalog, "methods", Method, catalog.methods)
    _collect(catalog, "models", Model, catalog.models)
    _collect(catalog, "tasks", Task, catalog.tasks)
    _collect(catalog, "suites", SuiteFile, catalog.suites)
    _check_kinds(catalog)
    return catalog


def _register(catalog: Catalog, point: EntryPoint) -> None:
    start = time.process_time()
    try:
        with _guarded_import(point.name):
            module = point.load()
        seconds = time.process_time() - start
        _check_plugin(catalog, point, module, seconds)
    except (Exception, SystemExit) as error:
        catalog.problems.append(PluginProblem(point.name, _say(error)))
        return
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            catalog.manager.register(module, name=point.name)
            catalog.manager.check_pending()
    except (Exception, SystemExit) as error:
        if catalog.manager.get_plugin(point.name) is module:
            catalog.manager.unregister(name=point.name)
        catalog.problems.append(PluginProblem(point.name, _say(error)))
        return
    catalog.remarks += [PluginProblem(point.name, str(warning.message)) for warning in heard]
    distribution = point.dist
    catalog.plugins.append(
        PluginInfo(
            name=point.name,
            module=point.value,
            distribution=distribution.name if distribution else "",
            version=distribution.version if distribution else "",
            import_seconds=seconds,
        )
    )


class PluginError(Exception):
    """A plugin that loads, and cannot be used as it is."""

    def __str__(self) -> str:
        return str(self.args[0])


def import_budget() -> float:
    """Return the CPU seconds that the import of a plugin's module may take."""
    try:
        return float(os.environ["METHODBENCH_IMPORT_BUDGET"])
    except (KeyError, ValueError):
        return IMPORT_BUDGET


@contextlib.contextmanager
def _guarded_import(name: str) -> Iterator[None]:
    """Keep what a plugin prints off standard output, and break off an import that hangs.

    A signal does it, which only the main thread can have; elsewhere a hanging import hangs.
    """

    def stop(signum: int, frame: object) -> None:
        raise PluginError(f"its import was broken off after {IMPORT_LIMIT:g} seconds")

    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    # Somebody else's alarm goes first.
    timed = timed and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    with contextlib.redirect_stdout(sys.stderr):
        if not timed:
            yield
            return
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, IMPORT_LIMIT)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _check_plugin(catalog: Catalog, point: EntryPoint, module: Any, seconds: float) -> None:
    if catalog.manager.has_plugin(point.name):
        first = next(plugin for plugin in catalog.plugins if plugin.name == point.name)
        raise PluginError(f"the name is taken by {first.module} of {first.distribution or 'another plugin'}")
    if seconds > import_budget():
        raise PluginError(
            f"importing {point.value} took {seconds:.2f} CPU seconds, and the budget is {import_budget():.2f}: "
            "name implementations as strings, so that only workers import their libraries"
        )
    version = getattr(module, hookspecs.VERSION_ATTRIBUTE, hookspecs.HOOK_VERSION)
    oldest, newest = hookspecs.OLDEST_HOOK_VERSION, hookspecs.HOOK_VERSION
    if not isinstance(version, int) or isinstance(version, bool):
        raise PluginError(f"{hookspecs.VERSION_ATTRIBUTE} is {version!r}, not a whole number")
    if not oldest <= version <= newest:
        spoken = f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
        mend = "update the plugin" if version < oldest else "update methodbench"
        raise PluginError(f"it speaks hook version {version}, and this methodbench speaks {spoken}: {mend}")


def _collect(catalog: Catalog, what: str, cls: type[E], into: dict[str, E]) -> None:
    kind = "family" if what == "families" else what.removesuffix("s")
    # pluggy calls the plugin registered last first; the catalogue gives a name to the one registered first.
    for impl in getattr(catalog.manager.hook, f"methodbench_{what}").get_hookimpls():
        try:
            entries = list(itertools.islice(impl.function(), MOST_ENTRIES + 1))
            if len(entries) > MOST_ENTRIES:
                raise PluginError(f"it returns more than {MOST_ENTRIES:,} entries")
        except (Exception, SystemExit) as error:
            catalog.problems.append(PluginProblem(impl.plugin_name, f"methodbench_{what}: {_say(error)}"))
            continue
        for entry in entries:
            if not isinstance(entry, cls):
                message = f"methodbench_{what} returned {type(entry).__name__}, not {cls.__name__}"
                catalog.problems.append(PluginProblem(impl.plugin_name, message))
            elif entry.name in into:
                message = f"{kind} {entry.name!r} is already registered by {catalog.owners[kind, entry.name]}"
                catalog.problems.append(PluginProblem(impl.plugin_name, message))
            else:
                into[entry.name] = entry
                catalog.owners[kind, entry.name] = impl.plugin_name


def _check_kinds(catalog: Catalog) -> None:
    from methodbench.kinds import KIND_NAMES

    for name, method in list(catalog.methods.items()):
        if method.kind not in KIND_NAMES:
            message = f"method {name!r} is of unknown kind {method.kind!r} (known: {', '.join(KIND_NAMES)})"
            catalog.problems.append(PluginProblem(catalog.owners["method", name], message))
            del catalog.methods[name]


def _lookup(what: str, name: str, known: Mapping[str, E]) -> E:
    try:
        return known[name]
    except KeyError:
        raise UnknownNameError(what, name, known) from None


def _say(error: BaseException) -> str:
    if isinstance(error, PluginError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def load_implementation(path: str) -> Any:
    """Import ``"package.module:attribute"`` and return the attribute. Only workers and tests call this."""
    module_name, _, attribute = path.partition(":")
    module = __import__(module_name, fromlist=[attribute])
    return getattr(module, attribute)
