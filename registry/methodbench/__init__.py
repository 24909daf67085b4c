"""methodbench: a registry and plugin framework for reproducible comparison of machine-learning methods.

The verbs of the command line are functions here::

    import methodbench

    methodbench.run("demo-quick-optim")    # a shipped suite, or a path of a suite file
    methodbench.results()                  # every record, as a Polars frame
    methodbench.compare("awq", "rtn")      # paired difference on the cells that both share
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from methodbench.hookspecs import hookimpl

if TYPE_CHECKING:
    from methodbench.api import build_site, catalog, compare, plan, results, run

__version__ = "0.1.0"
__all__ = ["__version__", "build_site", "catalog", "compare", "hookimpl", "plan", "results", "run"]

_LAZY = frozenset(__all__) - {"__version__", "hookimpl"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from methodbench import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
