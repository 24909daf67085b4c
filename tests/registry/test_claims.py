"""Claims: files that say what they must, and verdicts that follow from the records."""

from __future__ import annotations

import math
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methodbench import api
from methodbench.catalog import Catalog, load_catalog
from methodbench.claims import (
    VERDICTS,
    ClaimResult,
    Claims,
    commands_for,
    judge_claims,
    load_claims,
    parse_claims,
    verdict_of,
)
from methodbench.errors import ClaimsError, UnknownNameError
from methodbench.store import Store
from methodbench.suite import Suite

START = datetime(2026, 1, 1, tzinfo=UTC)
GOOD = """\
method = "noop"

[[reported]]
source = "a paper"
measured_by = "the authors"
task = "t"
metric = "m"
values = [
  { model = "a", value = 1.0 },
  { model = "b, with [brackets] and = signs", value = 2.0 },
]

[[claims]]
id = "one"
text = "One."
source = "Table 1"
left = "noop@twice"
op = ">"
right = { method = "noop", factor = 2.0 }

[[claims]]
id = "two"
text = "Two."
source = "Table 1"
left = "noop"
op = "<"
right = 3
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 2.0", "value = 'two'", r"c.toml:10: reported.0.values.1.value: Input should be a valid number"),
        ("value = 2.0", "valeu = 2.0", r"c.toml:10: reported.0.values.1.(value: the key 'value' is|valeu: unknown)"),
        ("right = 3", "rigth = 3", r"c.toml:2[0-9]: claims.1.right: the key 'right' is missing"),
        ("right = 3", "right = {}", r"c.toml:27: claims.1.right: give either a method or a value"),
        ('op = "<"', 'op = "<<"', r"c.toml:26: claims.1.op: Input should be '<'"),
        ('id = "two"', 'id = "one"', r"two claims have the id 'one'"),
        ('left = "noop"', "left = 3", r"c.toml:21: claims.1: the left side must be a method"),
        ("factor = 2.0", "facktor = 2.0", r"claims.0.right.facktor: unknown key 'facktor'\nDid you mean factor\?"),
        ('method = "noop"\n\n', 'nothing_reported = "x"\nmethod = "noop"\n\n', r"give \[\[reported\]\], or say in"),
        ("[[claims]]", '[settings]\n"2 bits" = { bits = 2 }\n\n[[claims]]', r"settings names '2 bits', which no"),
        ("values = [", "values = [ [", r"c.toml:\d+: not valid TOML"),
    ],
)  # fmt: skip
def test_a_mistake_names_file_line_and_key(old: str, new: str, message: str) -> None:
    assert old in GOOD
    at = GOOD.rindex(old)
    with pytest.raises(ClaimsError, match=message):
        parse_claims(GOOD[:at] + new + GOOD[at + len(old) :], "c.toml")


def test_a_good_file_says_what_it_says() -> None:
    claims = parse_claims(GOOD, "c.toml")
    assert [value.value for value in claims.reported[0].values] == [1.0, 2.0]
    assert [claim.statement for claim in claims.claims] == ["noop@twice > 2 × noop", "noop < 3"]


def test_what_is_left_out_needs_a_reason() -> None:
    empty = 'method = "noop"\nnothing_reported = "no paper"\n'
    with pytest.raises(ClaimsError, match="nothing_claimed"):
        parse_claims(empty, "c.toml")
    parse_claims(empty + 'nothing_claimed = "no test"\n', "c.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('method = "noop"', 'method = "scale"'), "noop.toml:1: method: these are the claims of 'scale'"),
        (('"noop@twice"', '"noop@thrice"'), r"toybench/claims/noop.toml:17: claims.0.left: unknown preset"),
        (
            ('left = "noop"', 'left = "nop"'),
            r"noop.toml:25: claims.1.left: unknown method 'nop'\nDid you mean noop",
        ),
    ],
)
def test_names_that_do_not_exist_are_told_with_their_line(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], message: str
) -> None:
    folder = tmp_path / "toybench"
    (folder / "claims").mkdir(parents=True)
    (folder / "claims" / "noop.toml").write_text(GOOD.replace(*change))
    monkeypatch.setattr(sys.modules["toybench.plugin"], "__file__", str(folder / "plugin.py"))
    with pytest.raises(ClaimsError, match=message):
        load_claims(catalog, "noop")


def test_a_method_without_claims_and_a_file_that_is_absent_are_told(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClaimsError, match="scale has no claims"):
        load_claims(catalog, "scale")
    with pytest.raises(UnknownNameError, match="Did you mean noop"):
        load_claims(catalog, "nopo")
    monkeypatch.setattr(sys.modules["toybench.plugin"], "__file__", str(tmp_path / "plugin.py"))
    with pytest.raises(ClaimsError, match="does not exist"):
        load_claims(catalog, "noop")


@pytest.mark.parametrize(
    ("op", "difference", "low", "high", "verdict"),
    [
        ("<", -1.0, -2.0, -0.5, "reproduced"),
        ("<", -1.0, -2.0, 0.5, "within interval"),
        ("<", 1.0, -0.5, 2.0, "not reproduced"),
        ("<", 1.0, 0.5, 2.0, "contradicted"),
        ("<", 0.0, 0.0, 0.0, "contradicted"),
        ("<=", 0.0, 0.0, 0.0, "reproduced"),
        (">", 1.0, 0.5, 2.0, "reproduced"),
        (">", -1.0, -2.0, -0.5, "contradicted"),
        (">", -1.0, -2.0, 0.5, "not reproduced"),
        (">=", 0.0, 0.0, 0.0, "reproduced"),
        ("==", 0.0, 0.0, 0.0, "reproduced"),
        ("==", 0.05, -0.2, 0.2, "within interval"),
        ("==", 0.2, 0.05, 0.3, "not reproduced"),
        ("==", 0.3, 0.2, 0.4, "contradicted"),
        ("<", -math.inf, -math.inf, -math.inf, "reproduced"),
    ],
)
def test_a_verdict_follows_from_the_difference_and_its_interval(
    op: Any, difference: float, low: float, high: float, verdict: str
) -> None:
    tolerance = 0.1 if op == "==" else 0.0
    assert verdict_of(op, difference, low, high, tolerance) == verdict


def run(store: Store, catalog: Catalog, *methods: Any, tasks: Any = ("toy-value",), **more: Any) -> None:
    from methodbench.engine.driver import run_plan

    comparison = {"methods": list(methods), "tasks": list(tasks), "timeout": 60, **more}
    suite = Suite.model_validate({"name": "t", "comparisons": [comparison]})
    run_plan(api.plan(suite, catalog=catalog), store, catalog, cores=2)


def judged(store: Store, catalog: Catalog, **claim: Any) -> ClaimResult:
    whole = {
        "id": "c",
        "text": "C.",
        "source": "s",
        "left": "noop@twice",
        "op": ">",
        "right": "noop",
        **claim,
    }
    claims = Claims.model_validate({"method": "noop", "nothing_reported": "toy", "claims": [whole]})
    return judge_claims(store, catalog, claims)[0]


def test_claims_are_judged_wherever_both_sides_answered_the_same_question(
    store: Store, catalog: Catalog
) -> None:
    assert judged(store, catalog).verdict == "not attempted"
    run(store, catalog, "noop@twice", seeds=[0, 1])
    assert judged(store, catalog).verdict == "not attempted"
    run(store, catalog, "noop", seeds=[1, 2])
    run(store, catalog, "noop", {"name": "noop", "params": {"value": 3}}, tasks=["toy:6"])
    result = judged(store, catalog)
    assert result.verdict == "reproduced"
    (condition,) = result.conditions
    assert (condition.task, condition.metric, condition.units, condition.seeds) == (
        "toy-value",
        "value",
        4,
        1,
    )
    assert condition.difference == pytest.approx(1.0, abs=1e-9)
    assert condition.low <= condition.difference <= condition.high
    assert judged(store, catalog, op="<").verdict == "contradicted"
    assert judged(store, catalog, right={"method": "noop", "factor": 2.5}).verdict == "contradicted"
    assert (
        judged(store, catalog, right={"method": "noop", "factor": 0.5, "offset": 1.0}).verdict == "reproduced"
    )
    assert judged(
        store, catalog, right={"method": "noop", "offset": 1.0}, op="==", tolerance=1e-6
    ).verdict == ("reproduced")
    assert judged(store, catalog, metric="square", op="<=").verdict == "contradicted"
    assert judged(store, catalog, metric="absent").verdict == "not attempted"
    assert judged(store, catalog, tasks=["toy:*"]).verdict == "not attempted"
    assert judged(store, catalog, kinds=["causal-lm"]).verdict == "not attempted"
    assert judged(store, catalog, task_params={"units": 9}).verdict == "not attempted"
    # A number on the right needs the left side alone, on both seeds.
    number = judged(store, catalog, right=1.5)
    assert [(c.seeds, c.verdict) for c in number.conditions] == [(2, "reproduced")]


def test_records_of_strangers_are_judged_by_their_columns_whatever_their_identity_holds(
    store: Store, catalog: Catalog, tmp_path: Path
) -> None:
    from methodbench.comparison import compare_methods
    from methodbench.provenance import digest
    from methodbench.store import Environment, MetricValue, Run, open_store
    from methodbench.store.capsule import read_capsule, write_capsule
    from methodbench.store.merging import content_of, merge

    def add(number: int, variant: str, params: dict[str, Any], scores: list[float], **more: Any) -> None:
        identity = {"made by": "somebody else", "number": number}
        values = np.array(scores)
        made = Run(
            id=f"{number:012x}", cell_key=digest(identity), identity=identity, status="ok", method="noop",
            kind="probe", family="f", variant=variant, params_passed=params, params={"value": 1.0, **params},
            task="toy-value", task_params={}, protocol=1, environment_digest=digest({}), started_at=START, **more,
        )  # fmt: skip
        metric = MetricValue(
            run_id=made.id, name="value", value=float(values.mean()), units=values.size, scores=values.tobytes(),
            direction="higher", primary=True, aggregate="mean",
        )  # fmt: skip
        elsewhere.add(made, [metric], environment=Environment(digest=digest({}), captured_at=START, data={}))

    with open_store(str(tmp_path / "elsewhere.db")) as elsewhere:
        add(1, "one", {}, [1.0, 1.1, 0.9])
        add(2, "twice", {"value": 2.0}, [2.0, 2.1, 1.9])
        add(3, "twice", {"value": 2.0}, [0.0, 0.0, 0.0], data_digest="other data")
        merge(store, read_capsule(write_capsule(content_of(elsewhere), tmp_path)))
    result = judged(store, catalog)
    assert [(c.left, c.right) for c in result.conditions] == [(2.0, 1.0)]
    assert result.verdict == "reproduced"
    (row,) = compare_methods(store, "noop@twice", "noop@one")
    assert row.verdict == "win"


def test_settings_beyond_the_preset_are_another_method_unless_they_are_free(
    store: Store, catalog: Catalog
) -> None:
    run(store, catalog, "noop@twice", {"name": "noop", "params": {"value": 1.5}})
    assert judged(store, catalog).verdict == "not attempted"
    assert judged(store, catalog, right={"method": "noop", "params": {"value": 1.5}}).verdict == "reproduced"
    run(store, catalog, {"name": "noop", "params": {"value": 1.9}})
    # Of several values of a free hyperparameter the newest run counts.
    free = judged(store, catalog, left={"method": "noop", "free": ["value"]}, op=">", right=1.8)
    assert (free.verdict, len(free.conditions[0].runs_left)) == ("reproduced", 1)


def test_a_run_that_both_sides_describe_is_of_the_one_that_says_more(store: Store, catalog: Catalog) -> None:
    run(store, catalog, "noop@twice")
    sides: dict[str, Any] = {"left": {"method": "noop", "free": ["value"]}, "right": "noop@twice"}
    assert judged(store, catalog, **sides, op=">").verdict == "not attempted"
    run(store, catalog, {"name": "noop", "params": {"value": 1.9}})
    found = judged(store, catalog, **sides, op="<").conditions
    assert [len(set(c.runs_left) & set(c.runs_right)) for c in found] == [0]


def test_where_hyperparameters_are_free_tuned_runs_come_before_newer_ones_as_configured() -> None:
    from types import SimpleNamespace

    from methodbench.claims import Side, _by_seed

    runs: list[Any] = [
        SimpleNamespace(seed=0, variant=variant, started_at=number)
        for number, variant in enumerate(("tuned", "tuned", "value=2"))
    ]
    assert _by_seed(runs, Side(method="noop", free=["value"]))[0] is runs[1]
    assert _by_seed(runs, Side(method="noop"))[0] is runs[2]


def test_settings_that_are_sequences_are_found_in_records() -> None:
    from methodbench.claims import Side, _wanted

    entry = load_catalog().method("prosparse")
    assert isinstance(entry.presets["relu"]["lambdas"], tuple)
    assert _wanted(load_catalog(), Side(method="prosparse@relu"))[1]["lambdas"] == [0.0]


def test_numbers_of_the_record_and_facts_decide_by_their_sign(store: Store, catalog: Catalog) -> None:
    run(store, catalog, "scale", "identity", models=["toy-linear"], tasks=["toy-norm"])
    side = {"left": "scale", "right": "identity", "op": "=="}
    bits = judged(store, catalog, **side, metric="model_bytes")
    assert bits.verdict == "reproduced"
    assert bits.conditions[0].low is None
    facts = judged(store, catalog, left="scale", op=">=", right=2, metric="facts.calibrated_on")
    assert facts.verdict == "reproduced"
    missing = judged(store, catalog, left="scale", op=">=", right=2, metric="facts.nothing")
    assert (missing.verdict, missing.conditions[0].reason) == (
        "not attempted",
        "the record has no facts.nothing",
    )


def test_a_single_score_is_no_proof_unless_the_claim_says_that_it_is_exact(
    store: Store, catalog: Catalog
) -> None:
    run(store, catalog, "scale", "identity", models=["toy-linear"], tasks=["toy-norm"])
    side = {"left": "scale", "right": "identity", "op": "<"}
    loose = judged(store, catalog, **side)
    assert (loose.verdict, loose.conditions[0].reason) == (
        "within interval",
        "a single score has no interval",
    )
    assert judged(store, catalog, **side, exact=True).verdict == "reproduced"
    assert judged(store, catalog, **{**side, "op": ">"}, exact=True).verdict == "contradicted"


def test_a_method_that_fails_does_not_reproduce_and_a_peer_that_fails_proves_nothing(
    store: Store, catalog: Catalog
) -> None:
    run(store, catalog, "noop", {"name": "misbehave", "params": {"how": "diverge"}})
    broken = {"method": "misbehave", "params": {"how": "diverge"}}
    result = judged(store, catalog, left=broken, right="noop")
    assert result.verdict == "not reproduced"
    assert "diverged: the loss is not finite" in result.conditions[0].reason
    assert judged(store, catalog, left="noop", right=broken).verdict == "not attempted"


def test_everywhere_takes_the_worst_condition_and_somewhere_the_best(store: Store, catalog: Catalog) -> None:
    run(store, catalog, "noop@twice", "noop", tasks=["toy-value", "toy:2"])
    assert len(judged(store, catalog).conditions) == 2
    mixed = {"right": {"method": "noop", "params": {"value": 3.0}}}
    run(store, catalog, {"name": "noop", "params": {"value": 3.0}}, tasks=["toy:2"])
    assert judged(store, catalog, **mixed).verdict == "contradicted"
    # On one task it beats the dense value, on both it must beat a number between.
    assert judged(store, catalog, holds="somewhere").verdict == "reproduced"


def test_sides_may_differ_in_a_setting_of_the_task_and_in_nothing_else(
    store: Store, catalog: Catalog
) -> None:
    few, many = ({"name": "toy-value", "params": {"units": units}} for units in (2, 8))
    run(store, catalog, "noop", tasks=[few, many], seeds=[0, 1])
    run(store, catalog, "noop@twice", tasks=[many], seeds=[0])
    sides = {
        "left": {"method": "noop", "task_params": {"units": 2}},
        "right": {"method": "noop", "task_params": {"units": 8}, "factor": 1e6},
        "metric": "wall_seconds",
        "op": "<",
    }
    (condition,) = judged(store, catalog, **sides).conditions
    assert (condition.verdict, condition.seeds, condition.task_params["units"]) == ("reproduced", 2, 2)
    # Another method on the same two settings, of which one has no record.
    assert judged(store, catalog, **{**sides, "left": {**sides["left"], "method": "noop@twice"}}).verdict == (
        "not attempted"
    )
    (condition,) = judged(store, catalog, **{**sides, "metric": "value"}).conditions
    assert (condition.verdict, condition.reason) == ("not attempted", "the sides scored different units")
    claim = judged(store, catalog, **sides).claim
    assert claim.statement == "wall_seconds: noop (units=2) < 1e+06 × noop (units=8)"
    assert commands_for(catalog, claim) == [
        "methodbench run --method noop --task toy-value --task-param units=2",
        "methodbench run --method noop --task toy-value --task-param units=8",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": {"method": "noop", "task_params": {"units": 2}}}, "must be named by the other as well"),
        (
            {
                "left": {"method": "noop", "task_params": {"units": 2}},
                "right": {"method": "noop", "task_params": {"units": 4}},
                "task_params": {"units": 2},
            },
            "either that of a side or of both",
        ),
        ({"right": {"value": 1.0, "task_params": {"units": 2}}}, "a value stands alone"),
    ],
)
def test_settings_of_the_task_on_one_side_alone_are_refused(
    store: Store, catalog: Catalog, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        judged(store, catalog, **change)


def test_commands_make_the_records_that_a_claim_needs(catalog: Catalog) -> None:
    claims = load_claims(catalog, "noop").claims
    assert commands_for(catalog, claims[0]) == [
        "methodbench run --method noop@twice --method noop --task toy-value"
    ]
    other = claims[0].model_copy(
        update={"right": claims[0].right.model_copy(update={"params": {"value": 3.0}}), "tasks": ["*"]}
    )
    assert commands_for(catalog, other) == [
        "methodbench run --method noop@twice --task toy-value",
        "methodbench run --method noop --param value=3.0 --task toy-value",
    ]


def test_every_verdict_is_explained_and_every_field_is_described() -> None:
    from methodbench.claims import Claim, Reported, ReportedValue, Side

    assert all(len(text.split()) > 3 for text in VERDICTS.values())
    for model in (Claims, Claim, Side, Reported, ReportedValue):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


INSTALLED = load_catalog()


def test_every_method_of_a_paper_has_claims_that_say_where_its_numbers_were_read() -> None:
    for name, method in INSTALLED.methods.items():
        if method.paper is None:
            continue
        found = load_claims(INSTALLED, name)
        for block in found.reported:
            assert block.measured_by.startswith("the authors"), f"{name}: {block.measured_by}"
            assert re.search(r"arXiv|README|paper|survey|abstract", block.source), f"{name}: {block.source}"


@pytest.mark.parametrize("name", sorted(name for name, method in INSTALLED.methods.items() if method.claims))
def test_the_claims_of_every_method_load_and_their_settings_exist(name: str) -> None:
    pytest.importorskip("torch")
    from methodbench import params
    from methodbench.catalog import load_implementation

    found = load_claims(INSTALLED, name)
    for reported in found.settings.values():
        assert params.resolve(load_implementation(INSTALLED.method(name).impl), reported, name)
    for block in found.reported:
        if block.measured_as:
            assert block.measured_as in {
                metric.name for task in INSTALLED.tasks.values() for metric in task.metrics
            }
    for claim in found.claims:
        for side in (claim.left, claim.right):
            if side.value is None:
                method_name, _, preset = side.method.partition("@")
                method = INSTALLED.method(method_name)
                settings = {**(method.presets[preset] if preset else {}), **side.params}
                known = params.resolve(load_implementation(method.impl), settings, method_name)
                assert set(side.free) <= set(known), f"{name}: {claim.id}: free"
        # A probe names its own numbers; no entry lists them.
        if claim.metric and not claim.metric.startswith("facts.") and INSTALLED.method(name).kind != "probe":
            from methodbench.claims import RECORD_FIELDS

            metrics = {metric.name for task in INSTALLED.tasks.values() for metric in task.metrics}
            assert claim.metric in metrics | set(RECORD_FIELDS), f"{name}: {claim.id}: metric"
        assert commands_for(INSTALLED, claim), f"{name}: {claim.id} can be tested nowhere"
