"""Identity: what makes a cell another one, and what happens to records when it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.engine.cell import Cell
from methodbench.engine.driver import run_plan
from methodbench.engine.why import explain, explain_run, stale_runs
from methodbench.entries import EntryError, Metric, Task
from methodbench.provenance import digest
from methodbench.store import Run, Store
from methodbench.suite import Suite

Cli = Callable[..., tuple[int, str, str]]
Edit = Callable[[str, str, str], None]


def plan(catalog: Catalog, *methods: Any, tasks: Any = ("toy-value",), **more: Any) -> list[Cell]:
    comparison = {"methods": list(methods), "tasks": list(tasks), **more}
    wanted = Suite.model_validate({"name": "t", "comparisons": [comparison]})
    return api.plan(wanted, catalog=catalog).cells


def test_the_key_is_the_digest_of_the_identity_and_of_nothing_else(catalog: Catalog) -> None:
    (cell,) = plan(catalog, "noop")
    assert cell.key == digest(cell.identity())
    assert json.loads(json.dumps(cell.identity())) == cell.identity()
    (slower,) = plan(catalog, "noop", timeout=5.0)
    assert slower.key == cell.key


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("threads", {"threads": 3}),
        ("seed", {"seeds": [1]}),
        ("dtype", {"dtype": "float64"}),
        ("device_class", {"device": "cuda:1"}),
        ("task_params", {"tasks": [{"name": "toy-value", "params": {"units": 5}}]}),
    ],
)
def test_each_setting_makes_another_cell_and_shows_in_its_own_field(
    catalog: Catalog, field: str, asked: dict[str, Any]
) -> None:
    (one,), (other,) = plan(catalog, "noop"), plan(catalog, "noop", **asked)
    differing = {name for name, value in one.identity().items() if other.identity()[name] != value}
    assert differing == {field}
    assert one.key != other.key


def test_a_cells_threads_are_its_tasks_and_do_not_depend_on_the_machine(catalog: Catalog) -> None:
    (cell,) = plan(catalog, "noop")
    assert cell.threads == catalog.task("toy-value").threads == 1
    assert "--threads" not in cell.command()
    (wider,) = plan(catalog, "noop", threads=3)
    assert "--threads 3" in wider.command()


def test_a_task_cannot_ask_for_all_cores_of_whatever_machine_it_runs_on() -> None:
    metric = Metric(name="value", direction="higher", primary=True)
    with pytest.raises(EntryError, match="threads 0 must be 1 or more"):
        Task(name="t", kinds=("probe",), impl="a.b:C", summary="", metrics=(metric,), protocol=1, threads=0)


def run(store: Store, catalog: Catalog, *methods: Any, **more: Any) -> list[Run]:
    comparison = {"methods": list(methods), "tasks": ["toy-value"], "timeout": 60, **more}
    made = api.plan({"name": "t", "comparisons": [comparison]}, catalog=catalog)
    report = run_plan(made, store, catalog, cores=2)
    return [report.runs[cell.key] for cell in made.cells]


def test_a_changed_default_makes_old_records_stale(
    store: Store, changing: Catalog, edit: Edit, cli: Cli, tmp_path: Path
) -> None:
    db = ("--db", store.url)
    (old,) = run(store, changing, "constant")
    assert stale_runs(store, changing) == {}
    assert explain_run(old, store, changing).verdict == "hit"
    edit("methods.py", "value: float = 1.0", "value: float = 2.0")

    # Shown as such,
    assert stale_runs(store, changing) == {old.id: "the method's source changed"}
    assert json.loads(cli("status", "--json", *db)[1])["suites"] == {"t": {"stale": 1}}
    rows = json.loads(cli("results", "--json", *db)[1])
    assert all(row["stale"] for row in rows)
    assert "stale: the method's source changed" in cli("results", *db)[1]
    assert "stale" in cli("show", old.id, *db)[1]
    _, out, _ = cli("plan", "--method", "constant", "--task", "toy-value", *db)
    assert "1 to run (1 of them have stale records: see `why`)" in out
    site = api.build_site(tmp_path / "site", db=store.url, catalog=changing).parent
    (data,) = [json.loads(path.read_text()) for path in site.rglob("*.json")]
    assert [entry["stale"] for entry in data["runs"]] == list(stale_runs(store, changing).values())
    assert (
        "Since this run was made: the method&#39;s source changed."
        in (site / "runs" / f"{old.id}.html").read_text()
    )

    # explained,
    answer = explain_run(old, store, changing)
    assert answer.verdict == "stale"
    changed = {field.name: (field.recorded, field.wanted) for field in answer.fields if not field.same}
    assert changed.keys() == {"method_digest", "method_params.value"}
    assert changed["method_params.value"] == (1.0, 2.0)
    (cell,) = plan(changing, "constant")
    assert explain(cell, store).verdict == "stale"
    assert explain(cell, store).record.id == old.id

    # never reused, and never deleted.
    (new,) = run(store, changing, "constant")
    assert new.id != old.id
    assert new.params == {"value": 2.0}
    assert [record.id for record in store.runs()] == [old.id, new.id]
    assert explain(cell, store).verdict == "hit"
    assert stale_runs(store, changing).keys() == {old.id}
    assert json.loads(cli("status", "--json", *db)[1])["suites"] == {"t": {"ok": 1, "stale": 1}}


def test_source_put_back_makes_old_records_hold_again(store: Store, changing: Catalog, edit: Edit) -> None:
    (old,) = run(store, changing, "constant")
    edit("methods.py", "Returns its value", "Gives its value")
    assert stale_runs(store, changing).keys() == {old.id}
    edit("methods.py", "Gives its value", "Returns its value")
    assert stale_runs(store, changing) == {}
    (same,) = run(store, changing, "constant")
    assert same.id == old.id


def test_each_part_that_nobody_asks_for_makes_records_stale_and_is_named(
    store: Store, changing: Catalog
) -> None:
    (record,) = run(store, changing, {"name": "nudge"}, models=["chain"], tasks=["chain-mean"])
    assert stale_runs(store, changing) == {}
    fields = {
        "protocol": (9, "the task's protocol changed"),
        "weights_digest": ("f" * 64, "the weights or their loader changed"),
        "data_digest": ("f" * 64, "the data changed"),
        "method_digest": ("f" * 64, "the method's source changed"),
    }
    for number, (name, (value, _)) in enumerate(fields.items()):
        changed = {**record.model_dump(), "id": f"{number:012x}", name: value}
        store.add(Run(**changed))
    stale = stale_runs(store, changing)
    assert record.id not in stale
    for number, (_, words) in enumerate(fields.values()):
        assert words in stale[f"{number:012x}"]
    older = {**record.model_dump(), "id": "e" * 12, "identity": {**record.identity, "version": 1}}
    store.add(Run(**older))
    assert stale_runs(store, changing)["e" * 12] == "the form of identities changed"


def test_what_is_not_installed_any_more_is_not_called_stale(store: Store, changing: Catalog) -> None:
    (record,) = run(store, changing, "constant")
    gone = {**record.model_dump(), "id": "f" * 12, "method": "departed"}
    store.add(Run(**gone))
    assert stale_runs(store, changing) == {}
    answer = explain_run(store.run("f" * 12), store, changing)
    assert (answer.verdict, answer.key) == ("gone", "")
    assert "unknown method 'departed'" in answer.reason


def test_why_explains_hit_miss_and_stale(store: Store, changing: Catalog, edit: Edit, cli: Cli) -> None:
    db = ("--db", store.url)
    (old,) = run(store, changing, {"name": "constant", "params": {"value": 3}})
    code, out, _ = cli("why", old.id, *db)
    assert code == 0
    assert "hit: it is ok and counts." in out
    assert "method_params.value" in out
    assert cli("why", old.cell_key[:16], *db)[1] == out
    options = ("--method", "constant", "--task", "toy-value")
    code, out, _ = cli("why", *options, "--param", "value=4", *db)
    assert f"miss: never asked for; run {old.id} is nearest, 1 field away." in out
    (answer,) = json.loads(cli("why", *options, "--param", "value=4", "--seed", "1", "--json", *db)[1])
    assert answer["verdict"] == "miss"
    assert {field["name"] for field in answer["fields"] if not field["same"]} == {
        "method_params.value",
        "seed",
    }
    edit("methods.py", "Returns its value", "Gives its value")
    (answer,) = json.loads(cli("why", *options, "--param", "value=3", "--json", *db)[1])
    assert (answer["verdict"], answer["run"]) == ("stale", old.id)
    assert [field["name"] for field in answer["fields"] if not field["same"]] == ["method_digest"]
    code, out, _ = cli("why", "--method", "constant", "--method", "noop", "--task", "toy-value", *db)
    assert out.splitlines()[-1] == "2 miss."
    assert cli("why", "ffffffff", *db)[0] == 2
    assert cli("why", "no-such-suite", *db)[0] == 2


def test_a_failed_record_is_a_hit_that_retry_runs_again(store: Store, changing: Catalog) -> None:
    (record,) = run(store, changing, {"name": "misbehave"})
    (cell,) = plan(changing, "misbehave")
    assert explain(cell, store).reason == f"run {record.id} is failed; --retry runs it again"


def test_records_of_schema_0001_are_stale_and_say_that_threads_are_why(
    store: Store, changing: Catalog
) -> None:
    (record,) = run(store, changing, "constant")
    identity = {name: value for name, value in record.identity.items() if name != "threads"} | {"version": 1}
    old = {
        **record.model_dump(),
        "id": "a" * 12,
        "identity": identity,
        "cell_key": digest(identity),
        "task_passed": None,
    }
    store.add(Run(**old))
    answer = explain_run(store.run("a" * 12), store, changing)
    assert answer.verdict == "stale"
    assert {field.name for field in answer.fields if not field.same} == {"version", "threads"}


def test_a_source_that_changes_while_the_plan_runs_is_not_recorded_under_its_old_identity(
    changing: Catalog, edit: Edit, store: Store
) -> None:
    comparison = {"methods": ["constant"], "tasks": ["toy-value"], "timeout": 60}
    suite = {"name": "t", "comparisons": [comparison]}
    made = api.plan(suite, catalog=changing)
    edit("methods.py", "value: float = 1.0", "value: float = 2.0")
    report = run_plan(made, store, changing, cores=1)
    assert [run.reason for run in report.failed] == [
        "the source of constant was changed while the plan ran; run the same command again"
    ]
    again = run_plan(api.plan(suite, catalog=changing), store, changing, cores=1)
    assert again.complete
    assert again.runs.keys().isdisjoint(report.runs)
