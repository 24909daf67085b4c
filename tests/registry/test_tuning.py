from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import pytest

from methodbench import api
from methodbench.engine.tuning import chosen, metric_of_choice, sensitivity
from methodbench.errors import MethodbenchError, SuiteError
from methodbench.store import open_store
from methodbench.suite import parse_suite
from methodbench.tuning import Between, Choice, Decades, Space, labelled, points, regime, search_space


@dataclasses.dataclass
class Tunable:
    lr: float = 1e-3
    weight_decay: float = 0.0


@dataclasses.dataclass
class SelfTuning:
    SPACE: ClassVar[Space] = {}
    lr: float = 1e-3


def test_points_are_seeded_and_lie_in_the_space():
    drawn = points(Tunable(), 16, seed=3)
    assert drawn == points(Tunable(), 16, seed=3) != points(Tunable(), 16, seed=4)
    assert all(1e-3 * 10**-1.5 <= point["lr"] < 1e-3 * 10**1.5 for point in drawn)
    assert {point["weight_decay"] for point in drawn} <= {0.0, 1e-4, 1e-3, 1e-2, 1e-1}


def test_points_cover_the_space_evenly():
    # 16 points of a Sobol sequence: one in each sixteenth of every axis.
    powers = np.log10([point["lr"] / 1e-3 for point in points(Tunable(), 16, seed=0)])
    assert sorted(((powers / 3 + 0.5) * 16).astype(int).tolist()) == list(range(16))


def test_more_trials_begin_with_those_of_fewer():
    assert points(Tunable(), 8, seed=0) == points(Tunable(), 16, seed=0)[:8]


def test_a_method_with_an_empty_space_tunes_itself():
    assert points(SelfTuning(), 8, seed=0) == []
    assert search_space(SelfTuning()) == {}


def test_distributions_stay_within_their_values():
    assert Choice((1, 2, 3)).at(0.999999, None) == 3
    assert Decades(2).at(0.5, 0.1) == pytest.approx(0.1)
    assert [Between(1e-3, 1e3).at(share, 7.0) for share in (0.0, 0.5)] == pytest.approx([1e-3, 1.0])


def test_labels_tell_how_a_configuration_came_about():
    assert [regime(labelled(name, "tuned")) for name in ("", "nesterov", "momentum=0.5")] == ["tuned"] * 3
    assert regime(labelled("small", "trial", 12)) == "trial"
    assert regime(labelled("", "self-tuning")) == "self-tuning"
    assert {regime(label) for label in ("", "synthetic", "tuned=1", "lr=0.1, momentum=0")} == {"default"}


def test_sensitivity_counts_a_failure_as_the_worst_that_ended():
    assert sensitivity([1.0, 2.0, math.nan], lower_is_better=True) == pytest.approx(2 / 3)
    assert sensitivity([0.5, 0.9, math.nan], lower_is_better=False) == pytest.approx(0.8 / 3)
    assert sensitivity([2.0, 2.0], lower_is_better=True) == 0


def test_a_seed_cannot_both_choose_and_score():
    text = (
        "name: x\ncomparisons: [{methods: [adam], tasks: [logistic], seeds: [0, 1],"
        " tuning: {trials: 4, trial_seeds: [1]}}]"
    )
    with pytest.raises(SuiteError, match="share 1"):
        parse_suite(text, "x.yaml")


def suite(methods, trials=4, **task_params):
    return {
        "name": "tuning",
        "comparisons": [
            {
                "methods": methods,
                "tasks": [
                    {
                        "name": "logistic",
                        "params": {"steps": 40, "samples": 600, "features": 8, **task_params},
                    }
                ],
                "seeds": [0, 1],
                "tuning": {"trials": trials},
            }
        ],
    }


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    db = str(tmp_path_factory.mktemp("tuning") / "records.db")
    return db, api.run(suite(["sgdm", "adam"]), db=db)


@pytest.mark.slow
def test_every_method_gets_the_same_trials_and_its_best_runs_on_the_seeds(tuned):
    _, report = tuned
    assert report.complete
    by_method = {}
    for run in report.runs.values():
        by_method.setdefault((run.method, regime(run.variant)), []).append(run)
    for method in ("sgdm", "adam"):
        assert len(by_method[method, "trial"]) == 4
        assert {run.seed for run in by_method[method, "trial"]} == {1_000_000}
        assert sorted(run.seed for run in by_method[method, "tuned"]) == [0, 1]


@pytest.mark.slow
def test_the_choice_is_the_trial_of_lowest_validation_loss(tuned):
    db, report = tuned
    with open_store(db) as store:
        values = {
            row.run_id: row.value
            for row in store.metrics([run.id for run in report.runs.values()])
            if row.name == "validation-loss"
        }
    for method in ("sgdm", "adam"):
        runs = [run for run in report.runs.values() if run.method == method]
        trials = [run for run in runs if regime(run.variant) == "trial"]
        best = min(trials, key=lambda run: values[run.id])
        for run in runs:
            if regime(run.variant) == "tuned":
                said = run.facts["tuning"]
                assert run.params == best.params
                assert said["metric"] == "validation-loss"
                assert said["best_value"] == values[best.id]
                assert said["trials"] == len(said["tried"]) == 4
                assert said["sensitivity"] >= 0
                assert {"--param", "lr=" + repr(run.params["lr"])} <= set(run.command.split())


@pytest.mark.slow
def test_a_second_call_runs_nothing(tuned):
    db, report = tuned
    again = api.run(suite(["sgdm", "adam"]), db=db)
    assert again.new == []
    assert set(again.runs) == set(report.runs)


@pytest.mark.slow
def test_comparisons_pair_what_was_chosen_and_no_trials(tuned):
    db, _ = tuned
    rows = api.compare("adam", "sgdm", db=db)
    assert {(row.variant_a, row.variant_b) for row in rows} == {("tuned", "tuned")}


def test_headings_tell_how_the_rows_of_a_board_were_tuned():
    from methodbench_leaderboard.aggregate import Group, Row, Table

    def row(variant, positions):
        return Row("key", "adam", variant, {}, False, positions, None)

    groups = [Group("", [row("", "")]), Group("hyperparameters tuned by trials", [row("tuned", "x")])]
    table = Table("t", "t", None, [], [], groups)
    assert [table.heading(group) for group in groups] == [
        "Hyperparameters as configured",
        "Hyperparameters tuned by trials",
    ]
    assert Table("t", "t", None, [], [], groups[:1]).heading(groups[0]) == "No policy of positions declared"


@pytest.mark.slow
def test_a_study_whose_trials_all_fail_leads_to_nothing_and_says_why(tmp_path):
    wanted = suite([{"name": "sgd", "params": {"lr": 1e9}}], trials=2)
    wanted["comparisons"][0]["tasks"] = [{"name": "quadratic", "params": {"starts": 1}}]
    report = api.run(wanted, db=str(tmp_path / "x.db"))
    assert [skip.reason for skip in report.plan.skips] == ["not tuned: every one of its trials failed"]
    assert {regime(run.variant) for run in report.runs.values()} == {"trial"}


@pytest.mark.slow
def test_trials_that_have_not_run_lead_to_nothing(tuned):
    db, _ = tuned
    plan = api.plan(suite(["lion"]))
    with open_store(db) as store:
        cells, skips = chosen(plan, store, {})
    assert cells == []
    assert skips[0].reason == "not tuned: 4 of its trials have not run"
    assert metric_of_choice(plan.cells[0]) == ("validation-loss", True)


@pytest.mark.slow
def test_suites_that_tune_are_not_run_until_decided(tmp_path):
    with pytest.raises(MethodbenchError, match="cannot be run until decided"):
        api.run_until_decided(suite(["adam"]), db=str(tmp_path / "x.db"))
