"""Capsules: records as one file that anybody can check.

A capsule is a zip of JSON lines, one file per table, and of Parquet files with the per-unit scores and curves. Its
manifest names the sha256 of every member; the sha256 of the manifest is the capsule's digest and its name. The same
records give the same digest everywhere.

Reading treats the content as hostile. Only members that a capsule may have are looked at, sizes are limited before and
while they are read, nothing is unpacked to disk or executed, every value is checked against the schema, and every
digest is computed again: members, environments, cells and the seal of each record.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from sqlalchemy import Column, LargeBinary, Table
from sqlmodel import SQLModel

from methodbench.errors import CapsuleError
from methodbench.provenance import canonical_json, digest
from methodbench.store import records
from methodbench.store.records import CHILDREN, ENVIRONMENT, RUN, Record
from methodbench.store.schema import Environment, Run

if TYPE_CHECKING:
    import polars as pl

FORMAT = "methodbench-capsule"
VERSION = 1

#: Largest capsule, in bytes.
MAX_FILE_BYTES = 1 << 30
#: Most bytes that the members of a capsule may have unpacked.
MAX_UNPACKED_BYTES = 2 << 30
#: Largest ratio of unpacked to packed bytes of a member of more than 16 MiB.
MAX_RATIO = 200
#: Longest line of a member, in bytes.
MAX_LINE_BYTES = 16 << 20
#: Most values of one score array.
MAX_VALUES = 50_000_000
#: Deepest nesting of a JSON value.
MAX_DEPTH = 64
#: Columns of a run that its identity may repeat.
_IN_IDENTITY = (
    "method", "method_digest", "model", "weights_digest", "task", "task_params", "protocol", "data_digest", "seed",
    "dtype", "threads",
)  # fmt: skip

_MANIFEST = "manifest.json"
_NAME = re.compile(r"capsule-([0-9a-f]{64})\.zip")
_TEXT_LIMIT = 1_000_000


@dataclass(slots=True)
class Content:
    """What a capsule holds."""

    records: list[Record] = field(default_factory=list)
    environments: list[dict[str, Any]] = field(default_factory=list)


# Writing


def write_capsule(content: Content, folder: Path) -> Path:
    """Write a capsule into ``folder`` and return its path; the name is its digest.

    Raises:
        CapsuleError: the folder cannot be written.
    """
    members = dict(_members(content))
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in members.items()
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "members": listed,
        "records": len(content.records),
        "wheels": sorted({record.run["wheel"] for record in content.records if record.run["wheel"]}),
    }
    written = canonical_json(manifest).encode()
    path = folder / f"capsule-{hashlib.sha256(written).hexdigest()}.zip"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w") as archive:
            for name, data in sorted({**members, _MANIFEST: written}.items()):
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.external_attr = 0o644 << 16
                entry.create_system = 3
                packed = name.endswith(".parquet")
                entry.compress_type = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
                archive.writestr(entry, data, compresslevel=6)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CapsuleError(
            f"cannot write {path}: {error.strerror}", "Give another folder with --out."
        ) from error
    return path


def _members(content: Content) -> Iterator[tuple[str, bytes]]:
    ordered = sorted(content.records, key=lambda record: record.run["id"])
    environments = sorted(content.environments, key=lambda row: row["digest"])
    yield "environment.jsonl", _lines(ENVIRONMENT, environments)
    yield "run.jsonl", _lines(RUN, [record.run for record in ordered])
    for table in CHILDREN:
        rows = [row for record in ordered for row in record.children.get(table.name, [])]
        if not rows:
            continue
        yield f"{table.name}.jsonl", _lines(table, rows)
        for column in _arrays(table):
            yield f"{table.name}.{column.name}.parquet", _parquet(table, column, rows)


def _lines(table: Table, rows: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(canonical_json(row).encode() + b"\n" for row in table_rows(table, rows))


def table_rows(
    table: Table, rows: Iterable[Mapping[str, Any]], *, arrays: bool = False
) -> list[dict[str, Any]]:
    """Return rows as JSON has them; array columns, as hexadecimal digits, only when asked for."""
    plain = [column.name for column in table.c if not isinstance(column.type, LargeBinary)]
    binary = [column.name for column in _arrays(table)] if arrays else []
    return [
        {
            **{name: records.portable(row[name]) for name in plain},
            **{name: row[name].hex() for name in binary},
        }
        for row in rows
    ]


def _arrays(table: Table) -> list[Column]:
    return [column for column in table.c if isinstance(column.type, LargeBinary)]


def _keys(table: Table) -> list[str]:
    return [column.name for column in table.primary_key.columns]


def _parquet(table: Table, column: Column, rows: list[dict[str, Any]]) -> bytes:
    """Write the values of an array column, one row a value: primary key, position, value."""
    import polars as pl

    arrays = [np.frombuffer(row[column.name], dtype="<f8") for row in rows]
    counts = np.array([len(array) for array in arrays], dtype=np.int64)
    which = np.repeat(np.arange(len(rows)), counts)
    index = np.concatenate([np.arange(0, dtype=np.int32), *(np.arange(n, dtype=np.int32) for n in counts)])
    frame = pl.DataFrame(
        {
            **{
                key: pl.Series([row[key] for row in rows], dtype=pl.String).gather(which)
                for key in _keys(table)
            },
            "index": pl.Series(index, dtype=pl.Int32),
            column.name: pl.Series(np.concatenate(arrays) if arrays else [], dtype=pl.Float64),
        }
    )
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd", compression_level=3, statistics=False)
    return buffer.getvalue()


# Reading


def read_capsule(path: Path) -> Content:
    """Read and check a capsule.

    Raises:
        CapsuleError: it is none, it was altered, or it holds what a capsule may not hold.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CapsuleError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB")
        with zipfile.ZipFile(path) as archive:
            members = _unpack(archive, path)
    except FileNotFoundError:
        raise CapsuleError(f"{path} does not exist") from None
    except OSError as error:
        raise CapsuleError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise CapsuleError(f"{path} is no capsule, or a damaged one: {error}") from error
    manifest = _manifest(members, path)
    for name, entry in manifest.members.items():
        if len(members[name]) != entry.bytes or hashlib.sha256(members[name]).hexdigest() != entry.sha256:
            raise CapsuleError(f"{path}: {name} was altered: its digest is not the one in the manifest")
    try:
        content = _parse(members)
    except Refused as error:
        raise CapsuleError(f"{path}: {error}") from error
    if len(content.records) != manifest.records:
        raise CapsuleError(
            f"{path}: {len(content.records)} records where the manifest says {manifest.records}"
        )
    return content


class Refused(Exception):
    """Content that records may not hold; callers say where it came from."""


class _Member(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    sha256: str = pydantic.Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = pydantic.Field(ge=0)


class _Manifest(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    format: Literal["methodbench-capsule"]
    version: int
    members: dict[str, _Member]
    records: int = pydantic.Field(ge=0)
    wheels: list[str]


def _allowed() -> set[str]:
    names = {_MANIFEST, "environment.jsonl", "run.jsonl"}
    for table in CHILDREN:
        names.add(f"{table.name}.jsonl")
        names |= {f"{table.name}.{column.name}.parquet" for column in _arrays(table)}
    return names


def _unpack(archive: zipfile.ZipFile, path: Path) -> dict[str, bytes]:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    # The central directory names it; a path, a link or a program is none of these names.
    for name in names:
        if name not in _allowed():
            raise CapsuleError(f"{path}: holds {name[:100]!r}, which no capsule has")
    if len(set(names)) != len(names):
        raise CapsuleError(f"{path}: holds a member twice")
    if sum(entry.file_size for entry in entries) > MAX_UNPACKED_BYTES:
        raise CapsuleError(f"{path}: unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB")
    found = {}
    for entry in entries:
        if entry.flag_bits & 0x1:
            raise CapsuleError(f"{path}: {entry.filename} is encrypted")
        if entry.file_size > max(16 << 20, MAX_RATIO * entry.compress_size):
            raise CapsuleError(f"{path}: {entry.filename} unpacks to more than {MAX_RATIO} times its size")
        with archive.open(entry) as member:
            # What the directory says may be a lie: no more than that is ever read.
            data = member.read(entry.file_size + 1)
        if len(data) != entry.file_size:
            raise CapsuleError(f"{path}: {entry.filename} is not as long as the archive says")
        found[entry.filename] = data
    return found


def _manifest(members: dict[str, bytes], path: Path) -> _Manifest:
    data = members.pop(_MANIFEST, None)
    if data is None:
        raise CapsuleError(f"{path} is no capsule: it has no manifest")
    try:
        manifest = _Manifest.model_validate(parse_json(data))
    except (pydantic.ValidationError, Refused) as error:
        raise CapsuleError(f"{path}: the manifest is wrong: {_first(error)}") from error
    if manifest.version > VERSION:
        raise CapsuleError(
            f"{path}: a capsule of version {manifest.version}; this methodbench reads up to {VERSION}",
            "Upgrade methodbench.",
        )
    named = _NAME.fullmatch(path.name)
    if named and named[1] != hashlib.sha256(data).hexdigest():
        raise CapsuleError(f"{path}: was altered: its name is not the digest of its manifest")
    if manifest.members.keys() != members.keys():
        raise CapsuleError(f"{path}: its members are not those of the manifest")
    return manifest


def _first(error: Exception) -> str:
    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:60] for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])


def parse_json(line: bytes) -> Any:
    """Parse JSON of strangers. Raises Refused for what is none, for NaN and for what is nested too deep."""
    try:
        value = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON ({error})") from error
    if _deeper(value, MAX_DEPTH):
        raise Refused(f"JSON nested deeper than {MAX_DEPTH}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _deeper(value: Any, limit: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return limit == 0 or any(
        _deeper(item, limit - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def _parse(members: Mapping[str, bytes]) -> Content:
    tables = {table.name: _rows(table, _values(table, members)) for table in (ENVIRONMENT, RUN, *CHILDREN)}
    for table in CHILDREN:
        for column in _arrays(table):
            data = members.get(f"{table.name}.{column.name}.parquet")
            _fill(table, column, tables[table.name], data)
    return _joined(tables)


def content_of_rows(tables: Any) -> Content:
    """Check rows that came as JSON, with their arrays as hexadecimal digits, as :func:`table_rows` writes them.

    Raises:
        Refused: they are not what the schema or their digests say.
    """
    known = {table.name: table for table in (ENVIRONMENT, RUN, *CHILDREN)}
    if not isinstance(tables, dict) or not tables.keys() <= known.keys():
        raise Refused("other tables than a record has")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in known}
    for name, rows in tables.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Refused(f"{name} is no list of rows")
        columns = [column.name for column in _arrays(known[name])]
        values = [{key: value for key, value in row.items() if key not in columns} for row in rows]
        found[name] = _rows(known[name], values)
        for row, raw in zip(found[name], rows, strict=True):
            for column in columns:
                if not isinstance(raw.get(column), str) or len(raw[column]) > 16 * MAX_VALUES:
                    raise Refused(f"{name}.{column} holds no values")
                try:
                    row[column] = bytes.fromhex(raw[column])
                except ValueError as error:
                    raise Refused(f"{name}.{column} holds no values") from error
    return _joined(found)


def _joined(tables: Mapping[str, list[dict[str, Any]]]) -> Content:
    environments = tables[ENVIRONMENT.name]
    for row in environments:
        if digest(row["data"]) != row["digest"]:
            raise Refused(f"environment {row['digest'][:12]} has another digest")
    found = {row["id"]: Record(row) for row in tables[RUN.name]}
    for table in CHILDREN:
        for row in tables[table.name]:
            record = found.get(row["run_id"])
            if record is None:
                raise Refused(f"{table.name} of a run that is not there: {row['run_id']}")
            record.children.setdefault(table.name, []).append(row)
    digests = {row["digest"] for row in environments}
    for record in found.values():
        check_record(record, digests, found.keys())
    return Content(list(found.values()), environments)


def check_record(record: Record, environments: Iterable[str], runs: Iterable[str]) -> None:
    """Compute the digests of a record again.

    Args:
        environments: digests that its environment may have.
        runs: identifiers that it may point to.

    Raises:
        Refused: one of them is another, or it points to nothing.
    """
    run = record.run
    name = f"run {run['id']}"
    if run["environment_digest"] not in environments:
        raise Refused(f"{name}: its environment is missing")
    if digest(run["identity"]) != run["cell_key"]:
        raise Refused(f"{name}: the key of its cell is not the digest of its identity")
    for key in _IN_IDENTITY:
        if key in run["identity"] and run["identity"][key] != run[key]:
            raise Refused(f"{name}: {key} is not what its identity says")
    targets = {run["witness_of"]} - {None}
    for table in CHILDREN:
        rows = record.children.get(table.name, [])
        targets |= {row[link] for row in rows for link in records.links(table)}
    if not targets <= set(runs):
        raise Refused(f"{name}: points to a run that is not there")
    for row in record.children.get("metric", []):
        if row["units"] * 8 != len(row["scores"]):
            raise Refused(f"{name}: metric {row['name']} has not as many scores as it says")
    if records.seal(record) != run["seal"]:
        raise Refused(f"{name}: was altered: its seal is broken")


def _values(table: Table, members: Mapping[str, bytes]) -> list[Any]:
    values = []
    for number, line in enumerate(members.get(f"{table.name}.jsonl", b"").split(b"\n"), 1):
        if len(line) > MAX_LINE_BYTES:
            raise Refused(f"{table.name} {number}: longer than {MAX_LINE_BYTES >> 20} MiB")
        if line:
            values.append(parse_json(line))
    return values


def _rows(table: Table, values: Iterable[Any]) -> list[dict[str, Any]]:
    """Check values by the schema of their table."""
    validator = _validator(table.name)
    rows = []
    keys = set()
    for number, value in enumerate(values, 1):
        where = f"{table.name} {number}"
        try:
            checked = validator.model_validate(value)
        except pydantic.ValidationError as error:
            raise Refused(f"{where}: {_first(error)}") from error
        row = {name: getattr(checked, name) for name in type(checked).model_fields}
        key = tuple(row[name] for name in _keys(table))
        if key in keys:
            raise Refused(f"{where}: comes twice")
        keys.add(key)
        rows.append(row)
    return rows


def _plain_text(text: str) -> str:
    if "\0" in text or (not text.isascii() and text.encode("utf-8", "replace").decode() != text):
        raise ValueError("holds a character that text may not have")
    return text


_Text = Annotated[str, pydantic.Field(max_length=_TEXT_LIMIT), pydantic.AfterValidator(_plain_text)]
_Id = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{12}$")]
_Sha256 = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
_Integer = Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)]
_Time = Annotated[pydantic.AwareDatetime, pydantic.AfterValidator(lambda value: value.astimezone(UTC))]
#: Types that are narrower than what the tables say.
_NARROW: Mapping[str, Any] = {
    "run.id": _Id,
    "run.cell_key": _Sha256,
    "run.seal": _Sha256,
    "run.environment_digest": _Sha256,
    "run.status": Literal["ok", "failed", "timeout", "oom", "not-applicable"],
    "environment.digest": _Sha256,
    "metric.direction": Literal["lower", "higher"],
    "metric.units": Annotated[int, pydantic.Field(ge=0, le=MAX_VALUES)],
}
_WIDE = {str: _Text, int: _Integer, datetime: _Time}


@functools.cache
def _validator(name: str) -> type[pydantic.BaseModel]:
    """Return a model that checks one line of a table's member."""
    models = {str(model.__tablename__): model for model in _models()}
    table: Table = models[name].__table__  # type: ignore[attr-defined]
    fields: dict[str, Any] = {}
    for column in table.c:
        if isinstance(column.type, LargeBinary):
            continue
        annotation = models[name].model_fields[column.name].annotation
        kind = _NARROW.get(f"{name}.{column.name}")
        if kind is None:
            kind = _WIDE.get(annotation, annotation)  # type: ignore[arg-type]
            if annotation == str | None:
                kind = _Text | None
            elif annotation == int | None:
                kind = _Integer | None
        fields[column.name] = (kind, ...)
    config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())
    return pydantic.create_model(f"Line_{name}", __config__=config, **fields)


def _models() -> list[type[SQLModel]]:
    children = {table.name for table in CHILDREN}
    mapped = (mapper.class_ for mapper in SQLModel._sa_registry.mappers)
    return [model for model in mapped if model in (Run, Environment) or model.__tablename__ in children]


def _fill(table: Table, column: Column, rows: list[dict[str, Any]], data: bytes | None) -> None:
    """Put the arrays of a Parquet member into the rows that they belong to."""
    keys = _keys(table)
    where = f"{table.name}.{column.name}.parquet"
    if data is None:
        if rows:
            raise Refused(f"{where} is missing")
        return
    frame = _frame(data, {**dict.fromkeys(keys, "String"), "index": "Int32", column.name: "Float64"}, where)
    by_key = {tuple(row[key] for key in keys): row for row in rows}
    for row in rows:
        row[column.name] = b""
    for key, group in frame.group_by(keys, maintain_order=True):
        if tuple(key) not in by_key:
            raise Refused(f"{where}: values of a row that is not there")
        index = group["index"].to_numpy()
        if not np.array_equal(index, np.arange(len(index))):
            raise Refused(f"{where}: values are missing or out of order")
        by_key[tuple(key)][column.name] = group[column.name].to_numpy().astype("<f8").tobytes()


def _frame(data: bytes, schema: Mapping[str, str], where: str) -> pl.DataFrame:
    import polars as pl

    wanted = {name: getattr(pl, kind) for name, kind in schema.items()}
    try:
        found = pl.read_parquet_schema(io.BytesIO(data))
        if dict(found) != wanted:
            raise Refused(f"{where}: other columns than a capsule has")
        rows = pl.scan_parquet(io.BytesIO(data)).select(pl.len()).collect().item()
        if rows > MAX_VALUES:
            raise Refused(f"{where}: more than {MAX_VALUES:,} values")
        frame = pl.read_parquet(io.BytesIO(data), use_statistics=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        raise Refused(f"{where}: not the Parquet of a capsule ({str(error)[:100]})") from error
    if frame.null_count().sum_horizontal().item():
        raise Refused(f"{where}: a value is missing")
    return frame
