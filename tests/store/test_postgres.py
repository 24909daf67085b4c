"""The same store on a real PostgreSQL server, with several drivers at once."""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from methodbench.errors import StoreError
from methodbench.provenance import digest
from methodbench.store import Claim, Driver, Environment, MetricValue, Run, Series, Store, open_store, repair
from methodbench.store.claims import Lease
from methodbench.store.merging import content_of, merge

START = datetime(2026, 1, 1, tzinfo=UTC)
SOFTWARE = {"python": "3.11"}
ENVIRONMENT = Environment(digest=digest(SOFTWARE), captured_at=START, data=SOFTWARE)


def missing(reason: str) -> None:
    if os.environ.get("METHODBENCH_REQUIRE_POSTGRES"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of this test's own, on a socket in a folder of its own."""
    pytest.importorskip("psycopg")
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    programs = found[-1] if found else os.path.dirname(shutil.which("initdb") or "")
    if not programs:
        missing("no PostgreSQL server here (Debian's package `postgresql`)")
    folder = Path(tempfile.mkdtemp(prefix="mb-pg-", dir="/tmp"))
    # A server does not run as root.
    as_root = os.geteuid() == 0
    if as_root:
        shutil.chown(folder, "postgres", "postgres")
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if as_root else []

    def run(*words: str) -> None:
        line = [*prefix, f"{programs}/{words[0]}", *words[1:]]
        done = subprocess.run(
            line, capture_output=True, text=True, cwd=folder, env={**os.environ, "LC_ALL": "C"}
        )
        if done.returncode:
            missing(f"{words[0]} failed: {done.stderr.strip() or done.stdout.strip()}")

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8")
    options = (
        f"-c listen_addresses='' -c unix_socket_directories={folder} -c timezone=Asia/Tokyo -c fsync=off"
    )
    run("pg_ctl", "-D", data, "-w", "-o", options, "-l", str(folder / "log"), "start")
    yield str(folder)
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def url(server: str) -> str:
    """A database of its own on the server."""
    import psycopg

    name = f"db{os.urandom(4).hex()}"
    with psycopg.connect(f"host={server} user=tester dbname=postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]
    return f"postgresql://tester@/{name}?host={server}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as opened:
        yield opened


def add(store: Store, number: int, **more: object) -> Run:
    identity = {"method": "m", "cell": number}
    fields = {
        "id": f"{number:012x}", "cell_key": digest(identity), "identity": identity, "status": "ok", "method": "m",
        "kind": "probe", "family": "f", "params_passed": {}, "params": {"x": 1.5}, "task": "t", "task_params": {},
        "protocol": 1, "environment_digest": ENVIRONMENT.digest, "started_at": START, "log_tail": "a\0b",
        "facts": {"odd": float("nan")}, **more,
    }  # fmt: skip
    scores = np.array([1.0, np.inf, 0.1])
    metric = MetricValue(run_id=fields["id"], name="loss", value=np.inf, units=3, scores=scores.tobytes())
    curve = Series(run_id=fields["id"], name="steps", values=np.array([0.5]).tobytes())
    return store.add(Run(**fields), [metric], [curve], ENVIRONMENT)


def test_a_record_comes_back_as_it_went_in(store: Store) -> None:
    add(store, 1)
    (run,) = store.runs()
    assert run.started_at == START, "times are UTC whatever the server's zone"
    assert (run.params, run.facts, run.log_tail) == ({"x": 1.5}, {"odd": "nan"}, "a�b")
    assert store.metrics()[0].unit_scores().tolist() == [1.0, float("inf"), 0.1]
    assert store.frame()["value"].to_list() == [float("inf")]
    assert repair.examine(store).good, "the seal holds after the way through the server"


def test_records_move_between_databases_and_keep_their_seals(store: Store, tmp_path: Path) -> None:
    add(store, 1)
    with open_store(str(tmp_path / "file.db")) as file:
        assert len(merge(file, content_of(store)).new) == 1
        add(file, 2)
        merged = merge(store, content_of(file))
        assert (merged.known, len(merged.new)) == (1, 1)
        assert {run.seal for run in store.runs()} == {run.seal for run in file.runs()}


def test_the_schema_of_the_first_release_is_brought_up_to_date_with_its_data(url: str) -> None:
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import create_engine, text

    from methodbench.store import opening

    config = Config()
    config.set_main_option("script_location", str(Path(opening.__file__).parent / "migrations"))
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(text("INSERT INTO environment VALUES ('e', '2026-01-01', '{}')"))
    engine.dispose()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            open_store(url).close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with open_store(url) as store:
        assert list(store.environments()) == ["e"]
        add(store, 1)


def test_a_cell_is_taken_once_by_many_at_once(store: Store) -> None:
    keys = [f"cell{index}" for index in range(40)]
    taken: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with Lease(store, {}) as lease:
                for key in keys:
                    taken.extend(lease.take([key]).mine)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    # A lease that ends gives its cells back, and a later one may take them again: never two at a time.
    assert set(taken) == set(keys)


def test_several_drivers_share_the_grid(
    url: str,
    command: Callable[..., subprocess.CompletedProcess[str]],
    grid: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    line = [
        sys.executable,
        "-m",
        "methodbench.cli",
        "run",
        str(grid(30)),
        "--db",
        url,
        "--json",
        "--cores",
        "1",
    ]
    drivers = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        for _ in range(3)
    ]
    new = 0
    for driver in drivers:
        out, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
        answer = json.loads(out)
        assert len(answer["runs"]) == 30
        new += answer["new"]
    assert new == 30
    from sqlmodel import select

    with open_store(url) as store:
        assert set(Counter(run.cell_key for run in store.runs()).values()) == {1}
        assert len(store.runs()) == 30
        with store.reading() as session:
            assert session.exec(select(Claim)).all() == session.exec(select(Driver)).all() == []
    for words in (["results"], ["status"], ["doctor"]):
        said = command(*words, "--db", url)
        assert said.returncode == 0, said.stdout + said.stderr


def test_a_database_that_is_not_there_is_told(server: str) -> None:
    with pytest.raises(StoreError, match="does not exist") as caught:
        open_store(f"postgresql://tester@/nothing?host={server}")
    assert "createdb" in caught.value.hint
