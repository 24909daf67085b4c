"""The Ray executor, on real Ray clusters of this machine: same records, same bits, same failures."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.engine.driver import Report, SilentReporter, run_plan
from methodbench.engine.slots import Needs
from methodbench.errors import MethodbenchError
from methodbench.store import Store, open_store
from methodbench.suite import Suite

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def node_options() -> dict[str, Any]:
    # With ports that are given, a node does not wait for its agents, which a busy machine starts slowly.
    ports = (
        "metrics_agent_port",
        "metrics_export_port",
        "dashboard_agent_listen_port",
        "runtime_env_agent_port",
    )
    return {"object_store_memory": 100 * 2**20, **{name: free_port() for name in ports}}


def started(cluster: Any) -> Any:
    for attempt in range(3):
        made = cluster()
        try:
            made.add_node(num_cpus=0, include_dashboard=False, **node_options())
            made.add_node(num_cpus=2, **node_options())
            return made
        except Exception:
            # Ray gives its own processes a fixed time to come up, which a busy machine exceeds.
            made.shutdown()
            if attempt == 2:
                raise
    return None


@pytest.fixture(scope="module")
def shared_cluster(shared_cache: Path) -> Iterator[Any]:
    """A cluster of a head without cores and one node with two."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        plugins = str(Path(__file__).resolve().parent.parent / "plugins")
        patch.setenv("PYTHONPATH", os.pathsep.join([plugins, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("METHODBENCH_CACHE", str(shared_cache))
        patch.setenv("RAY_enable_metrics_collection", "0")
        made = started(Cluster)
        yield made
        made.shutdown()


@pytest.fixture
def cluster(shared_cluster: Any, catalog: Catalog) -> Iterator[Any]:
    """The cluster, with this process connected to it."""
    ray.init(address=shared_cluster.address, log_to_driver=False, logging_level="ERROR")
    yield shared_cluster
    ray.shutdown()


def suite(*methods: Any, tasks: Any = ("toy-value",), **more: Any) -> Suite:
    grid = {"methods": list(methods), "tasks": list(tasks), "timeout": 60, **more}
    return Suite.model_validate({"name": "t", "comparisons": [grid]})


def run(store: Store, catalog: Catalog, wanted: Suite | str, executor: str = "ray", **options: Any) -> Report:
    return run_plan(
        api.plan([wanted], catalog=catalog), store, catalog, executor=executor, cores=2, **options
    )


def scores(store: Store, report: Report) -> dict[tuple[str, str], bytes]:
    keys = {run.id: run.cell_key for run in report.runs.values()}
    return {(keys[row.run_id], row.name): row.scores for row in store.metrics(keys)}


def test_a_suite_on_ray_has_the_bits_of_the_local_executor(
    cluster: Any, catalog: Catalog, tmp_path: Path
) -> None:
    found = []
    for executor in ("local", "ray"):
        with open_store(str(tmp_path / f"{executor}.db")) as store:
            report = run(store, catalog, "toy-suite", executor)
            assert report.complete
            assert len(report.new) == 12
            found.append(scores(store, report))
            assert run(store, catalog, "toy-suite", executor).new == []
    assert found[0] == found[1]


def test_cells_end_badly_on_ray_as_they_do_here(cluster: Any, catalog: Catalog, store: Store) -> None:
    ways = ["raise", "segfault", "kill", "exit", "hang", "hog-family"]
    wanted = suite({"name": "misbehave", "grid": {"how": ways}}, "noop", timeout=20)
    report = run(store, catalog, wanted, memory_limit=900 * 2**20)
    ends = {run.variant: (run.status, run.reason.partition(",")[0]) for run in report.runs.values()}
    oom = ends.pop("how=hog-family")
    assert oom[0] == "oom"
    assert ends == {
        "how=raise": ("failed", "RuntimeError: the toy broke"),
        "how=segfault": ("failed", "killed by SIGSEGV"),
        "how=kill": ("failed", "killed by SIGKILL"),
        "how=exit": ("failed", "the worker left with exit code 3 before it had a result"),
        "how=hang": ("timeout", "took more than 20 s"),
        "": ("ok", ""),
    }
    (environment,) = {run.environment_digest for run in report.runs.values() if run.status == "ok"}
    assert environment in store.environments()


def test_a_node_that_is_killed_costs_no_cell(cluster: Any, catalog: Catalog, store: Store) -> None:
    doomed = cluster.add_node(num_cpus=2, **node_options())
    wanted = suite({"name": "sleeper", "grid": {"value": [i / 10 for i in range(24)]}})

    class Kill(SilentReporter):
        count = 0

        def finished(self, cell: Any, run: Any, metrics: Any) -> None:
            self.count += 1
            if self.count == 4:
                cluster.remove_node(doomed, allow_graceful=False)

    report = run(store, catalog, wanted, reporter=Kill())
    assert report.complete, [run.reason for run in store.runs() if run.status != "ok"]
    assert len(report.new) == 24
    assert len({run.cell_key for run in store.runs()}) == len(store.runs()) == 24


def test_a_ray_process_that_is_killed_costs_no_cell_and_leaves_nobody(
    cluster: Any, catalog: Catalog, store: Store
) -> None:
    def hosts() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["name", "cmdline"]):
            if "run_job" in " ".join(process.info["cmdline"] or []):
                found.append(process)
        return found

    killed = []

    def kill() -> None:
        for _ in range(400):
            if running := hosts():
                time.sleep(1.0)
                killed.extend(process.pid for process in running)
                for process in running:
                    process.kill()
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    wanted = suite({"name": "sleeper", "grid": {"value": [i / 10 for i in range(12)]}})
    report = run(store, catalog, wanted)
    killer.join()
    assert killed
    assert report.complete
    assert len(store.runs()) == 12


def test_ctrl_c_on_ray_ends_the_workers_and_the_next_run_goes_on(
    cluster: Any, catalog: Catalog, store: Store
) -> None:
    class Interrupt(SilentReporter):
        def finished(self, cell: Any, run: Any, metrics: Any) -> None:
            raise KeyboardInterrupt

    wanted = suite({"name": "sleeper", "grid": {"value": [1, 2, 3, 4, 5, 6]}})
    with pytest.raises(KeyboardInterrupt):
        run(store, catalog, wanted, reporter=Interrupt())
    done = len(store.runs())
    assert 1 <= done < 6
    deadline = time.monotonic() + 15
    while any("methodbench.engine.forkserver" in " ".join(p.info["cmdline"] or []) and
              p.ppid() == 1 for p in psutil.process_iter(["cmdline"])):  # fmt: skip
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(run(store, catalog, wanted).new) == 6 - done


def test_needs_become_resources(cluster: Any, catalog: Catalog, store: Store) -> None:
    from methodbench.builtin.ray_executor import RayExecutor
    from methodbench.engine.executors import ExecutorOptions

    executor = RayExecutor(ExecutorOptions(cores=2))
    assert executor.lacking(Needs(1)) == ""
    assert executor.lacking(Needs(1, gpus=2, device="cuda")) == "no node of the Ray cluster has 2 GPUs"
    assert "names a GPU of one machine" in executor.lacking(Needs(1, gpus=1, device="cuda:0"))
    assert executor.lacking(Needs(1, memory=2**60)).startswith(
        "no node of the Ray cluster has 1073741824.0 GiB"
    )
    cluster.add_node(num_cpus=1, num_gpus=2, **node_options())
    report = run(
        store, catalog, suite({"name": "misbehave", "params": {"how": "environment"}}, device="cuda")
    )
    (record,) = report.runs.values()
    assert record.status == "ok"
    (value,) = [row.value for row in store.metrics() if row.primary]
    assert value == pytest.approx(0, abs=0.02)


def test_without_an_address_a_cluster_is_started_and_stopped(catalog: Catalog, store: Store) -> None:
    report = run(store, catalog, suite({"name": "noop", "grid": {"value": [1, 2, 3]}}))
    assert report.complete
    assert not ray.is_initialized()


def test_an_address_where_nobody_answers_is_an_error_of_the_user(catalog: Catalog, store: Store) -> None:
    with pytest.raises(MethodbenchError, match=r"no Ray cluster answers at ray://127\.0\.0\.1:1"):
        run(store, catalog, suite("noop"), address="ray://127.0.0.1:1")
    with pytest.raises(MethodbenchError, match="takes no address"):
        run(store, catalog, suite("noop"), "local", address="127.0.0.1:6379")
