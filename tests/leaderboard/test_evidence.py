"""Claims, chains, coverage and pages of models, from records made for them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest

from methodbench.catalog import load_catalog
from methodbench.store import Environment, MetricValue, Run, Witness, open_store
from methodbench_leaderboard import build
from methodbench_leaderboard.aggregate import make_boards
from methodbench_leaderboard.coverage import make_coverage
from methodbench_leaderboard.evidence import Evidence, counterparts
from methodbench_leaderboard.records import Records

HOSTILE_FIELDS = (
    "method", "family", "variant", "model", "model_kind", "task", "dtype", "device", "suite", "command", "reason",
    "storage", "throughput_unit", "methodbench_version", "log_tail", "method_digest", "weights_digest", "wheel",
)  # fmt: skip


def add(maker, method, task, scores=None, **given):
    """Add a run with the identity that a driver records."""
    asked = {"model": "", "seed": 0, "protocol": 1, "weights_digest": "", "data_digest": "", "dtype": "float32",
             "task_params": {}, "params": {}}  # fmt: skip
    fields = {name: given.pop(name, default) for name, default in asked.items()}
    identity = {**fields, "method": method, "task": task, "device_class": "cpu"}
    key = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()
    return maker.run(method, task, scores, identity=identity, cell_key=key, **fields, **given)


@pytest.fixture
def maker(made_up, tmp_path):
    with open_store(str(tmp_path / "results.db")) as store:
        yield made_up.Maker(store)


def _evil_metric(run_id: str, evil: str) -> MetricValue:
    return MetricValue(
        run_id=run_id, name=evil, title=evil, unit=evil, direction="lower", aggregate="mean", primary=True, value=1.0,
        low=0.5, high=1.5, units=4, scores=np.linspace(0, 2, 4).astype("<f8").tobytes(),
    )  # fmt: skip


def test_numbers_of_a_paper_stand_beside_the_nearest_run_here(maker, tmp_path):
    catalog = load_catalog()
    lm = {"model": "smollm2-135m", "model_kind": "causal-lm", "family": "quant"}
    scores = np.linspace(3.0, 3.4, 16)
    add(maker, "identity", "pydoc-ppl", {"perplexity": scores}, baseline=True, **lm)
    plain = {"bits": 3, "group_size": -1, "symmetric": False, "act_order": False}
    add(
        maker,
        "gptq",
        "pydoc-ppl",
        {"perplexity": scores + 1},
        params={**plain, "act_order": True},
        variant="o",
        **lm,
    )
    add(maker, "gptq", "pydoc-ppl", {"perplexity": scores + 2}, params=plain, variant="w3", **lm)
    records = Records(maker.store)
    evidence = Evidence(records, catalog)
    (table,) = next(b for b in make_boards(records, catalog) if b.family.name == "quant").tables
    claims = evidence.claims("gptq")
    assert claims is not None
    defaults = {param["name"]: param["default"] for param in evidence.descriptions["gptq"]["params"]}
    results = [(table, row) for row in table.rows if row.method == "gptq"]
    found = counterparts(claims, results, defaults)
    at = {
        (block.values[n].model, block.values[n].setting): found.get((b, n))
        for b, block in enumerate(claims.reported)
        for n in range(len(block.values))
    }
    same = at["OPT-125M", "3 bits per channel"]
    assert same is not None
    assert (same.row.variant, same.differs, same.beyond) == ("w3", (), ())
    assert same.untouched is not None
    assert same.untouched.value == pytest.approx(np.exp(3.2))
    nearest = at["LLaMA-7B", "3 bits, group 128"]
    assert nearest is not None
    assert (nearest.row.variant, nearest.differs) == ("w3", (("group_size", 128, -1),))
    # Of the stated hyperparameters none agrees.
    assert at["Llama-2-7B", "4 bits, group 128"] is None
    (ordered,) = (row for _, row in results if row.variant == "o")
    besides = counterparts(claims, [(table, ordered)], defaults)
    assert {pair.beyond for pair in besides.values()} == {(("act_order", True),)}
    page = build(maker.store, catalog, tmp_path / "site").parent / "methods" / "gptq.html"
    text = page.read_text(encoding="utf-8")
    assert "for OPT-125M; " in text
    assert "<code>group_size=-1</code> for 128" in text
    assert "untouched 27.65, ratio 1.948" in text
    assert "untouched 24.53, ratio 7.389" in text


def test_a_run_shows_what_its_replays_came_to_and_a_task_its_versions(maker, made_up, tmp_path):
    scores = {"perplexity": np.linspace(3, 4, 8)}
    lm = {"model": "tiny-lm", "model_kind": "causal-lm"}
    old = add(maker, "round", "text-ppl", scores, protocol=1, data_digest="d" * 64, **lm)
    new = add(maker, "round", "text-ppl", scores, protocol=2, data_digest="e" * 64, **lm)
    maker.store.add(
        Run(**new.model_dump(exclude={"id", "witness_of"}), id="c" * 12, witness_of=new.id), [], [], None, None,
        Witness(run_id="c" * 12, original=new.id, verdict="drifted", tolerance=0.0, parts_at="layer blocks.3",
                differences=[{"metric": "perplexity", "first": 30.5, "second": 30.75}],
                suspects=[{"field": "torch", "recorded": "2.6", "replayed": "2.7"}]),
    )  # fmt: skip
    site = build(maker.store, made_up.make_catalog(), tmp_path / "site").parent
    text = (site / "runs" / f"{new.id}.html").read_text(encoding="utf-8")
    for words in ("drifted", "layer blocks.3", "30.5 and 30.75", "<bdi>torch</bdi>: 2.6 and 2.7"):
        assert words in text
    assert "Nobody has made this run again" in (site / "runs" / f"{old.id}.html").read_text(encoding="utf-8")
    history = (site / "tasks" / "text-ppl.html").read_text(encoding="utf-8").partition('id="history"')[2]
    assert history.index("version 2") < history.index("version 1")
    assert "<code>eeeeeeeeeeee</code>" in history
    assert f'href="../runs/{old.id}.html"' in history


def test_claims_of_an_installed_method_are_judged_by_the_records(maker, tmp_path):
    for name, rate in (("lion", 0.001), ("adamw", 0.01)):
        add(
            maker,
            name, "digits-mlp", {"test-loss": np.linspace(0.1, 0.3, 20)}, kind="optimizer", family="optim",
            facts={"chosen_lr": rate}, params={"lr": rate},
        )  # fmt: skip
    catalog = load_catalog()
    evidence = Evidence(Records(maker.store), catalog)
    by_id = {result.claim.id: result for result in evidence.judged["lion"]}
    assert by_id["best-rate-below-adamw"].verdict == "reproduced"
    assert by_id["no-worse-than-adamw"].verdict == "not attempted"
    badge = evidence.badge("lion")
    assert badge is not None
    assert (badge.kind, badge.text) == ("good", "1/1")
    assert evidence.badge("adamw") is None or evidence.badge("adamw") != badge
    page = build(maker.store, catalog, tmp_path / "site").parent / "methods" / "lion.html"
    text = page.read_text(encoding="utf-8")
    assert 'id="claim-best-rate-below-adamw"' in text
    assert re.search(r'class="verdict good"[^>]*>reproduced<', text)
    assert "79.46" in text  # a number of the paper
    assert "methodbench run --method lion" in text  # the command for what was not attempted
    assert "decoupled decay" in text  # hyperparameters with defaults
    assert "Symbolic Discovery of Optimization Algorithms" in text
    board = (page.parent.parent / "boards" / "optim.html").read_text(encoding="utf-8")
    assert re.search(r'class="verdict good" href="[^"]*methods/lion.html#claims"[^>]*>1/1<', board)


def test_what_links_do_together_stands_on_their_pages(maker, made_up, tmp_path):
    catalog = made_up.make_catalog()
    for name, stage in (("cut", "prune"), ("round", "quantize")):
        catalog.methods[name] = replace(catalog.methods[name], stage=stage)
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 0.3, 64)
    lm = {"model": "tiny-lm", "model_kind": "causal-lm"}
    for name, worse, params in (
        ("nothing", 0.0, {}),
        ("cut", 0.1, {"share": 0.5}),
        ("round", 0.2, {"bits": 3}),
        ("cut + round", 0.5, {"cut.share": 0.5, "round.bits": 3}),
    ):
        family = {"nothing": "baseline", "cut": "mask"}.get(name, "shrink")
        noise = rng.normal(0, 0.01, 64)
        add(
            maker,
            name, "text-ppl", {"perplexity": base + worse + noise}, family=family, baseline=name == "nothing",
            params=params, **lm,
        )  # fmt: skip
    evidence = Evidence(Records(maker.store), catalog)
    (result,), missing = evidence.chains["cut + round"]
    assert missing == ""
    assert result.verdict == "harmful"
    assert result.excess == pytest.approx(-0.2, abs=0.02)
    site = build(maker.store, catalog, tmp_path / "site").parent
    for name in ("cut", "round"):
        text = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        assert "cut + round" in text
        assert "harmful" in text
    assert "harmful" not in (site / "methods" / "skip.html").read_text(encoding="utf-8")


def test_coverage_tells_every_state_and_how_to_fill_the_gap(maker, made_up):
    catalog = made_up.make_catalog()
    lm = {"model": "tiny-lm", "model_kind": "causal-lm"}
    scores = {"perplexity": np.linspace(3.0, 3.3, 8)}
    done = add(maker, "round", "text-ppl", scores, **lm)
    add(maker, "lattice", "text-ppl", status="oom", reason="too large", command="methodbench run --method lattice",
              **lm)  # fmt: skip
    old = add(maker, "search", "text-ppl", scores, **lm)
    add(maker, "cut", "text-ppl", status="timeout", reason="slow", **lm)
    add(maker, "cut", "text-ppl", scores, **lm, seed=1)
    add(
        maker,
        "walk",
        "hill",
        {"test-loss": [1.0, 2.0]},
        kind="optimizer",
    )
    (lm_grid, own) = make_coverage(Records(maker.store, {old.id: "method changed"}), catalog)
    states = {method: lm_grid.cells[method, "text-ppl"].state for method in lm_grid.methods}
    assert states == {
        "round": "ok", "lattice": "oom", "search": "stale", "cut": "timeout", "skip": "never", "unused": "never",
        "nothing": "never",
    } | {name: "not-applicable" for name in states if catalog.methods[name].kind != "compressor"}  # fmt: skip
    assert lm_grid.cells["round", "text-ppl"].run_id == done.id
    assert dict(lm_grid.cells["cut", "text-ppl"].counts) == {"timeout": 1, "ok": 1}
    gaps = {gap.state: gap for gap in lm_grid.gaps}
    assert set(gaps) == {"timeout", "oom", "stale", "never"}
    assert gaps["oom"].commands == ("methodbench run --method lattice --retry",)
    assert gaps["never"].commands == (
        "methodbench run --method nothing --method skip --method unused --model tiny-lm --task text-ppl",
    )
    assert (own.model, own.cells["leap", "hill"].state) == ("", "never")


def test_coverage_of_a_large_database_is_bounded(maker, made_up, monkeypatch):
    from methodbench_leaderboard import coverage

    monkeypatch.setattr(coverage, "MOST_CELLS", 3)
    for name in ("round", "round", "lattice"):
        add(maker, name, "text-ppl", {"perplexity": [3.0, 3.1]}, model="tiny-lm", seed=maker.count)  # fmt: skip
    (grid,) = make_coverage(Records(maker.store), made_up.make_catalog())
    assert len(grid.methods) == 3
    assert {"round", "lattice"} <= set(grid.methods)
    assert grid.left_out > 0


def test_a_model_has_a_page_with_what_probes_measured(maker, made_up, tmp_path):
    catalog = made_up.make_catalog()
    lm = {"model": "tiny-lm", "model_kind": "causal-lm"}
    add(maker, "gauge", "looks", {"acc": np.array([0.25, 0.75])}, kind="probe", family="probes",
              **lm)  # fmt: skip
    add(maker, "nothing", "text-ppl", {"perplexity": [3.0, 3.2]}, baseline=True, family="baseline", model_bytes=128_000,
              weights_digest="f" * 64, **lm)  # fmt: skip
    add(maker, "round", "text-ppl", {"perplexity": [3.0, 3.3]}, **lm)
    site = build(maker.store, catalog, tmp_path / "site").parent
    text = (site / "models" / "tiny-lm.html").read_text(encoding="utf-8")
    assert "Its weights lie on a grid." in text
    assert "128 kB" in text
    assert "f" * 64 in text
    measures = text[text.index('id="measures"') : text.index('id="results"')]
    assert "gauge" in measures
    assert "0.5000" in measures
    assert "round" in text[text.index('id="results"') :]
    assert "gauge" not in text[text.index('id="results"') :]
    assert (site / "models" / "tiny-cnn.html").is_file()


def test_hostile_strings_in_every_field_come_out_inert(maker, made_up, tmp_path):
    evil = f"{made_up.SCRIPT}{made_up.ATTRIBUTE}{made_up.BIDI}{{{{ 7 * 7 }}}}"
    fields = dict.fromkeys(HOSTILE_FIELDS, evil)
    for name in ("method", "task"):
        del fields[name]
    for seed in (0, 1):
        maker.run(
            f"{evil}m", f"{evil}t", {"perplexity": np.linspace(3, 4, 8)}, seed=seed, params={evil: seed},
            facts={evil: evil}, warnings=[evil], task_params={evil: evil}, phases={evil: evil},
            series={evil: [1, 2, 3]}, **fields,
        )  # fmt: skip
    runs = maker.store.runs()
    maker.store.add(
        Run(**runs[0].model_dump(exclude={"id", "witness_of"}), id="a" * 12, witness_of=runs[0].id),
        [_evil_metric("a" * 12, evil)], [],
        Environment(digest="f" * 64, captured_at=made_up.START, data={evil: evil, "deep": {evil: [evil]}}), None,
        Witness(run_id="a" * 12, original=runs[0].id, verdict=evil, tolerance=0.0, parts_at=evil,
                differences=[{"metric": evil, "first": evil, "second": evil}],
                suspects=[{"field": evil, "recorded": evil, "replayed": evil}]),
    )  # fmt: skip
    maker.store.add(
        Run(**runs[0].model_dump(exclude={"id", "environment_digest", "seed"}), id="b" * 12, seed=7,
            environment_digest="f" * 64),
        [_evil_metric("b" * 12, evil)],
    )  # fmt: skip
    site = build(maker.store, made_up.make_catalog(), tmp_path / "site").parent
    pages = list(site.rglob("*.html"))
    kinds = {page.relative_to(site).parts[0] for page in pages}
    assert {
        "models",
        "coverage",
        "coverage.html",
        "models.html",
        "methods",
        "tasks",
        "boards",
        "runs",
    } <= kinds
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<script>" not in text, page
        assert "<img" not in text, page
        assert not set(text) & {"\u202e", "\u2066", "\x07"}, page
    assert sum("&lt;script&gt;" in page.read_text(encoding="utf-8") for page in pages) > 8
