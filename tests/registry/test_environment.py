"""The environment of a run: what it computed with, once per digest, and nothing that is nobody's business."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from methodbench import api, provenance
from methodbench.catalog import Catalog
from methodbench.engine.driver import Report, run_plan
from methodbench.store import Store


def run(store: Store, catalog: Catalog, *methods: Any, **more: Any) -> Report:
    comparison = {"methods": list(methods), "timeout": 60, **more}
    plan = api.plan({"name": "t", "comparisons": [comparison]}, catalog=catalog)
    return run_plan(plan, store, catalog, cores=2)


def test_a_record_says_what_its_worker_computed_with(store: Store, catalog: Catalog) -> None:
    report = run(store, catalog, "scale", models=["toy-linear"], tasks=["toy-norm"])
    (record,) = report.runs.values()
    data = store.environments()[record.environment_digest].data
    assert data["torch"]["threads"] == record.threads == 1
    assert data["torch"]["deterministic_algorithms"] == "warn"
    assert data["torch"]["libraries"]
    assert data["variables"]["OMP_NUM_THREADS"] == "1"
    assert data["variables"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert data["numpy_blas"]
    assert data.keys() >= {
        "python",
        "packages",
        "processor",
        "cores",
        "memory_bytes",
        "accelerators",
        "commit",
    }
    assert provenance.digest(data) == record.environment_digest


def test_runs_of_one_environment_share_it_and_another_thread_count_is_another(
    store: Store, catalog: Catalog
) -> None:
    grid = {"name": "noop", "grid": {"value": [1, 2, 3]}}
    same = run(store, catalog, grid, tasks=["toy-value"])
    assert len({record.environment_digest for record in same.runs.values()}) == len(store.environments()) == 1
    other = run(store, catalog, "noop", tasks=["toy-value"], threads=2)
    (record,) = other.runs.values()
    assert store.environments()[record.environment_digest].data["variables"]["OMP_NUM_THREADS"] == "2"
    assert len(store.environments()) == 2


def test_secrets_in_the_environment_are_not_recorded(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "OMP_SECRET"):
        monkeypatch.setenv(name, "hunter2-in-the-clear")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    run(store, catalog, {"name": "misbehave", "params": {"how": "kill"}}, "noop", tasks=["toy-value"])
    stored = [json.dumps(row.data) for row in store.environments().values()]
    assert not any("hunter2" in text for text in stored)
    assert any("COMPATIBLE" in text for text in stored)


def test_a_checkout_is_named_by_its_commit_and_by_what_was_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    module = tmp_path / "registry" / "methodbench" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("a\n")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance._commit() == {}
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert provenance._commit() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    changes = set()
    for text in ("b\n", "c\n"):
        module.write_text(text)
        found = provenance._commit()
        assert found["dirty"] is True
        changes.add(found["changes"])
    assert len(changes) == 2


def test_the_weights_that_a_method_made_are_marked(store: Store, catalog: Catalog) -> None:
    methods = ["identity", {"name": "scale", "grid": {"factor": [0.5, 0.25]}}]
    report = run(store, catalog, *methods, models=["toy-linear"], tasks=["toy-norm"])
    marks = {record.variant: store.fingerprint(record.id) for record in report.runs.values()}
    assert [(mark["what"], mark["at"]) for mark in marks["factor=0.5"]] == [
        ("calibration", ""),
        ("weights", "0"),
    ]
    assert [(mark["what"], mark["at"]) for mark in marks[""]] == [("weights", "0")]
    half, quarter = marks["factor=0.5"][1], marks["factor=0.25"][1]
    assert half["shape"] == quarter["shape"] == [16]
    assert half["std"] == pytest.approx(2 * quarter["std"], rel=1e-5)
    assert half["digest"] != quarter["digest"]
