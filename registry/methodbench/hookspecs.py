"""The plugin contract.

A plugin is a module named by an entry point in the group ``methodbench``; it implements any of these hooks with
:data:`hookimpl`. The module must be light: it imports nothing heavier than ``methodbench`` itself, because every
command loads it. Implementations are named as strings and imported only where the work is done.

Hooks evolve by addition: a hook may gain arguments, which implementations need not name. An argument or a hook that
is to go is first marked with ``warn_on_impl_args`` or ``warn_on_impl``; ``methodbench doctor`` then names the plugins
that use it. What breaks plugins raises :data:`HOOK_VERSION`; a plugin says which version it was written for in
``METHODBENCH_HOOKS``, and one outside of :data:`OLDEST_HOOK_VERSION` to :data:`HOOK_VERSION` is left out with that
reason. Without the attribute a plugin is taken to speak the current version.

>>> from methodbench import hookimpl
>>> from methodbench.entries import Method
>>> METHODBENCH_HOOKS = 1
>>> @hookimpl
... def methodbench_methods():
...     return [Method(name="halve", kind="compressor", family="mine", impl="mine.halve:Halve", summary="...")]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from methodbench.entries import Family, Method, Model, SuiteFile, Task

if TYPE_CHECKING:
    from methodbench.engine.executors import Executor, ExecutorOptions

GROUP = "methodbench"
#: Version of this contract, and the oldest one that plugins may still be written for.
HOOK_VERSION = 1
OLDEST_HOOK_VERSION = 1
#: Where a plugin's module says which version it speaks.
VERSION_ATTRIBUTE = "METHODBENCH_HOOKS"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def methodbench_families() -> Iterable[Family]:
    """Return the boards that this plugin's methods appear on.

    Called once while the catalogue is built. Results of all plugins are joined; a name that is taken belongs to the
    plugin that came first, and the later one is reported by ``methodbench doctor``.
    """
    raise NotImplementedError


@hookspec
def methodbench_methods() -> Iterable[Method]:
    """Return the methods of this plugin. Called once; results are joined, names are unique."""
    raise NotImplementedError


@hookspec
def methodbench_models() -> Iterable[Model]:
    """Return the models of this plugin. Called once; results are joined, names are unique."""
    raise NotImplementedError


@hookspec
def methodbench_tasks() -> Iterable[Task]:
    """Return the tasks of this plugin. Called once; results are joined, names are unique."""
    raise NotImplementedError


@hookspec
def methodbench_suites() -> Iterable[SuiteFile]:
    """Return the comparisons that this plugin ships as files. Called once; results are joined, names are unique."""
    raise NotImplementedError


@hookspec(firstresult=True)
def methodbench_model_named(name: str) -> Model | None:
    """Describe a model that no plugin lists, from its name alone.

    Args:
        name: a qualified name such as ``"hub:org/name@revision"``.

    Returns:
        An entry whose ``name`` equals the argument, or None when this plugin does not know the scheme. The first
        plugin that answers wins.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def methodbench_task_named(name: str) -> Task | None:
    """Describe a task that no plugin lists, from its name alone, for example ``"suite-of-tasks:one-task"``.

    Returns:
        An entry whose ``name`` equals the argument, or None. The first plugin that answers wins.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def methodbench_executor(name: str, options: ExecutorOptions) -> Executor | None:
    """Return the executor called ``name``, or None. The first plugin that answers wins.

    Args:
        name: what ``--executor`` says.
        options: what every executor is told: cores, memory limit, address.
    """
    raise NotImplementedError
