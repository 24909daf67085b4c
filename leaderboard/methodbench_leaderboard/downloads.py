"""The records as files to take along: CSV, Parquet, JSON and the database itself."""

from __future__ import annotations

import gzip
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from methodbench import __version__
from methodbench.store import Store
from methodbench_leaderboard.formats import harmless
from methodbench_leaderboard.records import Records

#: Larger files are compressed.
MOST_PLAIN_BYTES = 10_000_000
#: With more per-unit scores than this, the Parquet file is written without them.
MOST_SCORES = 50_000_000


@dataclass(frozen=True, slots=True)
class Download:
    """A file that the site offers."""

    path: str
    title: str
    bytes: int


def write(
    store: Store, records: Records, documents: Iterable[tuple[str, str]], folder: Path
) -> list[Download]:
    """Write the files to ``folder`` and return them.

    Args:
        documents: (id, JSON text) of every run, oldest first; see :meth:`Records.documents`.
    """
    table = records.table()
    made = [
        _file(folder, "results.csv", "one row per run and metric", lambda path: _csv(table).write_csv(path)),
        _file(
            folder, "results.parquet", "the same, with the scores of every unit",
            lambda path: records.table(scores=int(table["units"].sum() or 0) <= MOST_SCORES).write_parquet(path),
        ),
        _file(
            folder, "results.json", "one document per run, with facts and settings",
            lambda path: _json(records.digest, documents, path),
        ),
    ]  # fmt: skip
    database = Path(store.engine.url.database or "") if store.engine.dialect.name == "sqlite" else None
    if database is not None and database.is_file():
        made.append(
            _file(folder, "results.db", "the SQLite database", lambda path: _copy_database(database, path))
        )
    return made


def _file(folder: Path, name: str, title: str, make: Callable[[Path], None]) -> Download:
    path = folder / name
    make(path)
    if name != "results.parquet" and path.stat().st_size > MOST_PLAIN_BYTES:
        packed = path.with_name(f"{name}.gz")
        # Neither name nor time go into the file: the same records give the same bytes.
        with (
            path.open("rb") as plain,
            packed.open("wb") as out,
            gzip.GzipFile("", "wb", 4, out, mtime=0) as target,
        ):
            shutil.copyfileobj(plain, target, 1 << 20)
        path.unlink()
        path = packed
    return Download(path.name, title, path.stat().st_size)


def _csv(table: pl.DataFrame) -> pl.DataFrame:
    """Return the table with text that no spreadsheet takes for a formula and no terminal for a command."""
    return table.with_columns(
        _harmless(pl.col(name)) for name, dtype in table.schema.items() if dtype == pl.String
    )


def _harmless(text: pl.Expr) -> pl.Expr:
    odd = text.str.contains(r"[^\x20-\x7e\t\n]")
    spelled = pl.when(odd).then(text.map_elements(harmless, return_dtype=pl.String)).otherwise(text)
    return pl.when(spelled.str.contains(r"^[=+\-@\t]")).then("'" + spelled).otherwise(spelled).name.keep()


def _json(digest: str, documents: Iterable[tuple[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as out:
        out.write(f'{{"methodbench":"{__version__}","database":"{digest}","runs":[')
        for number, (_, text) in enumerate(documents):
            out.write(f"{',' if number else ''}\n{text}")
        out.write("\n]}\n")


def _copy_database(source: Path, target: Path) -> None:
    """Write a compact copy without what only drivers that run now need."""
    with TemporaryDirectory(dir=target.parent, prefix=".copy-") as scratch:
        first = Path(scratch) / "copy.db"
        with sqlite3.connect(f"file:{source}?mode=ro", uri=True) as connection:
            connection.execute("VACUUM INTO ?", (str(first),))
        connection.close()
        copy = sqlite3.connect(first)
        for table in ("claim", "driver"):
            copy.execute(f"DELETE FROM {table}")
        copy.commit()
        copy.execute("PRAGMA journal_mode=DELETE")
        copy.execute("VACUUM INTO ?", (str(target),))
        copy.close()
