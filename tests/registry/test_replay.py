"""Replay and diff: a record is repeated from itself alone, and what changed since is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.engine import parting
from methodbench.engine.driver import run_plan
from methodbench.engine.replay import replay
from methodbench.errors import MethodbenchError
from methodbench.store import Run, Store

Changing = Callable[..., Catalog]
VARIABLE = "MKL_CBWR"


def run(store: Store, catalog: Catalog, *methods: Any, **more: Any) -> list[Run]:
    comparison = {"methods": list(methods), "tasks": ["toy-value"], "timeout": 60, **more}
    plan = api.plan({"name": "t", "comparisons": [comparison]}, catalog=catalog)
    report = run_plan(plan, store, catalog, cores=2)
    assert report.complete, [run.reason for run in report.failed]
    return [report.runs[cell.key] for cell in plan.cells]


def nudged(store: Store, catalog: Catalog, *methods: Any) -> list[Run]:
    return run(store, catalog, *methods, models=["chain"], tasks=["chain-mean"])


def nudge(**params: Any) -> dict[str, Any]:
    return {"name": "nudge", "params": params}


def test_replay_of_a_run_is_bit_identical(store: Store, changing: Catalog) -> None:
    (record,) = nudged(store, changing, nudge(block=1, by=0.5))
    found = replay(record, store, changing)
    assert found.verdict == "bit-identical"
    assert (found.parting, found.scores, found.suspects) == (None, [], [])
    assert found.compared == {"marks": 8, "steps": 0, "units": 5}
    (with_curve,) = run(store, changing, {"name": "constant", "params": {"value": 3}})
    assert replay(with_curve, store, changing).compared == {"marks": 0, "steps": 5, "units": 8}


def test_a_replay_is_kept_as_a_witness_that_never_takes_the_place_of_the_run(
    store: Store, changing: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = nudged(store, changing, nudge(block=1, by=0.5))
    before = store.frame()
    monkeypatch.setenv(VARIABLE, "0.25")
    found = replay(record, store, changing)
    assert store.frame().equals(before)
    assert store.latest([record.cell_key])[record.cell_key].id == record.id
    (witness,) = store.witnesses(record.id)
    assert (witness.run_id, witness.verdict) == (found.witness.id, "drifted")
    assert witness.parts_at == "weights of 1"
    assert {"field": f"variables.{VARIABLE}", "recorded": None, "replayed": "0.25"} in witness.suspects
    again = store.run(witness.run_id)
    assert again.witness_of == record.id
    assert again.environment_digest in store.environments()
    assert len(store.fingerprint(again.id)) == 8
    assert store.metrics([again.id])[0].unit_scores().shape == (5,)


def test_replay_names_the_environment_difference(
    store: Store, changing: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = run(store, changing, "constant")
    monkeypatch.setenv(VARIABLE, "0.5")
    drifted = replay(record, store, changing)
    assert drifted.verdict == "drifted"
    assert [(field.name, field.recorded, field.wanted) for field in drifted.suspects] == [
        (f"variables.{VARIABLE}", None, "0.5")
    ]
    assert {change.metric for change in drifted.scores} == {"value", "square"}
    monkeypatch.setenv(VARIABLE, "1e-6")
    assert replay(record, store, changing).verdict == "within tolerance"
    assert replay(record, store, changing, tolerance=1e-9).verdict == "drifted"
    assert [witness.verdict for witness in store.witnesses(record.id)] == [
        "drifted",
        "within tolerance",
        "drifted",
    ]


def test_a_replay_that_fails_has_drifted(
    store: Store, changing: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = run(store, changing, "constant")
    monkeypatch.setenv(VARIABLE, "crash")
    found = replay(record, store, changing)
    assert found.verdict == "drifted"
    assert (found.witness.status, found.witness.reason) == ("failed", "RuntimeError: not on this machine")


def test_replay_takes_the_settings_of_the_record_even_when_a_default_has_changed(
    store: Store, changing: Catalog, edit: Callable[[str, str, str], None]
) -> None:
    (record,) = run(store, changing, "constant")
    edit("methods.py", "value: float = 1.0", "value: float = 2.0")
    found = replay(record, store, changing)
    assert found.verdict == "bit-identical"
    assert [field.name for field in found.suspects] == ["method_digest"]
    assert found.witness.params == {"value": 1.0}


def test_replay_of_what_has_no_result_or_no_method_says_so(store: Store, catalog: Catalog) -> None:
    plan = api.plan(
        {"name": "t", "comparisons": [{"methods": ["misbehave"], "tasks": ["toy-value"]}]}, catalog=catalog
    )
    (record,) = run_plan(plan, store, catalog, cores=2).runs.values()
    with pytest.raises(MethodbenchError, match="no result to compare with"):
        replay(record, store, catalog)
    record.status, record.method = "ok", "gone"
    with pytest.raises(MethodbenchError, match="unknown method 'gone'"):
        replay(record, store, catalog)


def test_a_cell_gives_the_same_bits_alone_as_behind_others_in_one_worker(
    store: Store, changing: Catalog
) -> None:
    """The second task of a job finds the model loaded and compressed; its random numbers are the same all the same."""
    tasks = [
        "chain-mean",
        {"name": "chain-mean", "params": {}},
        {"name": "chain-mean", "params": {"rows": 6}},
    ]
    for record in run(store, changing, nudge(by=0.5), models=["chain"], tasks=tasks):
        assert replay(record, store, changing).verdict == "bit-identical"


def test_diff_names_the_first_block_that_parts(store: Store, changing: Catalog) -> None:
    same, weights, output = nudged(
        store, changing, nudge(by=0.0), nudge(block=2, by=0.5), nudge(block=1, by=0.5, where="output")
    )
    one, two, three = (parting.recorded(store, record) for record in (same, weights, output))
    assert str(parting.first_parting(one, two)) == "weights of 2"
    assert str(parting.first_parting(one, three)) == "output of 1"
    assert str(parting.first_parting(two, one)) == "weights of 2"
    assert parting.first_parting(one, one) is None
    settings = {field.name: (field.recorded, field.wanted) for field in parting.setting_changes(one, two)}
    assert settings == {"method_params.block": (0, 2), "method_params.by": (0.0, 0.5)}
    (change,) = parting.score_changes(one, two)
    assert (change.metric, change.units, change.of) == ("mean", 5, 5)


def test_diff_names_the_first_step_that_parts(store: Store, changing: Catalog) -> None:
    three, four = run(store, changing, {"name": "constant", "grid": {"value": [3, 4]}})
    found = parting.first_parting(parting.recorded(store, three), parting.recorded(store, four))
    assert found is not None
    # Both curves begin at 0 and rise to the value in five points.
    assert (found.what, found.at, found.index) == ("step", "curve", 1)
    assert (found.first, found.second) == ({"value": 0.75}, {"value": 1.0})


def test_replay_and_diff_on_the_command_line(
    store: Store, changing: Catalog, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = nudged(store, changing, nudge(block=1, by=0.5))
    db = ("--db", store.url)
    code, out, _ = cli("replay", record.id, *db)
    assert code == 0
    assert "bit-identical: 8 marks, 5 units agree in every bit." in out
    monkeypatch.setenv(VARIABLE, "0.25")
    code, out, _ = cli("replay", record.id, *db)
    assert code == 1
    assert "The two part at weights of 1." in out
    assert f"variables.{VARIABLE}" in out
    code, out, _ = cli("replay", record.id, "--json", *db)
    answer = json.loads(out)
    assert (code, answer["verdict"], answer["parts_at"]["at"]) == (1, "drifted", "1")
    code, out, _ = cli("diff", record.id, answer["witness"], *db)
    assert code == 0
    assert f"witness of {record.id}" in out
    assert "They part at weights of 1." in out
    assert "environment" in out
    code, out, _ = cli("diff", record.id, record.id, "--json", *db)
    assert json.loads(out)["parts_at"] is None
    code, out, _ = cli("diff", record.id, record.id, *db)
    assert "No difference in 8 marks, 5 units." in out
    shown = json.loads(cli("show", record.id, "--json", *db)[1])
    assert [witness["verdict"] for witness in shown["witnesses"]] == ["bit-identical", "drifted", "drifted"]
    assert "witnesses" in cli("show", record.id, *db)[1]
    assert cli("replay", "ffff", *db)[0] == 2
    assert Path(store.url).exists()
