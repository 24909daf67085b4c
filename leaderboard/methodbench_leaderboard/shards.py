"""Runs as data for one page to show, where a page for each would be too many files.

A shard is a script that hands deflated JSON to the page, so that it also loads from ``file://``. Runs go to shards by
a hash of their id that the page can compute.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SHARDS = 256


def shard_of(run_id: str) -> int:
    """Return the shard of a run: FNV-1a over the UTF-8 bytes of its id, modulo :data:`SHARDS`."""
    state = 0x811C9DC5
    for byte in run_id.encode("utf-8", "replace"):
        state = (state ^ byte) * 0x01000193 & 0xFFFFFFFF
    return state % SHARDS


class Collector:
    """Takes the documents of runs as they pass by, and writes them as shards afterwards."""

    def __init__(self, boards: Mapping[str, str]) -> None:
        """
        Args:
            boards: path of the board that a run is on, by the run's id.
        """
        self._boards = boards
        self._parts: dict[int, list[str]] = {}

    def through(self, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yield (id, JSON text) of runs unchanged, keeping a copy."""
        for run_id, text in documents:
            board = json.dumps(self._boards.get(run_id, ""))
            part = f'{json.dumps(run_id)}:{{"board":{board},"run":{text}}}'
            self._parts.setdefault(shard_of(run_id), []).append(part)
            yield run_id, text

    def write(self, folder: Path) -> None:
        """Write what has passed by to ``folder``, which does not exist yet."""
        folder.mkdir(parents=True)
        for shard, parts in sorted(self._parts.items()):
            packed = base64.b64encode(zlib.compress(f"{{{','.join(parts)}}}".encode(), 6)).decode()
            (folder / f"{shard:02x}.js").write_text(
                f'methodbenchShard({shard},"{packed}");\n', encoding="ascii"
            )
