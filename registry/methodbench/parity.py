"""Parity records: what a method was compared with, and how closely.

``pytest --record-parity`` writes one JSON file per vector file into the package of the plugin whose methods name
it (``<package>/parity/<family>/<name>.json``), from the file's ``meta`` and from what the tests that passed have
read. The records ship with the plugin, so that a method's page tells them without the vectors.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.entries import Method


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRecord:
    """One comparison with the numbers of somebody else's code."""

    vectors: str
    """``family/name`` of the vector file."""
    sha256: str
    """Digest of that file."""
    source: str
    """Whose code made the numbers: repository and commit."""
    functions: str
    """What of it was run."""
    quantities: tuple[str, ...]
    """Arrays that the tests read, inputs included; ``#`` stands for a number."""
    tolerance: str
    dtype: str
    test: str
    """Path of the tests in the source tree."""
    passed: int
    """How many tests passed when the record was written; none failed."""

    def summary(self) -> str:
        """Return the record in one line."""
        shown = ", ".join(self.quantities[:6]) + (", ..." if len(self.quantities) > 6 else "")
        return f"{self.passed} tests against {self.source}; tolerance {self.tolerance or 'in the tests'}; {shown}"


def package_folder(catalog: Catalog, method: Method) -> Path | None:
    """Return the folder of the package whose plugin registered ``method``; None when it is not on disk."""
    owner = catalog.owners.get(("method", method.name))
    module = next((plugin.module for plugin in catalog.plugins if plugin.name == owner), "")
    try:
        spec = importlib.util.find_spec(module.partition(".")[0]) if module else None
    except (ImportError, ValueError):
        return None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]) if folders else None


def records_of(method: Method, catalog: Catalog) -> list[ParityRecord]:
    """Return the parity records that ship with the method's plugin, one for each of its vector files that has one."""
    folder = package_folder(catalog, method)
    found = []
    for key in method.vectors if folder else ():
        assert folder is not None
        try:
            data = json.loads((folder / "parity" / f"{key}.json").read_text())
            found.append(ParityRecord(**{**data, "quantities": tuple(data["quantities"])}))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return found


def describe(
    key: str, sha256: str, meta: Mapping[str, Any], read: Sequence[str], test: str, passed: int
) -> dict[str, Any]:
    """Return the JSON form of a record, from a vector file's ``meta`` and the names of the arrays that were read."""
    source = _text(meta.get("source", ""))
    commit = _text(meta.get("commit", ""))
    functions = next((meta[name] for name in ("function", "functions", "calls") if name in meta), "")
    return {
        "vectors": key,
        "sha256": sha256,
        "source": f"{source} {commit[:9]}".strip() if commit and commit[:7] not in source else source,
        "functions": _text(functions),
        "quantities": sorted({re.sub(r"\d+", "#", name) for name in read}),
        "tolerance": _text(meta.get("tolerance", "")),
        "dtype": _text(meta.get("dtype", "")),
        "test": test,
        "passed": passed,
    }


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)
