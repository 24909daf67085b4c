"""The engine: every way in which a cell can end, and what is shared between cells."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.engine import executors
from methodbench.engine.driver import Report, SilentReporter, run_plan
from methodbench.engine.slots import Grant
from methodbench.errors import MethodbenchError
from methodbench.store import Store
from methodbench.suite import Suite


def suite(*methods: Any, tasks: Any = ("toy-value",), **more: Any) -> Suite:
    return Suite.model_validate(
        {
            "name": "t",
            "comparisons": [{"methods": list(methods), "tasks": list(tasks), "timeout": 60, **more}],
        }
    )


def misbehave(*ways: str, **params: Any) -> dict[str, Any]:
    return {"name": "misbehave", "params": params, "grid": {"how": list(ways)}}


def run(store: Store, catalog: Catalog, *suites: Suite | str, **options: Any) -> Report:
    return run_plan(api.plan(list(suites), catalog=catalog), store, catalog, cores=2, **options)


def by_variant(report: Report) -> dict[str, tuple[str, str]]:
    return {run.variant: (run.status, run.reason) for run in report.runs.values()}


def test_a_grid_is_run_once_and_a_second_run_does_nothing(store: Store, catalog: Catalog) -> None:
    first = run(store, catalog, "toy-suite")
    # 4 variants x 2 seeds, and 2 methods x 2 tasks on the model; the probe task is skipped for compressors.
    assert len(first.new) == 12
    assert first.complete
    assert {skip.task for skip in first.plan.skips} == {"toy-value"}
    second = run(store, catalog, "toy-suite")
    assert second.new == []
    assert second.runs.keys() == first.runs.keys()
    assert len(store.runs()) == 12


def test_records_carry_scores_intervals_curves_and_what_repeats_them(store: Store, catalog: Catalog) -> None:
    report = run(
        store,
        catalog,
        suite(
            {"name": "noop", "params": {"value": 3}}, tasks=[{"name": "toy-value", "params": {"units": 9}}]
        ),
    )
    (record,) = report.runs.values()
    metrics = {row.name: row for row in store.metrics([record.id])}
    scores = metrics["value"].unit_scores()
    assert scores.shape == (9,)
    assert metrics["value"].value == pytest.approx(scores.mean())
    assert metrics["value"].low < metrics["value"].value < metrics["value"].high
    assert metrics["value"].primary
    assert not metrics["square"].primary
    (curve,) = store.series([record.id])
    np.testing.assert_array_equal(curve.points(), np.linspace(0, 3, 5))
    assert record.params == {"value": 3.0}
    assert record.params_passed == {"value": 3}
    assert record.task_params == {"units": 9}
    assert "the task says hello" in record.log_tail
    assert record.phases.keys() >= {"evaluate"}
    assert record.peak_memory_bytes > 10 * 2**20
    assert record.environment_digest in store.environments()
    assert (
        record.command
        == "methodbench run --method noop --param value=3 --task toy-value --task-param units=9 --seed 0"
    )


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path: Path, catalog: Catalog) -> None:
    from methodbench.store import open_store

    values = []
    for name in ("a.db", "b.db"):
        with open_store(str(tmp_path / name)) as store:
            report = run(store, catalog, suite("noop", seeds=[0, 1]))
            rows = store.metrics(run.id for run in report.runs.values())
            seeds = {run.id: run.seed for run in report.runs.values()}
            values.append({seeds[row.run_id]: row.scores for row in rows if row.primary})
    assert values[0] == values[1]
    assert values[0][0] != values[0][1]


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("raise", "failed", "RuntimeError: the toy broke"),
        ("memory", "oom", "out of memory: no room"),
        ("segfault", "failed", "killed by SIGSEGV"),
        ("kill", "failed", "killed by SIGKILL"),
        ("exit", "failed", "the worker left with exit code 3 before it had a result"),
        ("diverge", "failed", "diverged: the loss is not finite"),
        ("not-applicable", "not-applicable", "this toy does not fit"),
        ("surrogate", "failed", "RuntimeError: a lone surrogate: ?"),
        ("nonsense", "failed", "TypeError: string indices must be integers, not 'str'"),
    ],
)
def test_a_cell_that_ends_badly_becomes_a_record_with_its_reason(
    store: Store, catalog: Catalog, how: str, status: str, reason: str
) -> None:
    report = run(store, catalog, suite(misbehave(how), "noop"))
    ends = by_variant(report)
    assert ends[f"how={how}"] == (status, reason)
    assert ends[""] == ("ok", "")


def test_a_cell_that_hangs_is_killed_even_when_it_ignores_sigterm(store: Store, catalog: Catalog) -> None:
    start = time.monotonic()
    report = run(store, catalog, suite(misbehave("hang", "hang-hard"), timeout=1.0))
    assert by_variant(report) == {
        "how=hang": ("timeout", "took more than 1 s"),
        "how=hang-hard": ("timeout", "took more than 1 s"),
    }
    assert time.monotonic() - start < 60


def test_a_cell_over_the_memory_limit_is_ended(store: Store, catalog: Catalog) -> None:
    report = run(store, catalog, suite(misbehave("hog")), memory_limit=800 * 2**20)
    ((status, reason),) = by_variant(report).values()
    assert status == "oom"
    assert "more than the limit of 0.8 GiB" in reason


def test_processes_that_a_worker_leaves_behind_end_with_it(
    store: Store, catalog: Catalog, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    report = run(store, catalog, suite(misbehave("orphan", note=str(note))))
    assert report.complete
    pid = int(note.read_text())
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} still runs")


def test_a_daemon_that_a_worker_starts_ends_with_it(store: Store, catalog: Catalog, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    report = run(store, catalog, suite(misbehave("escape", note=str(note))))
    assert report.complete
    pid = int(note.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_memory_counts_over_all_processes_of_a_cell(store: Store, catalog: Catalog) -> None:
    report = run(store, catalog, suite(misbehave("hog-family"), "noop"), memory_limit=900 * 2**20)
    ends = by_variant(report)
    assert ends["how=hog-family"][0] == "oom"
    assert "more than the limit of 0.9 GiB" in ends["how=hog-family"][1]
    assert ends[""] == ("ok", "")


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGTERM, 40])
def test_a_worker_may_die_by_any_signal(store: Store, catalog: Catalog, number: int) -> None:
    report = run(store, catalog, suite(misbehave("signal", number=int(number))))
    ((status, reason),) = by_variant(report).values()
    assert status == "failed"
    name = number.name if isinstance(number, signal.Signals) else f"signal {number}"
    assert reason == f"killed by {name}"


def test_a_server_that_hangs_is_replaced(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped server reports no exits: its worker's result counts, and the cells behind it still run."""
    monkeypatch.setattr(executors, "STUCK_SECONDS", 1.0)
    monkeypatch.setattr(executors, "_START_SECONDS", 1.0)
    report = run(
        store, catalog, suite(misbehave("stop-server"), {"name": "noop", "grid": {"value": [2, 3, 4]}})
    )
    assert report.complete
    assert len(report.new) == 4


def test_a_process_that_cannot_be_killed_does_not_stop_the_run(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process stuck in the kernel ignores SIGKILL; here the signals do not reach it."""
    monkeypatch.setattr(executors, "STUCK_SECONDS", 0.5)
    monkeypatch.setattr(executors, "GRACE", 0.2)
    monkeypatch.setattr(executors, "send_signal", lambda pid, number: None)
    wanted = suite(misbehave("hang"), {"name": "noop", "grid": {"value": [2, 3, 4]}}, timeout=1.0)
    ends = by_variant(run(store, catalog, wanted))
    status, reason = ends.pop("how=hang")
    assert status == "timeout"
    assert reason.startswith("took more than 1 s; its process ")
    assert reason.endswith(" is stuck and could not be killed")
    assert {status for status, _ in ends.values()} == {"ok"}


def test_each_worker_sees_the_gpu_it_was_given(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "visible_gpus", lambda: ("3", "5"))
    both = suite(misbehave("environment"), device="cuda:1", seeds=[0, 1])
    report = run(store, catalog, both)
    assert report.complete
    assert [row.value for row in store.metrics() if row.primary] == pytest.approx([5.0, 5.0], abs=0.02)
    assert {run.device for run in report.runs.values()} == {"cuda:1"}


def test_cells_that_need_more_than_the_machine_has_are_left_out_with_the_reason(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "visible_gpus", lambda: ("0",))
    on_gpu = run(store, catalog, suite("needs-gpus", device="cuda"), suite("noop", device="cuda:3"))
    assert set(on_gpu.left_out.values()) == {
        "needs 2 GPUs, and this machine offers 1 GPU",
        "needs cuda:3, and this machine offers 1 GPU",
    }
    in_memory = run(store, catalog, suite("needs-memory"))
    (reason,) = in_memory.left_out.values()
    assert reason.startswith("needs 1000000.0 GiB of memory, and ")
    assert not store.runs()
    plan = api.plan(suite("needs-gpus"), catalog=catalog)
    assert [skip.reason for skip in plan.skips] == [
        "method needs-gpus needs a GPU, and the suite asks for the device cpu"
    ]


def test_a_batch_gives_the_bits_of_isolated_cells(tmp_path: Path, catalog: Catalog) -> None:
    from methodbench.store import open_store

    wanted = suite({"name": "noop", "grid": {"value": [1, 2, 3]}}, seeds=[0, 1])
    scores = []
    for batch in (1, 4):
        with open_store(str(tmp_path / f"{batch}.db")) as store:
            report = run(store, catalog, wanted, batch=batch)
            assert report.complete
            keys = {run.id: run.cell_key for run in report.runs.values()}
            scores.append({(keys[row.run_id], row.name): row.scores for row in store.metrics()})
    assert scores[0] == scores[1]
    assert len(scores[0]) == 12


def test_cells_that_end_together_are_reported_together_and_never_too_many(tmp_path: Path) -> None:
    """What a worker has written when the driver looks comes in one call, so that it is one transaction."""
    reported: list[list[int]] = []

    class Sink:
        def finished(self, job: Any, outcomes: Any) -> None:
            reported.append(list(outcomes))

    job = {"id": "j", "out": str(tmp_path), "log": str(tmp_path / "log.txt"), "first": 0, "cells": [{}] * 251}
    running = executors._Running(job, Grant(1, 0), 0.0)
    executor = executors.LocalExecutor(executors.ExecutorOptions(cores=1))
    for index in range(250):
        (tmp_path / f"{index}.json").write_text('{"status": "ok"}')
    executor._collect(running, Sink())
    assert [len(group) for group in reported] == [100, 100, 50]
    assert [index for group in reported for index in group] == list(range(250))
    executor._collect(running, Sink())
    assert len(reported) == 3, "a cell without a result is not reported"
    assert list(tmp_path.glob("*.json")) == []


def test_what_workers_wrote_is_removed_as_cells_are_recorded(
    store: Store, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders: list[int] = []

    class Count(SilentReporter):
        def finished(self, cell: Any, run: Any, metrics: Any) -> None:
            folders.append(sum(path.is_dir() for path in tmp_path.glob("methodbench-*/*")))

    run(
        store,
        catalog,
        suite({"name": "noop", "grid": {"value": [index / 9 for index in range(10)]}}),
        reporter=Count(),
    )
    assert len(folders) == 10
    assert max(folders) <= 4
    assert list(tmp_path.glob("methodbench-*")) == []


def test_a_temporary_folder_that_cannot_be_written_is_told(
    store: Store, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(MethodbenchError, match=r"cannot write temporary files: .*absent") as caught:
        run(store, catalog, suite("noop"))
    assert "TMPDIR" in caught.value.hint


def test_a_crash_in_a_batch_costs_the_cell_that_crashed(store: Store, catalog: Catalog) -> None:
    noop = {"name": "noop", "grid": {"value": [1, 2]}}
    report = run(store, catalog, suite(misbehave("segfault", "hang"), noop, timeout=1), batch=10)
    assert by_variant(report) == {
        "value=1": ("ok", ""),
        "value=2": ("ok", ""),
        "how=segfault": ("failed", "killed by SIGSEGV"),
        "how=hang": ("timeout", "took more than 1 s"),
    }


def test_the_death_of_the_fork_server_fails_the_cell_that_killed_it_and_no_other(
    store: Store, catalog: Catalog
) -> None:
    report = run(
        store, catalog, suite(misbehave("kill-server"), "noop", {"name": "noop", "grid": {"value": [2, 3]}})
    )
    ends = by_variant(report)
    assert ends.pop("how=kill-server") == ("failed", "the fork server died (SIGKILL) while this cell ran")
    assert {status for status, _ in ends.values()} == {"ok"}
    assert len(ends) == 3


def test_failures_are_kept_and_run_again_only_when_asked(store: Store, catalog: Catalog) -> None:
    wanted = suite(misbehave("raise"))
    assert len(run(store, catalog, wanted).new) == 1
    assert run(store, catalog, wanted).new == []
    assert len(run(store, catalog, wanted, retry=True).new) == 1
    assert len(store.runs()) == 2


def test_an_implementation_that_cannot_be_imported_is_named(store: Store, catalog: Catalog) -> None:
    from methodbench.errors import MethodbenchError

    with pytest.raises(
        MethodbenchError, match=r"needs-absent-module: cannot import toybench\.methods:Absent"
    ):
        run(store, catalog, suite("needs-absent-module"))


def test_a_model_that_cannot_be_prepared_fails_its_cells_and_no_other(store: Store, catalog: Catalog) -> None:
    report = run(store, catalog, suite("identity", models=["toy-broken", "toy-linear"], tasks=["toy-norm"]))
    ends = {run.model: (run.status, run.reason) for run in report.runs.values()}
    assert ends["toy-linear"] == ("ok", "")
    status, reason = ends["toy-broken"]
    assert status == "failed"
    assert reason.startswith("toy-broken could not be prepared")
    assert "the recipe is wrong" in reason


def test_a_model_is_prepared_once_and_the_dense_one_is_left_alone(store: Store, catalog: Catalog) -> None:
    report = run(store, catalog, "toy-suite")
    of_model = {(run.method, run.task): run for run in report.runs.values() if run.model}
    value = {key: store.metrics([run.id])[0] for key, run in of_model.items()}
    assert value["scale", "toy-norm"].value == pytest.approx(value["identity", "toy-norm"].value / 2)
    assert value["scale", "toy-norm"].low is None
    assert value["scale", "toy-mean"].units == 4
    scaled = of_model["scale", "toy-norm"]
    assert scaled.storage == "simulated"
    assert scaled.facts["calibration"] == "two rows of zeros"
    assert scaled.facts["calibrated_on"] == 2
    assert scaled.model_bytes == 64
    assert scaled.bits_per_weight == 32
    assert scaled.throughput_unit == "norms/s"
    cache = Path(os.environ["METHODBENCH_CACHE"])
    assert (
        len([path for path in (cache / "models").iterdir() if path.is_dir() and path.suffix != ".partial"])
        == 1
    )


def test_a_crash_in_one_task_costs_that_cell_alone(store: Store, catalog: Catalog) -> None:
    tasks = ["toy-norm", "toy-crash", "toy-mean"]
    report = run(store, catalog, suite("scale", models=["toy-linear"], tasks=tasks))
    ends = {run.task: (run.status, run.reason) for run in report.runs.values()}
    assert ends == {
        "toy-norm": ("ok", ""),
        "toy-crash": ("failed", "killed by SIGKILL"),
        "toy-mean": ("ok", ""),
    }
    logs = {run.task: run.log_tail for run in report.runs.values()}
    assert "about to die" in logs["toy-crash"]
    assert "about to die" not in logs["toy-norm"] + logs["toy-mean"]


def test_ctrl_c_ends_the_workers_and_the_next_run_goes_on(store: Store, catalog: Catalog) -> None:
    class Interrupt(SilentReporter):
        def finished(self, cell: Any, run: Any, metrics: Any) -> None:
            raise KeyboardInterrupt

    wanted = suite({"name": "noop", "grid": {"value": [1, 2, 3, 4]}})
    with pytest.raises(KeyboardInterrupt):
        run(store, catalog, wanted, reporter=Interrupt())
    done = len(store.runs())
    assert 1 <= done < 4
    assert len(run(store, catalog, wanted).new) == 4 - done
    assert not [
        child
        for child in psutil.Process().children(recursive=True)
        if "forkserver" in " ".join(child.cmdline())
    ]


def test_a_driver_killed_mid_grid_loses_no_finished_cell(catalog: Catalog, tmp_path: Path) -> None:
    """SIGKILL of the driver: what was reported is in the database, its workers are gone, a rerun completes."""
    import subprocess
    import sys

    from methodbench.store import open_store

    db = str(tmp_path / "killed.db")
    script = (
        "import sys; from importlib.metadata import EntryPoint\n"
        "from methodbench import api; from methodbench.catalog import load_catalog\n"
        "from methodbench.cli.progress import LineReporter\n"
        "points = [EntryPoint('toybench', 'toybench.plugin', 'methodbench')]\n"
        "grid = {'value': [i / 10 for i in range(60)]}\n"
        "comparison = {'methods': [{'name': 'noop', 'grid': grid}], 'tasks': ['toy-value']}\n"
        "suite = {'name': 't', 'comparisons': [comparison]}\n"
        "sys.stdout.reconfigure(line_buffering=True)\n"
        f"api.run(suite, db={db!r}, reporter=LineReporter(), catalog=load_catalog(points=points))\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    reported = 0
    for line in driver.stdout:
        reported += " ok " in line
        if reported == 10:
            children = psutil.Process(driver.pid).children(recursive=True)
            driver.kill()
            break
    driver.wait()
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    with open_store(db) as store:
        done = len(store.runs())
        assert reported <= done < 60
        grid = {"value": [i / 10 for i in range(60)]}
        report = run(store, catalog, suite({"name": "noop", "grid": grid}))
        assert len(report.new) == 60 - done
        assert len({run.cell_key for run in store.runs()}) == len(store.runs()) == 60


def test_what_fits_on_the_cores_runs_side_by_side(store: Store, catalog: Catalog) -> None:
    alive: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            alive.append(
                sum("forkserver" in " ".join(_cmdline(c)) for c in psutil.Process().children(recursive=True))
            )
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(
        store,
        catalog,
        suite(misbehave("hang"), {"name": "misbehave", "params": {"how": "hang", "note": "b"}}, timeout=2),
    )
    stop.set()
    watcher.join()
    assert max(alive) == 3  # the server and two workers of one thread each


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_signals_are_named(store: Store, catalog: Catalog) -> None:
    assert executors._explain_exit(-signal.SIGBUS, 0) == ("failed", "killed by SIGBUS")


def test_a_job_that_waits_keeps_what_it_lacks() -> None:
    from methodbench.engine.slots import Needs, Slots

    slots = Slots(cores=4, memory=100, gpus=("0", "1"))
    first = slots.take(Needs(1, gpus=1, device="cuda:0"))
    assert first.gpus == (0,)
    assert slots.missing(Needs(1, gpus=1, device="cuda:0")) == {"gpus"}
    assert slots.missing(Needs(1, gpus=2, device="cuda")) == {"gpus"}
    second = slots.take(Needs(2, memory=60, gpus=1, device="cuda"))
    assert second.gpus == (1,)
    assert slots.environment(second)["CUDA_VISIBLE_DEVICES"] == "1"
    assert slots.missing(Needs(2, memory=50)) == {"cores", "memory"}
    slots.give_back(second, stuck=True)
    slots.give_back(second)
    assert slots.used_cores == 1
    assert slots.used_memory == 0
    assert slots.lacking(Needs(1, gpus=1, device="cuda:1")) != ""
    assert slots.lacking(Needs(1, gpus=2, device="cuda")) != ""
    assert slots.lacking(Needs(1, gpus=1, device="cuda")) == ""
    # What needs every core runs on a machine with fewer, alone.
    assert slots.missing(Needs(16)) == {"cores"}
    slots.give_back(first)
    assert slots.missing(Needs(16)) == set()
