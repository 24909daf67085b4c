"""Boards from records: which runs count, and what is compared with what."""

from __future__ import annotations

import numpy as np
import pytest

from methodbench.stats import aggregate, rank_intervals
from methodbench_leaderboard.aggregate import Board, Row, Table, make_boards
from methodbench_leaderboard.records import Records


@pytest.fixture(scope="module")
def boards(made_up, store) -> dict[tuple[str, str], Board]:
    made = make_boards(Records(store), made_up.make_catalog())
    return {(board.family.name, board.model_kind): board for board in made}


def _row(table: Table, label: str) -> Row:
    return next(row for row in table.rows if row.label == label)


def _key(table: Table, task: str) -> str:
    return next(question.key for question in table.questions if question.task == task)


def test_a_family_of_baselines_alone_and_a_family_that_never_applied_have_no_board(boards):
    assert set(boards) == {
        ("descend", ""),
        ("explain", "cnn"),
        ("mask", "causal-lm"),
        ("shrink", "causal-lm"),
    }


def test_the_baseline_is_shared_by_every_board_of_its_questions(boards):
    for name in ("shrink", "mask"):
        (table,) = boards[name, "causal-lm"].tables
        assert [row.method for row in table.baselines] == ["nothing"]
        assert not any(row.baseline for group in table.groups for row in group.rows)


def test_tasks_that_bring_their_own_model_have_a_table_each(boards):
    assert [table.title for table in boards["descend", ""].tables] == ["hill", "valley"]


def test_seeds_are_averaged_unit_by_unit(boards, store):
    (table,) = boards["shrink", "causal-lm"].tables
    cell = _row(table, "search b3").cells[_key(table, "text-ppl")]
    metrics = {metric.run_id: metric for metric in store.metrics() if metric.name == "perplexity"}
    scores = np.mean([metrics[run.id].unit_scores() for run in cell.runs], axis=0)
    assert [run.seed for run in cell.runs] == [0, 1, 2]
    assert cell.primary.value == pytest.approx(aggregate(scores, "exp-mean"), rel=1e-12)


def test_ranks_are_those_of_the_paired_scores(boards):
    (table,) = boards["shrink", "causal-lm"].tables
    key = _key(table, "text-ppl")
    cells = [row.cells[key] for group in table.groups for row in group.rows if key in row.cells]
    ranked = [cell for cell in cells if cell.rank]
    expected = rank_intervals(
        np.stack([cell.primary.scores for cell in ranked]), "exp-mean", lower_is_better=True
    )
    assert len(ranked) >= 5
    assert [[c.rank.place, c.rank.low, c.rank.high] for c in ranked] == expected.tolist()


def test_methods_that_touch_different_positions_are_never_ranked_together(boards):
    (table,) = boards["mask", "causal-lm"].tables
    key = _key(table, "text-ppl")
    groups = {group.positions: [row.cells[key].rank for row in group.rows] for group in table.groups}
    assert set(groups) == {"prefill", "decode"}
    assert [rank.of for rank in groups["decode"]] == [1]
    assert [rank.of for rank in groups["prefill"]] == [2, 2]


def test_the_difference_to_the_baseline_is_paired(boards):
    (table,) = boards["shrink", "causal-lm"].tables
    key = _key(table, "text-ppl")
    cell, baseline = _row(table, "round b3").cells[key], table.baselines[0].cells[key]
    assert cell.difference.difference == pytest.approx(cell.primary.value - baseline.primary.value, rel=1e-9)
    assert cell.difference.decided
    assert baseline.difference is None


def test_differences_are_to_the_strongest_baseline_that_a_method_reaches(made_up, tmp_path):
    with made_up.open_store(str(tmp_path / "baselines.db")) as store:
        maker = made_up.Maker(store)
        # Lower is better: one baseline is out of reach, one is reached, one is beaten by all.
        for method, level in (("nothing", 1.0), ("dense", 0.1), ("weak", 3.0), ("round", 0.9), ("mask", 2.0)):
            baseline = method in ("nothing", "dense", "weak")
            scores = {"perplexity": np.linspace(0, 0.1, 8) + level}
            maker.run(method, "text-ppl", scores, model="tiny-lm", model_kind="causal-lm",
                      family="baseline" if baseline else "shrink", baseline=baseline)  # fmt: skip
        (board,) = make_boards(Records(store), made_up.make_catalog())
    (table,) = board.tables
    assert [row.method for row in table.baselines] == ["nothing", "dense", "weak"]
    key = _key(table, "text-ppl")
    by_method = {row.method: row.cells[key] for row in table.rows}
    assert by_method["round"].difference.difference < 0 < by_method["mask"].difference.difference
    assert by_method["nothing"].difference is None
    assert by_method["dense"].difference.difference < 0


def test_a_run_of_an_earlier_protocol_is_counted_but_not_compared(boards, store):
    (table,) = boards["shrink", "causal-lm"].tables
    question = next(question for question in table.questions if question.task == "text-ppl")
    assert question.superseded == 1
    used = {run.id for row in table.rows for cell in row.cells.values() for run in cell.runs}
    assert not used & {run.id for run in store.runs() if run.protocol == 0}


def test_results_of_other_thread_counts_stand_in_columns_of_their_own(made_up, tmp_path):
    with made_up.open_store(str(tmp_path / "threads.db")) as store:
        maker = made_up.Maker(store)
        for threads, worse in ((1, 0.0), (4, 0.5)):
            for method in ("nothing", "round"):
                baseline = method == "nothing"
                scores = {"perplexity": np.linspace(1, 2, 8) + worse + 0.1 * (not baseline)}
                maker.run(method, "text-ppl", scores, model="tiny-lm", model_kind="causal-lm", threads=threads,
                          family="baseline" if baseline else "shrink", baseline=baseline)  # fmt: skip
        (board,) = make_boards(Records(store), made_up.make_catalog())
    (table,) = board.tables
    assert {question.suffix: question.threads for question in table.questions} == {
        "threads=1": 1,
        "threads=4": 4,
    }
    for question in table.questions:
        for method in ("nothing", "round"):
            assert [run.threads for run in _row(table, method).cells[question.key].runs] == [question.threads]
        # The difference to the baseline is that to the baseline under the same count.
        assert _row(table, "round").cells[question.key].difference.difference == pytest.approx(
            np.exp(np.linspace(1, 2, 8).mean() + (0.5 if question.threads == 4 else 0.0)) * (np.exp(0.1) - 1)
        )


def test_a_scored_run_goes_before_one_that_failed(boards):
    (table,) = boards["shrink", "causal-lm"].tables
    cell = _row(table, "round b4").cells[_key(table, "text-ppl")]
    assert [run.status for run in cell.runs] == ["ok"]


def test_configurations_with_one_label_are_told_apart_by_their_hyperparameters(boards):
    (table,) = boards["mask", "causal-lm"].tables
    variants = sorted(row.variant for row in table.rows if row.method == "cut")
    assert variants == ["(of=cut, share=0.5)", "(share=0.53)"]


def test_rows_are_sorted_by_value_with_what_has_none_last(boards):
    (table,) = boards["shrink", "causal-lm"].tables
    first = table.questions[0]
    cells = [row.cells.get(first.key) for group in table.groups for row in group.rows]
    values = [cell.primary.value for cell in cells if cell and cell.primary]
    finite = [value for value in values if np.isfinite(value)]
    assert finite == sorted(finite, reverse=not first.metric.lower_is_better)
    assert values[: len(finite)] == finite
    assert all(cell is None or cell.primary is None for cell in cells[len(values) :])


def test_every_missing_cell_has_a_status(boards, made_up):
    board = boards["shrink", "causal-lm"]
    gaps = board.missing(board.tables[0], made_up.make_catalog())
    statuses = {(gap.row.method, gap.question.task, gap.status) for gap in gaps}
    assert ("lattice", "text-ppl", "oom") in statuses
    assert ("round", "choice-acc", "never tried") in statuses


def test_the_digest_changes_with_a_score(made_up, store, tmp_path):
    same, other = made_up.fill(tmp_path / "same.db"), made_up.fill(tmp_path / "other.db")
    with same, other:
        made_up.Maker(other).run("walk", "hill", {"test-loss": [1.0]}, id="0123456789ab", family="descend")
        assert Records(same).digest == Records(store).digest
        assert Records(other).digest != Records(store).digest
