"""Runs as data for one page to show, where a page for each would be too many files.

A shard is a script that hands deflated JSON to the page, so that it also loads from ``file://``. Runs go to shards by
a hash of their id that the page can compute.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from methodbench_leaderboard.records import Records

SHARDS = 256


def shard_of(run_id: str) -> int:
    """Return the shard of a run: FNV-1a over the UTF-8 bytes of its id, modulo :data:`SHARDS`."""
    state = 0x811C9DC5
    for byte in run_id.encode("utf-8", "replace"):
        state = (state ^ byte) * 0x01000193 & 0xFFFFFFFF
    return state % SHARDS


def write(records: Records, boards: Mapping[str, str], folder: Path) -> None:
    """Write every run, with the path of its board, to ``folder``."""
    folder.mkdir(parents=True)
    members: dict[int, list[str]] = {}
    for run_id in records.frame["id"]:
        members.setdefault(shard_of(run_id), []).append(run_id)
    for shard, ids in sorted(members.items()):
        parts = [
            f'{json.dumps(run_id)}:{{"board":{json.dumps(boards.get(run_id, ""))},"run":{text}}}'
            for run_id, text in records.documents(ids)
        ]
        packed = base64.b64encode(zlib.compress(f"{{{','.join(parts)}}}".encode(), 6)).decode()
        (folder / f"{shard:02x}.js").write_text(f'methodbenchShard({shard},"{packed}");\n', encoding="ascii")
