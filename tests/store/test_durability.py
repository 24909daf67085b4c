"""What happens to a database: old schemas, full disks, read-only places, damaged pages, and what can be saved."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, text

from methodbench.errors import StoreError
from methodbench.provenance import digest
from methodbench.store import (
    SCHEMA_REVISION,
    Driver,
    Environment,
    MetricValue,
    Run,
    Store,
    claims,
    open_store,
    opening,
    repair,
)
from methodbench.store.claims import Lease

START = datetime(2026, 1, 1, tzinfo=UTC)
SOFTWARE = {"python": "3.11"}
ENVIRONMENT = Environment(digest=digest(SOFTWARE), captured_at=START, data=SOFTWARE)


def add(store: Store, number: int, **more: Any) -> Run:
    identity = {"method": "m", "cell": number}
    fields: dict[str, Any] = {
        "id": f"{number:012x}", "cell_key": digest(identity), "identity": identity, "status": "ok", "method": "m",
        "kind": "probe", "family": "f", "params_passed": {}, "params": {"x": 1.5}, "task": "t", "task_params": {},
        "protocol": 1, "environment_digest": ENVIRONMENT.digest, "started_at": START + timedelta(seconds=number),
        "log_tail": "a line of the log\n" * 60, **more,
    }  # fmt: skip
    scores = np.arange(40.0) + number
    metric = MetricValue(
        run_id=fields["id"], name="loss", value=float(scores.mean()), units=40, scores=scores.tobytes()
    )
    return store.add(Run(**fields), [metric], environment=ENVIRONMENT)


def filled(path: Path, count: int) -> list[str]:
    """Make a database of so many runs in one file, without a write-ahead log; return the identifiers."""
    with open_store(str(path)) as store:
        made = [add(store, number).id for number in range(count)]
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return made


# Schemas


def database_of_0001(path: Path) -> None:
    """A database as the first schema left it, made by its migration and plain SQL."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(opening.__file__).parent / "migrations"))
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    identity = {"method": "m", "seed": 0}
    scores = np.array([1.0, 2.0, np.inf])
    run = {
        "id": "0123456789ab", "cell_key": digest(identity), "identity": json.dumps(identity), "status": "ok",
        "reason": "", "method": "m", "kind": "probe", "family": "f", "baseline": 0, "variant": "v",
        "params_passed": "{}", "params": '{"x": 1.5}', "model": "", "model_kind": "", "task": "t", "task_params": "{}",
        "protocol": 1, "seed": 0, "dtype": "float32", "device": "cpu", "threads": 1, "method_digest": "",
        "weights_digest": "", "data_digest": "", "methodbench_version": "0.1.0", "suite": "s", "command": "c",
        "started_at": "2026-01-01 00:00:01.000007", "wall_seconds": 0.5, "phases": '{"evaluate": 0.5}', "storage": "",
        "throughput_unit": "", "facts": '{"odd": NaN}', "warnings": '["careful"]', "log_tail": "läuft",
        "peak_memory_bytes": 1 << 40, "model_bytes": None, "bits_per_weight": 3.25, "accounted_bits": None,
        "throughput": None, "environment_digest": digest(SOFTWARE),
    }  # fmt: skip
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(
            "INSERT INTO environment VALUES (?, '2026-01-01 00:00:00.000000', ?)",
            (digest(SOFTWARE), json.dumps(SOFTWARE)),
        )
        names, marks = ", ".join(run), ", ".join("?" * len(run))
        raw.execute(f"INSERT INTO run ({names}) VALUES ({marks})", list(run.values()))
        raw.execute(
            "INSERT INTO metric VALUES (?, 'loss', 'Loss', 'nats', 'lower', 'mean', 1, 1.5, 1.0, 2.0, 3, ?)",
            (run["id"], scores.tobytes()),
        )
        raw.execute("INSERT INTO series VALUES (?, 'steps', ?)", (run["id"], np.arange(3.0).tobytes()))
        raw.commit()


#: Every released schema -> what makes a database of it with data. A release adds a line.
RELEASED: dict[str, Callable[[Path], None]] = {"0001": database_of_0001}


@pytest.mark.parametrize("revision", RELEASED)
def test_a_database_of_every_released_schema_keeps_its_records(revision: str, tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    RELEASED[revision](path)
    with open_store(str(path)) as store:
        (run,) = store.runs()
        assert (run.id, run.params, run.warnings, run.log_tail) == (
            "0123456789ab",
            {"x": 1.5},
            ["careful"],
            "läuft",
        )
        assert run.started_at == START + timedelta(seconds=1, microseconds=7)
        assert (run.bits_per_weight, run.peak_memory_bytes) == (3.25, 1 << 40)
        assert store.metrics()[0].unit_scores().tolist() == [1.0, 2.0, np.inf]
        assert store.series()[0].points().tolist() == [0.0, 1.0, 2.0]
        assert run.witness_of is None
        add(store, 5)
        assert len(store.runs()) == 2
        findings = repair.examine(store)
        assert (findings.good, findings.unsealed) == (True, 1)
        assert repair.mend(store, findings) == 1
        assert repair.examine(store).unsealed == 0
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == (SCHEMA_REVISION,)


def test_every_released_schema_is_tested() -> None:
    versions = Path(opening.__file__).parent / "migrations" / "versions"
    released = {path.name.partition("_")[0] for path in versions.glob("[0-9]*.py")} - {SCHEMA_REVISION}
    assert released == set(RELEASED)


def test_a_migration_that_breaks_off_leaves_the_old_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic.operations import Operations

    path = tmp_path / "old.db"
    database_of_0001(path)

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Operations, "create_table", broken)
    with pytest.raises(KeyboardInterrupt):
        open_store(str(path))
    monkeypatch.undo()
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
        assert "seal" not in [row[1] for row in raw.execute("PRAGMA table_info(run)")]
    with open_store(str(path)) as store:
        assert len(store.runs()) == 1


def test_several_that_open_an_old_or_absent_database_at_once_migrate_it_once(tmp_path: Path) -> None:
    database_of_0001(tmp_path / "old.db")
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            with open_store(str(tmp_path / name)) as store:
                store.runs()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("old.db", "new.db") * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# Places that cannot be written


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A folder, and what makes it read-only: a mount, since no permission stops root."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, text=True)

    def close() -> Path:
        if mounted.returncode:
            pytest.skip(f"cannot mount a disk to make read-only: {mounted.stderr.strip()}")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        return folder

    yield close
    if not mounted.returncode:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_database_on_a_read_only_disk_is_read_and_a_run_is_told_at_once(
    read_only: Callable[[], Path], tmp_path: Path
) -> None:
    filled(tmp_path / "shelf" / "runs.db", 3)
    folder = read_only()
    with open_store(str(folder / "runs.db"), create=False) as store:
        assert store.read_only
        assert len(store.runs()) == 3
        with pytest.raises(StoreError, match=r"readonly|read-only"):
            add(store, 4)
    with pytest.raises(StoreError, match="the file cannot be written") as caught:
        open_store(str(folder / "runs.db"))
    assert "give another database with --db" in caught.value.hint
    with pytest.raises(StoreError, match="the folder cannot be written"):
        open_store(str(folder / "new.db"))
    with pytest.raises(StoreError, match="cannot create the folder"):
        open_store(str(folder / "deep" / "new.db"))


def test_an_old_schema_on_a_read_only_disk_is_told(read_only: Callable[[], Path], tmp_path: Path) -> None:
    database_of_0001(tmp_path / "shelf" / "runs.db")
    with pytest.raises(StoreError, match="has an older schema than") as caught:
        open_store(str(read_only() / "runs.db"), create=False)
    assert "Copy it to a folder that can be written" in caught.value.hint


def test_a_folder_in_the_place_of_the_database_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder, not a database"):
        open_store(str(tmp_path))


FILL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from test_durability import add
from methodbench.errors import StoreError
from methodbench.store import open_store
limit = int(sys.argv[3])
with open_store(sys.argv[1]) as store:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = 0
    try:
        for number in range(100, 5000):
            add(store, number)
            done += 1
    except StoreError as error:
        print(done)
        print(error)
"""


def fill(path: Path, limit: int = 0) -> tuple[int, str]:
    line = [sys.executable, "-c", FILL, str(path), str(Path(__file__).parent), str(limit)]
    answer = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    done, _, said = answer.stdout.partition("\n")
    return int(done), said


def check_kept(path: Path, before: int, done: int) -> None:
    with open_store(str(path)) as store:
        assert len(store.runs()) == before + done
        assert len(store.metrics()) == before + done
        assert repair.examine(store).good
        add(store, 9999)


def test_a_file_that_may_not_grow_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    filled(tmp_path / "runs.db", 5)
    done, said = fill(tmp_path / "runs.db", limit=1 << 20)
    assert done > 5
    assert "finished cells are kept" in said
    check_kept(tmp_path / "runs.db", 5, done)


def test_a_full_disk_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.strip()}")
    try:
        filled(disk / "runs.db", 5)
        done, said = fill(disk / "runs.db")
        assert done > 5
        assert "Free some space and run the same command again" in said
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        check_kept(disk / "runs.db", 5, done)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_lock_that_is_held_is_waited_for_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.db"
    filled(path, 1)
    monkeypatch.setattr(opening, "BUSY_SECONDS", 0.2)
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as holder,
        open_store(str(path), create=False) as store,
    ):
        holder.execute("BEGIN IMMEDIATE")
        assert len(store.runs()) == 1, "reading waits for nobody"
        with pytest.raises(StoreError, match="locked") as caught:
            add(store, 2)
        assert "Another process holds it" in caught.value.hint
        holder.execute("COMMIT")
        add(store, 2)
        assert len(store.runs()) == 2


# Damage


def harm(path: Path, kind: str, seed: int) -> None:
    """Flip bits of a few pages, or overwrite their heads or a stretch with noise, or cut the file.

    The records' environment is spared: without it none is whole.
    """
    generator = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    pages = np.setdiff1d(np.arange(len(data) // 4096), [_root(path, "environment") - 1])
    if kind == "flip":
        for page in generator.choice(pages, 3, replace=False):
            for offset in generator.integers(0, 4096, 40):
                data[page * 4096 + int(offset)] ^= 1 << int(generator.integers(8))
    elif kind == "header":
        # The first bytes of a page say what it is and where its cells are.
        for page in generator.choice(pages, 3, replace=False):
            data[page * 4096 : page * 4096 + 64] = generator.bytes(64)
    elif kind == "schema":
        # Every page of the list of tables, with the head of the file.
        for page in repair._schema_pages(data):
            data[page * 4096 : (page + 1) * 4096] = generator.bytes(4096)
    elif kind == "noise":
        start = int(generator.integers(pages[5], pages[-9])) * 4096
        data[start : start + 8 * 4096] = generator.bytes(8 * 4096)
    else:
        data = data[: int(len(data) * generator.uniform(0.3, 0.95))]
    path.write_bytes(data)


def _root(path: Path, name: str) -> int:
    with closing(sqlite3.connect(path)) as raw:
        return raw.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0]


@pytest.mark.parametrize("kind", ["flip", "header", "schema", "noise", "cut"])
@pytest.mark.parametrize("seed", range(4))
def test_whole_records_are_saved_from_a_damaged_database_and_no_others(
    tmp_path: Path, sound: Path, kind: str, seed: int
) -> None:
    path = tmp_path / "runs.db"
    shutil.copy(sound, path)
    with open_store(str(path)) as store:
        before = {run.id: run.seal for run in store.runs()}
    harm(path, kind, seed)
    damaged = path.read_bytes()
    try:
        with open_store(str(path), create=False) as store:
            if repair.examine(store).good:
                assert {run.id: run.seal for run in store.runs()} == before, "damage that nobody noticed"
                return
    except StoreError:
        pass
    done = repair.rebuild(path)
    assert done.kept is not None
    assert done.kept.read_bytes()[4096:] == damaged[4096:]
    if kind == "schema":
        assert (done.saved, done.lost) == (len(before), 0)
    with open_store(str(path)) as store:
        found = store.runs()
        assert repair.examine(store).good
        assert all(before[run.id] == run.seal for run in found), "what was saved is what was recorded"
        assert len(store.metrics()) == len(found) == done.saved
        # Damage stays local: what lies on other pages is saved.
        assert done.saved + done.lost >= len(found)
        assert done.saved >= (0.1 if kind == "cut" else 0.5) * len(before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "runs.db"
    filled(path, 150)
    return path


def test_a_database_without_the_environment_of_its_records_has_none_to_save(
    tmp_path: Path, sound: Path
) -> None:
    path = tmp_path / "runs.db"
    shutil.copy(sound, path)
    page = _root(path, "environment") - 1
    data = bytearray(path.read_bytes())
    data[page * 4096 : (page + 1) * 4096] = bytes(4096)
    path.write_bytes(data)
    done = repair.rebuild(path)
    assert (done.saved, done.lost) == (0, 150)
    assert done.kept is not None
    assert done.kept.read_bytes() == bytes(data)


def test_a_score_that_was_changed_behind_the_back_is_found(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    filled(path, 4)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("UPDATE metric SET scores = zeroblob(320) WHERE run_id = '000000000002'")
        raw.commit()
    with open_store(str(path)) as store:
        findings = repair.examine(store)
    assert findings.broken == ["000000000002"]
    assert findings.damage == []
    done = repair.rebuild(path)
    assert (done.saved, done.lost) == (3, 1)


def test_a_database_that_a_run_is_writing_to_is_not_repaired_under_it(tmp_path: Path, sound: Path) -> None:
    """Its next records would go into the file that was put aside."""
    path = tmp_path / "runs.db"
    shutil.copy(sound, path)
    with open_store(str(path)) as store:
        with Lease(store, {}):
            with pytest.raises(StoreError, match=rf"pid {os.getpid()}") as caught:
                repair.rebuild(path)
            assert "Ctrl-C" in caught.value.hint
            assert len(store.runs()) == 150
        with store.writing() as session:
            # One that has died leaves its row behind.
            gone = {
                "id": "gone",
                "host": "here",
                "place": claims.place(),
                "pid": os.getpid(),
                "process_started": 0.0,
            }
            session.add(Driver(**gone, started_at=datetime(2026, 1, 1, tzinfo=UTC)))
            session.commit()
    assert repair.rebuild(path).saved == 150


def test_an_index_that_is_damaged_costs_nothing(tmp_path: Path, sound: Path) -> None:
    path = tmp_path / "runs.db"
    shutil.copy(sound, path)
    page = _root(path, "ix_run_cell_status")
    data = bytearray(path.read_bytes())
    data[(page - 1) * 4096 + 8 : page * 4096] = bytes(4088)
    path.write_bytes(data)
    done = repair.rebuild(path)
    assert (done.saved, done.lost) == (150, 0)


def test_doctor_repairs_and_says_what_it_did(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, sound: Path
) -> None:
    path = tmp_path / "runs.db"
    shutil.copy(sound, path)
    good = command("doctor", "--db", "runs.db")
    assert "database runs.db: 150 runs, every seal holds" in good.stdout
    harm(path, "noise", 1)
    told = command("doctor", "--db", "runs.db")
    assert told.returncode == 1
    assert "database runs.db is damaged" in told.stdout
    assert "--repair" in told.stdout
    mended = command("doctor", "--db", "runs.db", "--repair")
    assert "saved; the damaged file is runs.db.damaged-1" in mended.stdout, mended.stdout
    assert "every seal holds" in command("doctor", "--db", "runs.db").stdout
    (tmp_path / "noise.db").write_bytes(np.random.default_rng(0).bytes(20_000))
    lost = command("doctor", "--db", "noise.db", "--repair")
    assert lost.returncode == 1
    assert "nothing can be read" in lost.stdout
    assert "Traceback" not in lost.stdout + lost.stderr
    assert len((tmp_path / "noise.db").read_bytes()) == 20_000


def test_passwords_of_urls_are_not_shown() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError) as caught:
        open_store("postgresql://somebody:topsecret@127.0.0.1:1/nothing")
    assert "topsecret" not in str(caught.value)
    assert "Is the server running" in caught.value.hint
    with pytest.raises(StoreError, match="kept in SQLite or PostgreSQL"):
        open_store("mysql://u:topsecret@h/d")


def test_text_of_a_worker_that_no_database_takes_is_kept_as_far_as_it_goes(store: Store) -> None:
    add(store, 1, log_tail="a\0b\ud800c", facts={"nan": float("nan"), "deep": [float("-inf")]})
    (run,) = store.runs()
    assert run.log_tail == "a�b?c"
    assert run.facts == {"nan": "nan", "deep": ["-inf"]}
    assert repair.examine(store).good
    with store.engine.connect() as connection:
        assert "NaN" not in connection.execute(text("SELECT facts FROM run")).scalar_one()
