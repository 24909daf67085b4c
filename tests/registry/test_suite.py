"""Suites: what they expand to, and how mistakes in them are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.engine import plan as plan_module
from methodbench.engine.plan import make_plan
from methodbench.engine.probe import Question
from methodbench.errors import MissingExtraError, ParameterError, SuiteError, UnknownNameError
from methodbench.suite import Suite, load_suite, parse_suite

GOOD = """\
name: example
comparisons:
  - models: [a]
    tasks: [t]
    methods:
      - identity
      - {name: rtn, presets: [w4], grid: {bits: [3]}}
"""


@pytest.mark.parametrize(
    ("text", "filename", "message"),
    [
        (
            GOOD.replace("grid", "gird"), "s.yaml",
            r"s.yaml:7: comparisons.0.methods.1.gird: unknown key 'gird'\nDid you mean grid\?",
        ),
        (GOOD.replace("tasks", "task"), "s.yaml", "s.yaml:"),
        ("name: [", "s.yaml", "s.yaml:1: not valid YAML"),
        ("- a", "s.yaml", "a suite is a mapping"),
        ("name: example\n", "s.yaml", "the key 'comparisons' is missing"),
        (GOOD + "    seeds: [-1]\n", "s.yaml", "s.yaml:8: comparisons.0.seeds.0: Input should be greater"),
        (GOOD + f"    seeds: [{2**63}]\n", "s.yaml", "s.yaml:8: comparisons.0.seeds.0: Input should be less"),
        (GOOD.replace("name: example", "name: Bad Name"), "s.yaml", "s.yaml:1: name"),
        (
            'name = "x"\n[[comparisons]]\ntasks = ["a"]\nmethods = ["b"]\nseedz = [1]\n', "s.toml",
            "s.toml:5: comparisons.0.seedz",
        ),
        ("name = \n", "s.toml", "s.toml:1: not valid TOML"),
        ("!!python/object/apply:os.system ['true']", "s.yaml", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_names_file_line_and_key(text: str, filename: str, message: str) -> None:
    with pytest.raises(SuiteError) as caught:
        parse_suite(text, filename)
    import re

    assert re.search(message, str(caught.value)), str(caught.value)


def test_yaml_and_toml_say_the_same() -> None:
    toml = """
name = "example"
[[comparisons]]
models = ["a"]
tasks = ["t"]
methods = ["identity", {name = "rtn", presets = ["w4"], grid = {bits = [3]}}]
"""
    assert parse_suite(GOOD, "s.yaml") == parse_suite(toml, "s.toml")


def test_a_missing_file_and_an_unknown_suite_are_told_apart(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no suite file"):
        load_suite(tmp_path / "absent.yaml", catalog)
    with pytest.raises(UnknownNameError, match="Did you mean toy-suite"):
        load_suite("toy-siute", catalog)


def plan_of(catalog: Catalog, **comparison: object) -> list[str]:
    suite = Suite.model_validate({"name": "s", "comparisons": [comparison]})
    return [cell.label for cell in make_plan(suite, catalog).cells]


def test_each_setting_is_asked_about_once(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many cells share a task, its settings are one question."""
    asked: list[int] = []
    resolve = plan_module.resolve_all

    def count(questions: Sequence[Question]) -> object:
        asked.append(len(questions))
        return resolve(questions)

    monkeypatch.setattr(plan_module, "resolve_all", count)
    grid = {"value": [index / 40 for index in range(40)]}
    labels = plan_of(catalog, methods=[{"name": "noop", "grid": grid}], tasks=["toy-value"], seeds=[0, 1, 2])
    assert len(labels) == 120
    assert asked == [41]


def test_presets_params_and_grids_multiply(catalog: Catalog) -> None:
    methods = [
        {"name": "noop", "presets": ["twice"]},
        {"name": "misbehave", "params": {"note": "x"}, "grid": {"how": ["raise", "hang"]}},
    ]
    assert plan_of(catalog, methods=methods, tasks=["toy-value"], seeds=[0, 1]) == [
        "noop (twice) · toy-value · seed 0",
        "noop (twice) · toy-value · seed 1",
        "misbehave (note=x, how=raise) · toy-value · seed 0",
        "misbehave (note=x, how=raise) · toy-value · seed 1",
        "misbehave (note=x, how=hang) · toy-value · seed 0",
        "misbehave (note=x, how=hang) · toy-value · seed 1",
    ]


def test_equal_cells_appear_once_and_patterns_leave_cells_out(catalog: Catalog) -> None:
    twice = ["noop", {"name": "noop", "params": {"value": 1.0}}]
    assert len(plan_of(catalog, methods=twice, tasks=["toy-value"])) == 1
    grid = [{"name": "noop", "grid": {"value": [1, 2, 3]}}]
    kept = plan_of(catalog, methods=grid, tasks=["toy-value"], exclude=[{"variant": "value=2"}])
    assert [label.split(" · ")[0] for label in kept] == ["noop (value=1)", "noop (value=3)"]
    only = plan_of(
        catalog, methods=grid, tasks=["toy-value"], include=[{"method": "no*", "variant": "value=2"}]
    )
    assert [label.split(" · ")[0] for label in only] == ["noop (value=2)"]


def test_what_does_not_fit_is_skipped_with_the_reason(catalog: Catalog) -> None:
    suite = Suite.model_validate(
        {
            "name": "s",
            "comparisons": [
                {
                    "methods": ["noop", "scale"],
                    "models": ["toy-linear", "toy-file"],
                    "tasks": ["toy-value", "toy-norm"],
                }
            ],
        }
    )
    plan = make_plan(suite, catalog)
    assert [cell.label for cell in plan.cells] == [
        "noop · toy-value · seed 0",
        "scale · toy-linear · toy-norm · seed 0",
    ]
    reasons = {(skip.method, skip.model, skip.task): skip.reason for skip in plan.skips}
    assert (
        reasons["scale", "", "toy-value"] == "task toy-value evaluates probe methods, scale is a compressor"
    )
    assert (
        reasons["noop", "toy-linear", "toy-norm"]
        == "task toy-norm evaluates compressor methods, noop is a probe"
    )
    assert "METHODBENCH_MODELS" in reasons["scale", "toy-file", "toy-norm"]


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        ("nop", UnknownNameError, "unknown method 'nop'\nDid you mean noop?"),
        ("noop@thrice", UnknownNameError, "unknown preset of noop 'thrice'\nDid you mean twice?"),
        ({"name": "noop", "params": {"valeu": 1}}, ParameterError, "no parameter 'valeu'\nDid you mean value?"),
        (
            {"name": "noop", "params": {"value": 11}}, ParameterError,
            "noop: value = 11 is not valid: Input should be less than or equal to 10",
        ),
        ({"name": "noop", "params": {"value": "many"}}, ParameterError, "noop: value = 'many' is not valid"),
        ("needs-absent-module", Exception, "cannot import toybench.methods:Absent"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_method_is_told_before_anything_runs(
    catalog: Catalog, use: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        plan_of(catalog, methods=[use], tasks=["toy-value"])
    assert message in str(caught.value)


def test_a_missing_extra_names_the_install_line(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "methodbench.engine.plan.missing_requirements",
        lambda distribution, extra: ("torch",) if extra else (),
    )
    monkeypatch.setattr(type(catalog), "distribution", lambda self, kind, name: "toy-dist")
    with pytest.raises(MissingExtraError, match=r"pip install 'toy-dist\[absent\]'"):
        plan_of(catalog, methods=["needs-extra"], tasks=["toy-value"])


def test_tasks_are_found_by_qualified_name(catalog: Catalog) -> None:
    assert plan_of(catalog, methods=["noop"], tasks=["toy:7"]) == ["noop · toy:7 · seed 0"]
    with pytest.raises(UnknownNameError):
        plan_of(catalog, methods=["noop"], tasks=["other:7"])


def test_the_key_depends_on_every_part_of_the_identity_and_on_nothing_else(catalog: Catalog) -> None:
    def key(**changes: object) -> str:
        comparison = {"methods": ["noop"], "tasks": ["toy-value"], "seeds": [0], **changes}
        return (
            make_plan(Suite.model_validate({"name": "s", "comparisons": [comparison]}), catalog).cells[0].key
        )

    base = key()
    assert base == key(timeout=7, title="other words")
    assert base == key(methods=[{"name": "noop", "params": {"value": 1.0}}])
    others = [
        key(methods=[{"name": "noop", "params": {"value": 2}}]),
        key(tasks=[{"name": "toy-value", "params": {"units": 5}}]),
        key(seeds=[1]),
        key(dtype="float64"),
        key(device="cuda"),
        key(methods=["misbehave"]),
    ]
    assert len({base, *others}) == 7
    assert key(device="cuda:1") == key(device="cuda")


def test_planning_twice_imports_nothing_the_second_time(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.plan("toy-suite", catalog=catalog)
    monkeypatch.setattr("methodbench.engine.probe._child", lambda requests: pytest.fail("asked again"))
    assert len(api.plan("toy-suite", catalog=catalog).cells) == 12


def test_what_was_planned_is_described_without_another_import(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from methodbench.engine.probe import describe, describe_all

    monkeypatch.setenv("METHODBENCH_CACHE", str(tmp_path))
    implementations = {name: catalog.method(name).impl for name in ("noop", "scale")}
    expected = describe_all(implementations)
    monkeypatch.setenv("METHODBENCH_CACHE", str(tmp_path / "fresh"))
    api.plan("toy-suite", catalog=catalog)
    monkeypatch.setattr("methodbench.engine.probe._child", lambda requests: pytest.fail("asked again"))
    for name, implementation in implementations.items():
        assert describe(name, implementation) == expected[name]
        assert expected[name]["params"]
