"""Prepared models in the cache: folders that a loader wrote once, with a list of their files and sizes.

The list tells a folder that was cut short (a full disk, a lost file) from a whole one, at no cost worth naming; such a
folder is prepared again.
"""

from __future__ import annotations

import json
from pathlib import Path

from methodbench import sources

_LIST = ".files.json"


def prepared_folder(weights_digest: str) -> Path:
    """Return where a model lies once its loader has prepared it."""
    return sources.cache_dir() / "models" / weights_digest


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _LIST
    }


def list_files(folder: Path) -> None:
    """Write the list of a folder that is complete."""
    (folder / _LIST).write_text(json.dumps(_sizes(folder)))


def is_prepared(folder: Path) -> bool:
    """Return whether the folder is there with every file that its list names, whole.

    A folder without a list was written by hand; it is taken as it is.
    """
    if not folder.is_dir():
        return False
    try:
        wanted = json.loads((folder / _LIST).read_text())
        found = _sizes(folder)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return isinstance(wanted, dict) and all(found.get(name) == size for name, size in wanted.items())
