"""Chains of compressors: names, order, identity, what the worker makes of them, and how links interact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from methodbench import api
from methodbench.catalog import Catalog
from methodbench.comparison import chain_interactions
from methodbench.composition import ChainError, compose, link_params, preset_params, split_use
from methodbench.engine.cell import Cell
from methodbench.engine.driver import Report, run_plan
from methodbench.entries import STAGES, EntryError, Method
from methodbench.errors import MethodbenchError, ParameterError, UnknownNameError
from methodbench.store import Store
from methodbench.suite import Suite


def suite(*methods: Any, tasks: Any = ("toy-mean",), **more: Any) -> Suite:
    comparison = {
        "methods": list(methods),
        "models": ["toy-linear"],
        "tasks": list(tasks),
        "timeout": 60,
        **more,
    }
    return Suite.model_validate({"name": "t", "comparisons": [comparison]})


def run(store: Store, catalog: Catalog, *methods: Any, **more: Any) -> Report:
    return run_plan(api.plan(suite(*methods, **more), catalog=catalog), store, catalog, cores=2)


def cell(catalog: Catalog, method: Any) -> Cell:
    (found,) = api.plan(suite(method), catalog=catalog).cells
    return found


def test_a_use_is_split_into_name_and_preset() -> None:
    assert split_use("rtn") == ("rtn", "")
    assert split_use("rtn@w4") == ("rtn", "w4")
    assert split_use("wanda@s50 + rtn@w4") == ("wanda + rtn", "s50 + w4")
    assert split_use("wanda@s50+rtn") == ("wanda + rtn", "s50 + default")
    assert split_use(" wanda + rtn ") == ("wanda + rtn", "")


def test_a_chain_is_a_method_with_what_its_links_have_in_common(catalog: Catalog) -> None:
    chain = catalog.method("zero-columns + round")
    assert (chain.name, chain.kind, chain.applies_to) == ("zero-columns + round", "compressor", ("toy-net",))
    assert [link.name for link in chain.links] == ["zero-columns", "round"]
    assert preset_params(chain, "two + coarse") == {"zero-columns.columns": 2, "round.step": 0.5}
    assert preset_params(chain, "default + coarse") == {"round.step": 0.5}
    with pytest.raises(UnknownNameError, match="unknown preset of round 'coarsest'"):
        preset_params(chain, "two + coarsest")
    with pytest.raises(ChainError, match="2 links, but 'two' names 1"):
        preset_params(chain, "two")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "round + zero-columns",
            r"zero-columns \(prune\) cannot follow round \(quantize\): it compares dense weights",
        ),
        ("restore + round", r"round \(quantize\) cannot follow restore \(compensate\)"),
        ("zero-columns + zero-columns", "zero-columns appears twice"),
        ("zero-columns + noop", "noop is a probe; only compressors can be chained"),
        ("scale + round", "scale declares no stage"),
        ("zero-columns + rond", "unknown method 'rond'\nDid you mean round"),
    ],
)
def test_links_that_make_no_sense_are_refused_with_the_reason(
    catalog: Catalog, name: str, message: str
) -> None:
    with pytest.raises(MethodbenchError, match=message):
        compose(catalog, name)
    with pytest.raises(MethodbenchError, match=message):
        api.plan(suite(name), catalog=catalog)


def test_every_pair_of_stages_is_either_in_order_or_refused(catalog: Catalog) -> None:
    for first in STAGES:
        for second in STAGES:
            links = {
                name: Method(
                    name=name,
                    kind="compressor",
                    family="toy",
                    impl="toybench.methods:Round",
                    summary="x",
                    stage=stage,
                )
                for name, stage in (("a", first), ("b", second))
            }
            small = Catalog(catalog.manager, methods=links)
            legal = STAGES.index(first) < STAGES.index(second) or (
                first == second and first not in ("quantize", "compensate")
            )
            if legal:
                assert compose(small, "a + b").name == "a + b"
            else:
                with pytest.raises(ChainError, match=f"{second}"):
                    compose(small, "a + b")


def test_an_entry_of_an_unknown_stage_is_refused() -> None:
    with pytest.raises(EntryError, match="stage 'shrink' is not one of transform, rotate"):
        Method(name="x", kind="compressor", family="toy", impl="a:b", summary="x", stage="shrink")


def test_parameters_name_their_link(catalog: Catalog) -> None:
    chain = catalog.method("zero-columns + round")
    assert [params for _, params in link_params(chain, {"round.step": 1.0})] == [{}, {"step": 1.0}]
    with pytest.raises(
        ParameterError, match=r"has no parameter 'step'\nName the link first: zero-columns.step or"
    ):
        link_params(chain, {"step": 1.0})
    with pytest.raises(ParameterError, match="round has no parameter 'stp'\nDid you mean step"):
        cell(catalog, {"name": "zero-columns + round", "params": {"round.stp": 1}})


def test_the_identity_covers_every_parameter_and_the_order_of_every_link(catalog: Catalog) -> None:
    chain = cell(catalog, "zero-columns@two + round@coarse")
    assert chain.variant == "two + coarse"
    assert chain.identity()["method_params"] == {
        "zero-columns.columns": 2,
        "round.step": 0.5,
        "round.shift": 0.0,
    }
    same = {"name": "zero-columns + round", "params": {"zero-columns.columns": 2, "round.step": 0.5}}
    assert cell(catalog, same).key == chain.key
    others = [
        cell(catalog, "zero-columns + round@coarse"),
        cell(catalog, "zero-columns@two + round"),
        cell(catalog, "zero-columns@two"),
        cell(catalog, "zero-columns@two + restore"),
    ]
    assert len({chain.key, *(other.key for other in others)}) == 5
    words = chain.command()
    assert "--method 'zero-columns + round'" in words
    assert "--param zero-columns.columns=2 --param round.step=0.5" in words


def test_grids_vary_the_parameters_of_a_link(catalog: Catalog) -> None:
    use = {"name": "zero-columns + round", "presets": ["two + default"], "grid": {"round.step": [0.1, 0.2]}}
    cells = api.plan(suite(use), catalog=catalog).cells
    assert [one.variant for one in cells] == [
        "two + default, round.step=0.1",
        "two + default, round.step=0.2",
    ]


def test_a_chain_does_what_its_links_do_one_after_the_other(store: Store, catalog: Catalog) -> None:
    report = run(store, catalog, "identity", "zero-columns", "zero-columns + round + restore@default")
    by_method = {one.method: one for one in report.runs.values()}
    scores = {row.run_id: row.unit_scores() for row in store.metrics()}
    dense, chain = scores[by_method["identity"].id], by_method["zero-columns + round + restore"]
    assert chain.status == "ok", chain.reason
    steps = chain.facts["links"]
    assert [step["method"] for step in steps] == ["zero-columns", "round", "restore"]
    assert steps[0]["zeros_share"] == 0.25
    assert steps[1]["zeros_share"] >= 0.25
    assert not np.array_equal(scores[chain.id], dense)
    assert chain.params == {"zero-columns.columns": 1, "round.step": 0.25, "round.shift": 0.0}
    # Rounding to a grid of 0.25 leaves row means on a grid of 0.25 / 4, but for the one weight that was restored.
    on_grid = np.isclose(scores[chain.id] * 16, np.round(scores[chain.id] * 16), atol=1e-5)
    assert on_grid.sum() == 3


def test_a_link_that_undoes_the_zeros_of_another_is_told(store: Store, catalog: Catalog) -> None:
    report = run(store, catalog, "zero-columns + round@off-zero", "zero-columns + round")
    warnings = {one.variant: one.warnings for one in report.runs.values()}
    assert warnings[""] == []
    (message,) = warnings["default + off-zero"]
    assert message.startswith("round undoes zeros of zero-columns: 25.0% of the weights were zero, 0.0% are")


def test_a_model_whose_layers_were_replaced_is_refused_with_one_message(
    store: Store, catalog: Catalog
) -> None:
    report = run(store, catalog, "mask + round", "mask + restore")
    outcomes = {one.method: (one.status, one.reason) for one in report.runs.values()}
    assert outcomes["mask + round"] == (
        "not-applicable",
        "mask + round: mask turns layers of toy-linear into MaskedLinear, and round would undo that by replacing them",
    )
    assert outcomes["mask + restore"][0] == "ok"


def test_interactions_need_every_link_alone_and_are_judged_on_the_same_units(
    store: Store, catalog: Catalog
) -> None:
    chain = "zero-columns@two + round@coarse"
    with pytest.raises(UnknownNameError):
        chain_interactions(store, chain)
    run(store, catalog, chain, "zero-columns@two")
    with pytest.raises(
        MethodbenchError, match="no record of the baseline and round on toy-linear · toy-mean alone"
    ):
        chain_interactions(store, chain)
    run(store, catalog, "identity", "round@coarse", "round")
    (result,) = chain_interactions(store, chain)
    scores = {}
    for one in store.runs():
        if one.variant != "" or one.method == "identity":
            scores[one.method] = store.metrics([one.id])[0].unit_scores().mean()
    base = scores["identity"]
    # toy-mean is better when it is lower.
    assert result.alone == pytest.approx((base - scores["zero-columns"], base - scores["round"]))
    assert result.together == pytest.approx(base - scores["zero-columns + round"])
    assert result.excess == pytest.approx(result.together - sum(result.alone))
    assert result.low <= result.excess <= result.high
    assert result.verdict in ("more than the sum", "the sum", "harmful")
    assert (result.low > 0) == (result.verdict == "more than the sum")
