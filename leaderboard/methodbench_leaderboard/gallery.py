"""Pictures that runs kept, as files of the site, and side by side for all methods that were shown the same ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from methodbench_leaderboard.records import Brief, Records

#: Galleries on the page of a method, and rows of each.
MOST_GALLERIES, MOST_ROWS = 4, 40
#: Folder of the files.
FOLDER = "pictures"


@dataclass(frozen=True, slots=True)
class File:
    """A picture of the site."""

    path: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Kept:
    """One picture of a run."""

    name: str
    picture: File
    overlay: File


@dataclass(frozen=True, slots=True)
class Maps:
    """What one configuration made of every picture of a gallery."""

    run: Brief
    overlays: tuple[File, ...]
    own: bool
    """Whether it is of the method whose page this is."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """The same pictures, all methods that were shown them."""

    task: str
    model: str
    pictures: tuple[tuple[str, File], ...]
    rows: tuple[Maps, ...]
    more: int
    """Rows beyond :data:`MOST_ROWS`."""


class Gallery:
    """Writes files as pages ask for them; the same bytes are one file."""

    def __init__(self, records: Records, folder: Path) -> None:
        self._records = records
        self._folder = folder
        self._files: dict[str, File] = {}
        self._groups: dict[tuple[str, ...], dict[tuple[str, str], Brief]] | None = None

    def of_run(self, run_id: str) -> list[Kept]:
        """Return the pictures of a run."""
        return [
            Kept(name, self._file(picture), self._file(overlay))
            for name, picture, overlay in self._records.pictures.get(run_id, ())
        ]

    def of_method(self, method: str) -> list[Sheet]:
        """Return what the method was shown, with everything that others made of the same pictures."""
        sheets = []
        for key, rows in self._grouped().items():
            if not any(name == method for name, _ in rows):
                continue
            ordered = sorted(rows.values(), key=lambda run: (run.method != method, run.method, run.variant))
            kept = {run.id: self.of_run(run.id) for run in ordered[:MOST_ROWS]}
            first = kept[ordered[0].id]
            sheets.append(
                Sheet(
                    task=key[0],
                    model=key[1],
                    pictures=tuple((one.name, one.picture) for one in first),
                    rows=tuple(
                        Maps(run, tuple(one.overlay for one in kept[run.id]), run.method == method)
                        for run in ordered[:MOST_ROWS]
                    ),
                    more=max(0, len(ordered) - MOST_ROWS),
                )
            )
        return sheets[:MOST_GALLERIES]

    def _grouped(self) -> dict[tuple[str, ...], dict[tuple[str, str], Brief]]:
        """Return the newest run of each configuration, by task, model and the pictures themselves."""
        if self._groups is None:
            groups: dict[tuple[str, ...], dict[tuple[str, str], Brief]] = {}
            for run in self._records.runs if self._records.pictures else ():
                kept = self._records.pictures.get(run.id)
                if kept:
                    shown = (digest for name, picture, _ in kept for digest in (name, _digest(picture)))
                    groups.setdefault((run.task, run.model, *shown), {})[run.method, run.variant] = run
            self._groups = dict(sorted(groups.items(), key=lambda item: item[0]))
        return self._groups

    def _file(self, data: bytes) -> File:
        digest = _digest(data)
        if digest not in self._files:
            path = f"{FOLDER}/{digest}.png"
            (self._folder / FOLDER).mkdir(exist_ok=True)
            (self._folder / path).write_bytes(data)
            width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
            self._files[digest] = File(path, width, height)
        return self._files[digest]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]
