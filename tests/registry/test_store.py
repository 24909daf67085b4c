"""The database: what goes in comes out, and damage is told in one message."""

from __future__ import annotations

import shutil
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel

from methodbench.errors import StoreError
from methodbench.store import (
    SCHEMA_REVISION,
    Environment,
    Fingerprint,
    Finished,
    MetricValue,
    Run,
    Series,
    Store,
    Witness,
    open_store,
)
from methodbench.store.opening import translated

START = datetime(2026, 1, 1, tzinfo=UTC)


def make_run(number: int, cell: str = "cell", status: str = "ok", **more: object) -> Run:
    fields = {
        "id": f"{number:012x}", "cell_key": cell, "identity": {"a": 1}, "status": status, "method": "m",
        "kind": "probe", "family": "f", "params_passed": {}, "params": {"x": 1.5}, "task": "t",
        "task_params": {}, "protocol": 1, "environment_digest": "e", "started_at": START + timedelta(seconds=number),
        **more,
    }  # fmt: skip
    return Run(**fields)


ENVIRONMENT = Environment(digest="e", captured_at=START, data={"python": "3"})


def test_a_record_comes_back_as_it_went_in(store: Store) -> None:
    scores = np.array([1.0, np.inf, 0.1])
    metric = MetricValue(
        run_id=f"{1:012x}", name="value", value=float("inf"), units=3, scores=scores.tobytes(), primary=True
    )
    curve = Series(run_id=f"{1:012x}", name="loss", values=np.arange(4.0).tobytes())
    store.add(make_run(1), [metric], [curve], ENVIRONMENT)
    store.add(make_run(2, status="failed", reason="why"), environment=ENVIRONMENT)
    first, second = store.runs()
    assert (first.params, first.identity, second.reason) == ({"x": 1.5}, {"a": 1}, "why")
    assert first.started_at == START + timedelta(seconds=1)
    np.testing.assert_array_equal(store.metrics()[0].unit_scores(), scores)
    np.testing.assert_array_equal(store.series([first.id])[0].points(), np.arange(4.0))
    assert store.environments()["e"].data == {"python": "3"}
    frame = store.frame()
    assert frame["value"].to_list() == [float("inf"), None]
    assert frame["status"].to_list() == ["ok", "failed"]


def test_the_newest_success_of_a_cell_counts_and_else_its_newest_failure(store: Store) -> None:
    store.add(make_run(1, "a", "ok"), environment=ENVIRONMENT)
    store.add(make_run(2, "a", "failed"))
    store.add(make_run(3, "b", "failed"))
    store.add(make_run(4, "b", "timeout"))
    latest = store.latest(["a", "b", "c"])
    assert {key: run.status for key, run in latest.items()} == {"a": "ok", "b": "timeout"}


def test_runs_are_found_by_the_first_digits_of_their_id(store: Store) -> None:
    for number in (0xABC, 0xABD):
        store.add(make_run(number), environment=ENVIRONMENT)
    assert store.run("000000000abc").id == "000000000abc"
    for wrong, message in (("ffff", "no run"), ("000000000ab", "ambiguous"), ("%", "no run"), ("", "no run")):
        with pytest.raises(StoreError, match=message):
            store.run(wrong)


def test_a_failed_transaction_leaves_no_trace(store: Store) -> None:
    from sqlalchemy.exc import IntegrityError

    store.add(make_run(1), environment=ENVIRONMENT)
    with pytest.raises((StoreError, IntegrityError)):
        store.add(make_run(2), [MetricValue(run_id="nobody", name="value")])
    assert [run.id for run in store.runs()] == [f"{1:012x}"]


def test_a_record_that_cannot_be_written_takes_no_other_along(store: Store) -> None:
    good, bad = Finished(make_run(1), environment=ENVIRONMENT), MetricValue(run_id="nobody", name="value")
    with pytest.raises(IntegrityError):
        store.add_finished([good, Finished(make_run(2), [bad]), Finished(make_run(3))])
    assert [run.id for run in store.runs()] == [make_run(1).id]
    assert store.metrics() == []


def test_migrations_make_the_schema_that_the_tables_declare(store: Store) -> None:
    inspector = inspect(store.engine)
    for name, declared in SQLModel.metadata.tables.items():
        columns = {column["name"]: column["nullable"] for column in inspector.get_columns(name)}
        assert columns == {column.name: column.nullable for column in declared.columns}, name
        indexed = {tuple(index["column_names"]) for index in inspector.get_indexes(name)}
        assert indexed == {tuple(column.name for column in index.columns) for index in declared.indexes}, name
    assert set(inspector.get_table_names()) == {*SQLModel.metadata.tables, "alembic_version"}


def test_the_newest_migration_is_the_declared_revision() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    import methodbench.store

    config = Config()
    config.set_main_option("script_location", str(Path(methodbench.store.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == SCHEMA_REVISION


def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    with open_store(str(path)) as store, store.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"newer methodbench \(schema 9999"):
        open_store(str(path))
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_what_is_no_database_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, " * 1000)
    with pytest.raises(StoreError, match="damaged or no database"):
        open_store(str(tmp_path / "text.db"))
    with sqlite3.connect(tmp_path / "other.db") as raw:
        raw.execute("CREATE TABLE something (x)")
    with pytest.raises(StoreError, match="something else"):
        open_store(str(tmp_path / "other.db"))
    with pytest.raises(StoreError, match="neither a path nor a database URL"):
        open_store("nonsense://")
    with pytest.raises(StoreError, match="no results yet"):
        open_store(str(tmp_path / "absent.db"), create=False)


def test_a_truncated_database_gives_one_message(store: Store, tmp_path: Path) -> None:
    for number in range(200):
        store.add(make_run(number, log_tail="x" * 2000), environment=ENVIRONMENT)
    store.close()
    whole = tmp_path / "runs.db"
    with sqlite3.connect(whole) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    cut = tmp_path / "cut.db"
    shutil.copy(whole, cut)
    with open(cut, "r+b") as file:
        file.truncate(whole.stat().st_size // 3)
    with pytest.raises(StoreError, match=r"cut\.db"), open_store(str(cut)) as opened:
        opened.runs()


def test_a_full_disk_is_told_and_what_was_there_is_kept(store: Store) -> None:
    store.add(make_run(1), environment=ENVIRONMENT)
    with store.engine.connect() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()

    def limit(connection: sqlite3.Connection, _: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    from sqlalchemy import event

    event.listen(store.engine, "connect", limit)
    store.engine.dispose()
    with pytest.raises(StoreError, match="full") as caught:
        store.add(make_run(2, log_tail="x" * 1_000_000))
    assert "Free some space" in caught.value.hint
    event.remove(store.engine, "connect", limit)
    store.engine.dispose()
    assert len(store.runs()) == 1


def test_a_locked_database_is_told(tmp_path: Path) -> None:
    path = tmp_path / "locked.db"
    insert = text("INSERT INTO environment VALUES ('x', '2026-01-01', '{}')")
    with open_store(str(path)) as store, store.engine.connect() as connection:
        connection.execute(text("PRAGMA busy_timeout=50"))
        with sqlite3.connect(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="locked"), translated(str(path)):
                connection.execute(insert)
            other.rollback()


def test_a_witness_stands_beside_its_run_and_never_takes_its_place(store: Store) -> None:
    store.add(make_run(1), environment=ENVIRONMENT)
    verdict = Witness(
        run_id=f"{2:012x}", original=f"{1:012x}", verdict="drifted", tolerance=1e-6, parts_at="loss, step 3",
        differences=[{"metric": "value"}], suspects=[{"field": "python"}],
    )  # fmt: skip
    marks = [{"at": "output block", "digest": "ab"}]
    replay = make_run(2, witness_of=f"{1:012x}")
    metric = MetricValue(run_id=replay.id, name="value", value=2.0)
    store.add(replay, [metric], fingerprint=Fingerprint(run_id=replay.id, marks=marks), witness=verdict)
    assert [run.id for run in store.runs()] == [f"{1:012x}"]
    assert store.latest(["cell"])["cell"].id == f"{1:012x}"
    assert store.frame()["run"].to_list() == [f"{1:012x}"]
    assert len(store.runs(witnesses=True)) == 2
    assert store.run(f"{2:012x}").witness_of == f"{1:012x}"
    (found,) = store.witnesses(f"{1:012x}")
    assert (found.verdict, found.suspects) == ("drifted", [{"field": "python"}])
    assert store.fingerprint(replay.id) == marks
    assert store.fingerprint(f"{1:012x}") == []
