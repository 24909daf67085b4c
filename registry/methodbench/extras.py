"""Optional dependencies: which of a distribution's extra are not installed."""

from __future__ import annotations

import functools
import importlib.metadata
import re


@functools.cache
def missing_requirements(distribution: str, extra: str) -> tuple[str, ...]:
    """Return the requirements of ``distribution[extra]`` that are not installed, by name.

    Empty when there is no such distribution or extra, or when ``extra`` is empty.
    """
    try:
        requirements = importlib.metadata.requires(distribution) or [] if extra else []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ()
    missing = []
    for requirement in requirements:
        spec, _, marker = requirement.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", spec.strip())
        if name and re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker):
            try:
                importlib.metadata.version(name[0])
            except importlib.metadata.PackageNotFoundError:
                missing.append(name[0])
    return tuple(missing)
