"""Capsules: the same records make the same file, what comes back is what went out, and nothing in it is believed."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methodbench.errors import CapsuleError, StoreError
from methodbench.provenance import canonical_json, digest
from methodbench.store import (
    Environment,
    Fingerprint,
    MetricValue,
    Run,
    Series,
    Store,
    Witness,
    capsule,
    every_eval_ever,
    open_store,
)
from methodbench.store.capsule import read_capsule, write_capsule
from methodbench.store.merging import content_of, content_of_database, merge

START = datetime(2026, 1, 1, tzinfo=UTC)
SOFTWARE = {"python": "3.11", "packages": {"numpy": "2"}}
ENVIRONMENT = Environment(digest=digest(SOFTWARE), captured_at=START, data=SOFTWARE)


def add(store: Store, number: int, scores: Any = (1.0, 2.0), *, cell: int | None = None, **more: Any) -> Run:
    """Record a run with everything that can belong to one."""
    identity = {"method": "m", "cell": number if cell is None else cell, "seed": 0}
    fields: dict[str, Any] = {
        "id": f"{number:012x}", "cell_key": digest(identity), "identity": identity, "status": "ok", "method": "m",
        "kind": "probe", "family": "f", "params_passed": {"x": 1}, "params": {"x": 1.5}, "task": "t", "model": "net",
        "task_params": {}, "protocol": 1, "environment_digest": ENVIRONMENT.digest, "log_tail": "läuft\n",
        "started_at": START + timedelta(seconds=number, microseconds=7), "facts": {"odd": float("inf")},
        "wheel": "m 1 sha256:0", **more,
    }  # fmt: skip
    run = Run(**fields)
    values = np.asarray(scores, dtype="<f8")
    mean = float(values.mean())
    metric = MetricValue(run_id=run.id, name="loss", value=mean, units=len(values), scores=values.tobytes())
    empty = MetricValue(run_id=run.id, name="none", value=None, units=0, scores=b"")
    curve = Series(run_id=run.id, name="steps", values=np.array([np.nan, np.inf, 0.1]).tobytes())
    marks = [{"name": "block 0", "hash": "ab", "mean": 0.5}]
    return store.add(run, [metric, empty], [curve], ENVIRONMENT, Fingerprint(run_id=run.id, marks=marks))


def seals(store: Store) -> list[str]:
    return sorted(run.seal for run in store.runs(witnesses=True))


@pytest.fixture
def other(tmp_path: Path) -> Any:
    with open_store(str(tmp_path / "other.db")) as opened:
        yield opened


def test_the_same_records_make_the_same_capsule(store: Store, other: Store, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        add(store, number)
    for number in (3, 1, 2):
        add(other, number)
    one = write_capsule(content_of(store), tmp_path / "one")
    two = write_capsule(content_of(other), tmp_path / "two")
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    add(other, 4)
    assert write_capsule(content_of(other), tmp_path / "two").name != one.name


def test_what_comes_back_is_what_went_out(store: Store, other: Store, tmp_path: Path) -> None:
    add(store, 1, scores=[1.0, np.inf, np.nan, -0.0])
    add(store, 2, status="failed", reason="why")
    path = write_capsule(content_of(store), tmp_path)
    merged = merge(other, read_capsule(path))
    assert sorted(merged.new) == ["000000000001", "000000000002"]
    assert [run.model_dump() for run in other.runs()] == [run.model_dump() for run in store.runs()]
    assert [row.model_dump() for row in other.metrics()] == [row.model_dump() for row in store.metrics()]
    assert [row.model_dump() for row in other.series()] == [row.model_dump() for row in store.series()]
    assert other.fingerprint("000000000001") == store.fingerprint("000000000001") != []
    assert other.environments()[ENVIRONMENT.digest].model_dump() == ENVIRONMENT.model_dump()
    assert write_capsule(content_of(other), tmp_path / "again").name == path.name


def test_the_scores_in_a_capsule_are_plain_parquet(store: Store, tmp_path: Path) -> None:
    pl = pytest.importorskip("polars")
    add(store, 1, scores=[3.0, 4.5])
    with zipfile.ZipFile(write_capsule(content_of(store), tmp_path)) as archive:
        frame = pl.read_parquet(archive.read("metric.scores.parquet"))
        runs = [json.loads(line) for line in archive.read("run.jsonl").splitlines()]
        manifest = json.loads(archive.read("manifest.json"))
    assert frame.rows() == [("000000000001", "loss", 0, 3.0), ("000000000001", "loss", 1, 4.5)]
    assert runs[0]["log_tail"] == "läuft\n"
    assert manifest["wheels"] == ["m 1 sha256:0"]


def test_importing_twice_changes_nothing(store: Store, other: Store, tmp_path: Path) -> None:
    for number in (1, 2):
        add(store, number)
    content = read_capsule(write_capsule(content_of(store), tmp_path))
    merge(other, content)
    again = merge(other, content)
    assert (again.new, again.known, again.agreeing) == ([], 2, [])
    assert len(other.runs(witnesses=True)) == 2


def test_a_result_that_disagrees_is_kept_as_a_witness(store: Store, other: Store) -> None:
    add(store, 1, scores=[1.0, 2.0, 3.0], cell=7)
    add(other, 2, scores=[1.0, 2.5, 3.5], cell=7)
    add(other, 3, scores=[1.0, 2.0, 3.0], cell=7)
    content = content_of(other)
    merged = merge(store, content)
    assert (merged.disagreeing, merged.agreeing) == (["000000000002"], ["000000000003"])
    assert [run.id for run in store.runs()] == ["000000000001"], "the result that was here stays"
    found = {row.run_id: row for row in store.witnesses("000000000001")}
    assert found["000000000003"].verdict == "bit-identical"
    drifted = found["000000000002"]
    assert drifted.verdict == "drifted"
    assert drifted.differences == [{"metric": "loss", "first": 2.0, "second": 7 / 3, "units": 2, "of": 3}]
    assert merge(store, content).known == 2


def test_a_success_from_elsewhere_replaces_a_failure_here(store: Store, other: Store) -> None:
    add(store, 1, cell=7, status="failed")
    add(other, 2, cell=7)
    assert merge(store, content_of(other)).new == ["000000000002"]
    key = store.run("000000000002").cell_key
    assert store.latest([key])[key].id == "000000000002"


def test_two_runs_with_one_identifier_are_both_kept(store: Store, other: Store) -> None:
    add(store, 1, scores=[1.0])
    add(other, 1, scores=[2.0], cell=8)
    content = content_of(other)
    (renamed,) = merge(store, content).new
    assert renamed == content.records[0].run["seal"][:12]
    assert sorted(row.value for row in store.metrics() if row.name == "loss") == [1.0, 2.0]
    assert merge(store, content).known == 1


def test_witnesses_travel_with_what_they_repeat(store: Store, other: Store, tmp_path: Path) -> None:
    add(store, 1, cell=7)
    replay = Run(**{**add(other, 2, cell=7).model_dump(), "witness_of": "000000000001"})
    witness = Witness(
        run_id=replay.id,
        original="000000000001",
        verdict="drifted",
        tolerance=0.0,
        differences=[],
        suspects=[],
    )
    store.add(replay, environment=ENVIRONMENT, witness=witness)
    path = write_capsule(content_of(store), tmp_path)
    with open_store(str(tmp_path / "third.db")) as third:
        merge(third, read_capsule(path))
        assert [run.id for run in third.runs()] == ["000000000001"]
        assert [row.verdict for row in third.witnesses("000000000001")] == ["drifted"]
        assert write_capsule(content_of(third), tmp_path / "again").name == path.name


def test_merge_is_the_same_in_any_order(tmp_path: Path) -> None:
    for name, numbers in (("a", (1, 2)), ("b", (2, 3)), ("c", (4,))):
        with open_store(str(tmp_path / f"{name}.db")) as part:
            for number in numbers:
                add(part, number)
    ends = []
    for order in ("abc", "cba"):
        with open_store(str(tmp_path / f"{order}.db")) as target:
            for name in order:
                merge(target, content_of_database(str(tmp_path / f"{name}.db")))
            ends.append(write_capsule(content_of(target), tmp_path / order).name)
    assert ends[0] == ends[1]


# What strangers send


def rebuilt(path: Path, change: Callable[[dict[str, bytes]], None], *, honest: bool = True) -> Path:
    """Write a capsule again with changed members, its digests computed anew when ``honest``."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    change(members)
    if honest:
        manifest["members"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in members.items()
        }
    made = path.with_name("hostile.zip")
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", canonical_json(manifest))
        for name, data in members.items():
            archive.writestr(name, data)
    return made


def edit(name: str, **fields: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        rows = [json.loads(line) for line in members[f"{name}.jsonl"].splitlines()]
        rows[0].update(fields)
        members[f"{name}.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    return change


def put(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.__setitem__(name, data)


def scores_of(frame: Any) -> Callable[[dict[str, bytes]], None]:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return put("metric.scores.parquet", buffer.getvalue())


@pytest.fixture
def sent(store: Store, tmp_path: Path) -> Path:
    add(store, 1)
    add(store, 2)
    return write_capsule(content_of(store), tmp_path / "sent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("run", method="other"), "method is not what its identity says"),
        (edit("run", cell_key="0" * 64), "the key of its cell is not the digest of its identity"),
        (edit("run", reason="better"), "its seal is broken"),
        (edit("run", seal="0" * 64), "its seal is broken"),
        (edit("run", id="../../etc/passwd"), "run 1: id: String should match pattern"),
        (edit("run", status="great"), "status: Input should be"),
        (edit("run", surprise=1), "surprise: Extra inputs are not permitted"),
        (edit("run", witness_of="0000000000ff"), "points to a run that is not there"),
        (edit("run", seed=2**70), "seed: Input should be less than"),
        (edit("run", log_tail="x" * 2_000_000), "log_tail: String should have at most"),
        (edit("run", log_tail="a\0b"), "holds a character that text may not have"),
        (edit("run", started_at="2026-01-01T00:00:00"), "started_at: Input should have timezone"),
        (edit("run", environment_digest="0" * 64), "its environment is missing"),
        (edit("run", id="000000000002"), "run 2: comes twice"),
        (edit("environment", data={"python": "4"}), "has another digest"),
        (edit("metric", run_id="0000000000ff"), "of a row that is not there|of a run that is not there"),
        (edit("metric", units=3), "has not as many scores as it says"),
        (edit("metric", value=0.0), "its seal is broken"),
        (put("run.jsonl", b'{"a": NaN}\n'), "NaN is not JSON"),
        (put("run.jsonl", b"[" * 100_000), "not JSON|nested deeper"),
        (put("run.jsonl", b"[" * 200 + b"]" * 200), "nested deeper than 64"),
        (put("run.jsonl", b'{"id": ' + b"9" * 10_000 + b"}"), "not JSON"),
        (put("run.jsonl", b"\xff\xfe"), "not JSON"),
        (put("run.jsonl", b""), "of a run that is not there"),
        (put("metric.scores.parquet", b"PAR1 nonsense PAR1"), "not the Parquet of a capsule"),
        (put("metric.scores.parquet", b""), "not the Parquet of a capsule"),
        (put("../evil.py", b"import os"), "which no capsule has"),
        (put("/etc/cron.d/evil", b"*"), "which no capsule has"),
        (put("model.pkl", b"\x80\x04."), "which no capsule has"),
        (lambda members: members.pop("metric.scores.parquet"), "metric.scores.parquet is missing"),
    ],
)  # fmt: skip
def test_a_hostile_capsule_is_refused_and_nothing_is_written(
    sent: Path, other: Store, change: Callable[[dict[str, bytes]], None], message: str
) -> None:
    hostile = rebuilt(sent, change)
    with pytest.raises(CapsuleError, match=message):
        merge(other, read_capsule(hostile))
    assert other.runs() == []


def test_parquet_of_another_shape_is_refused(sent: Path) -> None:
    import polars as pl

    good = {"run_id": ["000000000001"] * 2, "name": ["loss"] * 2, "index": [0, 1], "scores": [1.0, 2.0]}
    types = {"index": pl.Int32}
    for frame, message in (
        (pl.DataFrame(good), "other columns"),
        (pl.DataFrame(good, schema_overrides=types).with_columns(extra=1), "other columns"),
        (pl.DataFrame({**good, "index": [1, 0]}, schema_overrides=types), "out of order"),
        (pl.DataFrame({**good, "name": ["loss", None]}, schema_overrides=types), "a value is missing"),
        (pl.DataFrame({**good, "run_id": ["x"] * 2}, schema_overrides=types), "of a row that is not there"),
    ):
        with pytest.raises(CapsuleError, match=message):
            read_capsule(rebuilt(sent, scores_of(frame)))


def test_an_altered_member_is_named_even_when_the_archive_is_sound(sent: Path) -> None:
    with pytest.raises(CapsuleError, match=r"run\.jsonl was altered"):
        read_capsule(rebuilt(sent, edit("run", reason="better"), honest=False))
    renamed = sent.with_name(f"capsule-{'0' * 64}.zip")
    renamed.write_bytes(sent.read_bytes())
    with pytest.raises(CapsuleError, match="its name is not the digest of its manifest"):
        read_capsule(renamed)


def test_every_flipped_byte_is_noticed_or_harmless(sent: Path, tmp_path: Path) -> None:
    """The digests cover all that is read; what they do not cover are the archive's own names and times."""
    data = sent.read_bytes()
    expected = [record.run for record in read_capsule(sent).records]
    refused = 0
    generator = np.random.default_rng(0)
    for position in generator.choice(len(data), 150, replace=False):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(generator.integers(8))
        path = tmp_path / "flipped.zip"
        path.write_bytes(flipped)
        try:
            found = read_capsule(path)
        except CapsuleError:
            refused += 1
        else:
            assert [record.run for record in found.records] == expected
    assert refused > 75
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.zip").write_bytes(data[:length])
        with pytest.raises(CapsuleError, match="no capsule"):
            read_capsule(tmp_path / "cut.zip")


def bomb(path: Path, name: str, size: int, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as member:
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    return path


def test_zip_bombs_are_refused_before_they_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capsule, "MAX_UNPACKED_BYTES", 100 << 20)
    with pytest.raises(CapsuleError, match="unpacks to more than 100 MiB"):
        read_capsule(bomb(tmp_path / "big.zip", "run.jsonl", 101 << 20))
    with pytest.raises(CapsuleError, match="unpacks to more than 200 times its size"):
        read_capsule(bomb(tmp_path / "dense.zip", "run.jsonl", 50 << 20))
    monkeypatch.setattr(capsule, "MAX_FILE_BYTES", 1000)
    with pytest.raises(CapsuleError, match="larger than"):
        read_capsule(tmp_path / "big.zip")


def test_a_size_that_the_archive_lies_about_is_not_read_past(sent: Path) -> None:
    data = bytearray(rebuilt(sent, lambda members: None).read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    # Uncompressed size in the last entry of the central directory.
    data[directory + 24 : directory + 28] = (1).to_bytes(4, "little")
    path = sent.with_name("liar.zip")
    path.write_bytes(data)
    with pytest.raises(CapsuleError, match=r"not as long as the archive says|damaged"):
        read_capsule(path)


def test_other_archives_are_refused(tmp_path: Path, sent: Path) -> None:
    twice = tmp_path / "twice.zip"
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("run.jsonl", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("run.jsonl", "2")
    with pytest.raises(CapsuleError, match="a member twice"):
        read_capsule(twice)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(CapsuleError, match="no manifest"):
        read_capsule(tmp_path / "empty.zip")
    with pytest.raises(CapsuleError, match="does not exist"):
        read_capsule(tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(CapsuleError, match="no capsule"):
        read_capsule(tmp_path / "text.zip")
    with zipfile.ZipFile(sent) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    manifest["version"] = 99
    with zipfile.ZipFile(tmp_path / "newer.zip", "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
    with pytest.raises(CapsuleError, match="a capsule of version 99"):
        read_capsule(tmp_path / "newer.zip")


def test_a_database_whose_scores_were_changed_is_not_merged(
    store: Store, other: Store, tmp_path: Path
) -> None:
    import sqlite3

    add(store, 1)
    store.close()
    with sqlite3.connect(tmp_path / "runs.db") as raw:
        raw.execute("UPDATE metric SET value = 0.5 WHERE name = 'loss'")
    with pytest.raises(CapsuleError, match="its seal is broken"):
        content_of_database(str(tmp_path / "runs.db"))
    with pytest.raises(StoreError, match="no results yet"):
        content_of_database(str(tmp_path / "absent.db"))


# every_eval_ever


def test_a_run_survives_every_eval_ever(store: Store, other: Store, tmp_path: Path) -> None:
    add(store, 1, scores=[1.0, 2.0, 4.0])
    add(store, 2, status="failed")
    (path,) = every_eval_ever.write_documents(content_of(store), tmp_path / "eee")
    document = json.loads(path.read_text())
    assert document["schema_version"] == "0.3.0"
    assert document["model_info"]["id"] == "net"
    (result,) = document["evaluation_results"]
    assert result["score_details"]["score"] == 7 / 3
    assert result["metric_config"]["lower_is_better"] is True
    assert result["score_details"]["uncertainty"]["num_samples"] == 3
    merge(other, every_eval_ever.read_document(path))
    assert [run.model_dump() for run in other.runs()] == [run.model_dump() for run in store.runs()[:1]]
    assert other.metrics()[0].scores == store.metrics(["000000000001"])[0].scores


def test_a_document_of_another_program_becomes_published_results(store: Store, tmp_path: Path) -> None:
    document = {
        "schema_version": "0.3.0",
        "evaluation_id": "board/org_net/1750000000",
        "evaluation_timestamp": "1750000000",
        "retrieved_timestamp": "1750000001",
        "source_metadata": {
            "source_type": "documentation",
            "source_organization_name": "Org",
            "evaluator_relationship": "third_party",
        },
        "eval_library": {"name": "unknown", "version": "unknown"},
        "model_info": {
            "name": "net",
            "id": "org/net",
            "additional_details": {"deployment_type": "unknown", "model_availability": "open_weights"},
        },
        "evaluation_results": [
            {
                "evaluation_name": "board.quiz",
                "source_data": {
                    "dataset_name": "quiz",
                    "source_type": "url",
                    "url": ["https://example.invalid/"],
                },
                "metric_config": {
                    "metric_id": "accuracy",
                    "lower_is_better": False,
                    "metric_unit": "proportion",
                },
                "score_details": {
                    "score": 0.75,
                    "uncertainty": {"confidence_interval": {"lower": 0.7, "upper": 0.8}},
                },
            }
        ],
    }
    path = tmp_path / "doc.json"
    path.write_text(json.dumps(document))
    content = every_eval_ever.read_document(path)
    merge(store, content)
    assert merge(store, content).known == 1
    (run,) = store.runs()
    assert (run.method, run.model, run.task) == ("published", "org/net", "board.quiz")
    (metric,) = store.metrics()
    assert (metric.name, metric.value, metric.low, metric.high) == ("accuracy", 0.75, 0.7, 0.8)
    assert metric.direction == "higher"
    # It can travel on as any record can.
    assert len(read_capsule(write_capsule(content_of(store), tmp_path)).records) == 1
    for broken in ({}, {"schema_version": "9"}, {**document, "evaluation_results": [{}]}, [], "x"):
        path.write_text(json.dumps(broken))
        with pytest.raises(CapsuleError, match="no document of every_eval_ever"):
            every_eval_ever.read_document(path)


def test_our_documents_fit_the_published_schema(store: Store, tmp_path: Path) -> None:
    """The fields that the schema of version 0.3.0 requires, and the rule that details are strings."""
    add(store, 1)
    (path,) = every_eval_ever.write_documents(content_of(store), tmp_path)
    document = json.loads(path.read_text())
    assert document.keys() == {
        "schema_version", "evaluation_id", "evaluation_timestamp", "retrieved_timestamp", "source_metadata",
        "eval_library", "model_info", "evaluation_results",
    }  # fmt: skip
    assert document["source_metadata"].keys() >= {
        "source_type", "source_organization_name", "evaluator_relationship",
    }  # fmt: skip
    assert document["model_info"]["additional_details"].keys() >= {"deployment_type", "model_availability"}
    for result in document["evaluation_results"]:
        assert result.keys() >= {"evaluation_name", "source_data", "metric_config", "score_details"}
        assert result["source_data"].keys() >= {"dataset_name", "source_type"}
        # A continuous score has bounds.
        assert result["metric_config"].keys() >= {"lower_is_better", "score_type", "min_score", "max_score"}
        assert isinstance(result["score_details"]["score"], float)

    def details(value: Any) -> Any:
        if isinstance(value, dict):
            for name, item in value.items():
                if name in ("additional_details", "details"):
                    yield from item.values()
                yield from details(item)
        elif isinstance(value, list):
            for item in value:
                yield from details(item)

    found = list(details(document))
    assert len(found) > 5
    assert all(isinstance(value, str) for value in found)


# The command line


def test_records_travel_by_command(
    command: Callable[..., subprocess.CompletedProcess[str]], grid: Callable[[int], Path], tmp_path: Path
) -> None:
    assert command("run", str(grid(3)), "--db", "a.db").returncode == 0
    exported = command("export", "--db", "a.db", "--json")
    assert exported.returncode == 0, exported.stderr
    (name,) = json.loads(exported.stdout)["files"]
    assert command("export", "--db", "a.db", "--json").stdout == exported.stdout
    said = command("import", name, "--db", "b.db")
    assert said.stdout == f"{name}: 3 new.\n", said.stderr
    assert command("import", name, "--db", "b.db").stdout == f"{name}: 0 new, 3 known already.\n"
    assert command("merge", "a.db", "--db", "b.db").stdout == "a.db: 0 new, 3 known already.\n"
    assert command("run", str(grid(3)), "--db", "b.db").stdout.endswith(
        "Nothing to do: all 3 cells are done.\n"
    )
    for kind in ("csv", "parquet", "json"):
        assert command("export", "--db", "a.db", "--format", kind).returncode == 0
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 7
    refused = command("merge", "a.db", "--db", "a.db")
    assert (refused.returncode, "is the database itself" in refused.stderr) == (2, True)
    refused = command("export", "--db", "a.db", "--method", "nobody")
    assert (refused.returncode, "no run fits" in refused.stderr) == (2, True)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
    refused = command("import", name, "--db", "b.db")
    assert refused.returncode == 2
    assert "no capsule" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_tables_hold_the_numbers(store: Store, tmp_path: Path) -> None:
    import csv

    import polars as pl

    from methodbench.store import tables

    add(store, 1, scores=[1.0, float("inf")], variant="=HYPERLINK(1)")
    add(store, 2, status="failed", reason="why")
    content = content_of(store)
    tables.write_csv(content, tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["metric"] for row in rows] == ["loss", "none", "loss", "none"]
    assert rows[0]["value"] == "inf"
    assert rows[0]["variant"] == "'=HYPERLINK(1)", "a spreadsheet must not run it"
    tables.write_parquet(content, tmp_path / "t.parquet")
    frame = pl.read_parquet(tmp_path / "t.parquet")
    assert frame["scores"].to_list()[0] == [1.0, float("inf")]
    tables.write_json(content, tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["runs"][0]["metric"][0]["scores"] == [1.0, "inf"]
    assert document["environments"] == {ENVIRONMENT.digest: SOFTWARE}
    with pytest.raises(CapsuleError, match="cannot write"):
        tables.write_csv(content, tmp_path)
