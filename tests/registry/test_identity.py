"""Identity: what makes a cell another one, and what happens to records when it does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.engine.cell import Cell
from methodbench.entries import EntryError, Metric, Task
from methodbench.provenance import digest
from methodbench.suite import Suite


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
