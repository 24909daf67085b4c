"""A made-up database and catalogue with everything that a board must cope with: read by tests of two folders.

Scores are drawn from seeded generators; methods, models and tasks are invented.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from methodbench.catalog import Catalog, load_catalog
from methodbench.entries import Family, Method, Metric, Model, Paper, Task
from methodbench.pictures import FACT, facts_of
from methodbench.protocols import Shown
from methodbench.stats import aggregate, bootstrap_interval
from methodbench.store import Environment, MetricValue, Run, Series, Store, open_store

SCRIPT = "<script>window.pwned=1</script>"
ATTRIBUTE = "\"><img src=x onerror='window.pwned=1'>"
#: Turns the direction of text, ends it again, and rings a bell.
BIDI = "safe\u202egnp.exe\u2066\u0007"
LONG = "word" * 2500

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

#: name: (direction, aggregate, title, unit)
METRICS: dict[str, tuple[str, str, str, str]] = {
    "perplexity": ("lower", "exp-mean", "", ""),
    "acc": ("higher", "mean", "accuracy", ""),
    "acc-norm": ("higher", "mean", "accuracy, normalized by length", ""),
    "test-loss": ("lower", "mean", "test loss", "nats"),
    "steps": ("lower", "single", "steps to target", "steps"),
    "insertion": ("higher", "mean", "insertion AUC", ""),
}


def make_catalog() -> Catalog:
    """Return a catalogue of invented entries, without any installed plugin."""
    catalog = load_catalog(points=())
    families = [
        Family(name="baseline", title="Baselines", summary="Nothing is done."),
        Family(name="shrink", title="Shrinking", summary="Fewer bits for each weight."),
        Family(name="mask", title="Masking", summary="Fewer weights."),
        Family(name="descend", title="Descending", summary="Steps downhill."),
        Family(name="explain", title="Explaining", summary="Maps of what mattered."),
    ]
    paper = Paper(
        title="Rounding & its <discontents>", arxiv="2001.00001", venue="Journal", year=2020, authors="A. Author",
        code="author/code",
    )  # fmt: skip
    compressor: dict[str, Any] = {"kind": "compressor", "impl": "toy:Toy", "applies_to": ("causal-lm",)}
    methods = [
        Method(name="nothing", kind="compressor", family="baseline", impl="toy:Toy", summary="The model as it is.",
               applies_to=("*",), baseline=True, fidelity="authors-code"),
        Method(name="round", family="shrink", summary="Rounds.", paper=paper, fidelity="authors-code",
               parity="author/code@1234567", presets={"b4": {"bits": 4}, "b3": {"bits": 3}}, **compressor),
        Method(name="lattice", family="shrink", summary="Rounds together.", fidelity="reimplementation", **compressor),
        Method(name="search", family="shrink", summary="Searches.", fidelity="partial", **compressor),
        Method(name="cut", family="mask", summary="Cuts.", positions="prefill", **compressor),
        Method(name="skip", family="mask", summary="Skips.", positions="decode", **compressor),
        Method(name="unused", family="mask", summary="Has no runs.", **compressor),
        *(Method(name=name, kind="optimizer", family="descend", impl="toy:Toy", summary="Steps.")
          for name in ("walk", "run", "leap", "crawl")),
        Method(name="glow", kind="explainer", family="explain", impl="toy:Toy", summary="Glows.", applies_to=("cnn",)),
        Method(name="noise", kind="explainer", family="explain", impl="toy:Toy", summary="A control.",
               applies_to=("cnn",), baseline=True),
    ]  # fmt: skip
    tasks = [
        _task("text-ppl", "compressor", ("perplexity",), ("causal-lm",)),
        _task("choice-acc", "compressor", ("acc", "acc-norm"), ("causal-lm",)),
        _task("hill", "optimizer", ("test-loss", "steps"), ()),
        _task("valley", "optimizer", ("test-loss",), ()),
        _task("insert", "explainer", ("insertion",), ("cnn",)),
    ]
    models = [
        Model(name="tiny-lm", kind="causal-lm", source="builtin:", loader="toy:Load", summary="A tiny model.",
              notes="Its weights lie on a grid.", licence="MIT"),
        Model(name="tiny-cnn", kind="cnn", source="builtin:", loader="toy:Load", summary="A tiny network."),
    ]  # fmt: skip
    catalog.families.update({entry.name: entry for entry in families})
    catalog.methods.update({entry.name: entry for entry in methods})
    catalog.tasks.update({entry.name: entry for entry in tasks})
    catalog.models.update({entry.name: entry for entry in models})
    return catalog


def _task(name: str, kind: str, metrics: tuple[str, ...], accepts: tuple[str, ...]) -> Task:
    return Task(
        name=name, kinds=(kind,), impl="toy:Task", summary=f"Measures {metrics[0]}.", protocol=1, accepts=accepts,
        metrics=tuple(
            Metric(name=metric, direction=METRICS[metric][0], aggregate=METRICS[metric][1], title=METRICS[metric][2],
                   unit=METRICS[metric][3], primary=metric == metrics[0])
            for metric in metrics
        ),
    )  # fmt: skip


class Maker:
    """Writes runs one after another, a minute apart."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.count = 0
        self.environment = Environment(
            digest="e" * 64,
            captured_at=START,
            data={"python": "3.12.1", "machine": "x86_64", "packages": {"numpy": "2.0.0", "torch": "2.6.0"}},
        )

    def run(
        self,
        method: str,
        task: str,
        scores: dict[str, Any] | None = None,
        *,
        series: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Run:
        """Add one run; ``scores`` holds the primary metric first."""
        self.count += 1
        params = fields.setdefault("params", {})
        identity = {name: fields.get(name, "") for name in ("model", "seed", "protocol")}
        identity |= {"method": method, "task": task, "params": params, "device_class": "cpu"}
        run = Run(
            **{
                "id": hashlib.sha256(str(self.count).encode()).hexdigest()[:12],
                "cell_key": hashlib.sha256(repr(identity).encode()).hexdigest(),
                "identity": identity,
                "status": "ok" if scores else "failed",
                "method": method,
                "kind": "compressor",
                "family": "shrink",
                "params_passed": params,
                "task": task,
                "task_params": {"window": 512},
                "protocol": 1,
                "method_digest": "m" * 64,
                "environment_digest": self.environment.digest,
                "methodbench_version": "0.1.0",
                "suite": "toy",
                "command": f"methodbench run --method {method} --task {task} --seed {fields.get('seed', 0)}",
                "started_at": START + timedelta(minutes=self.count),
                "wall_seconds": 1.0 + self.count / 10,
                "phases": {"load": 0.1, "evaluate": 0.9},
                "peak_memory_bytes": 500_000_000 + self.count,
            }
            | fields
        )
        metrics = [
            _metric(run.id, name, np.asarray(values), i == 0)
            for i, (name, values) in enumerate((scores or {}).items())
        ]
        curves = [
            Series(run_id=run.id, name=name, values=np.asarray(points, dtype="<f8").tobytes())
            for name, points in (series or {}).items()
        ]
        self.store.add(run, metrics, curves, self.environment)
        return run


def _metric(run_id: str, name: str, scores: np.ndarray, primary: bool) -> MetricValue:
    direction, how, title, unit = METRICS[name]
    value = aggregate(scores, how)
    low, high = bootstrap_interval(scores, how) or (None, None)
    return MetricValue(
        run_id=run_id, name=name, title=title, unit=unit, direction=direction, aggregate=how, primary=primary,
        value=None if np.isnan(value) else value, low=low, high=high, units=scores.size,
        scores=scores.astype("<f8").tobytes(),
    )  # fmt: skip


def pictures(seed: int) -> list[dict[str, str]]:
    """Return two kept pictures, the same for every seed but for the maps, and one that is no picture."""
    colours, maps = np.random.default_rng(7), np.random.default_rng(seed)
    drawn = [
        Shown(name, colours.integers(0, 256, (24, 32, 3), dtype=np.uint8), maps.random((24, 32)))
        for name in ("a hill", ATTRIBUTE)
    ]
    bad = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>").decode()
    return [*facts_of(drawn), {"name": "bad", "picture": bad, "overlay": bad}]


def fill(path: Path) -> Store:
    """Write the made-up runs to a new database at ``path``."""
    store = open_store(str(path))
    maker = Maker(store)
    rng = np.random.default_rng(3)
    windows = rng.normal(3.2, 0.3, 64)
    answers = rng.random(200)
    lm: dict[str, Any] = {
        "model": "tiny-lm",
        "model_kind": "causal-lm",
        "throughput": 900.0,
        "throughput_unit": "tokens/s",
    }

    def compressed(method: str, worse: float, bits: float, seed: int = 0, **fields: Any) -> None:
        common = lm | {
            "seed": seed, "storage": "real", "bits_per_weight": bits, "model_bytes": int(bits * 4e6),
        } | fields  # fmt: skip
        noise = np.random.default_rng(int(worse * 100) + seed).normal(0, 0.02, 64)
        maker.run(method, "text-ppl", {"perplexity": windows + worse + noise}, **common)
        right = (answers < 0.7 - worse / 5).astype(float)
        maker.run(method, "choice-acc", {"acc": right, "acc-norm": 1 - right}, **common)

    compressed("nothing", 0, 32.0, family="baseline", baseline=True, storage="dense")
    compressed("round", 0.12, 4.25, variant="b4", params={"bits": 4})
    compressed("round", 0.7, 3.25, variant="b3", params={"bits": 3})
    compressed("lattice", 0.06, 4.25, variant="b4", params={"bits": 4})
    compressed("lattice", 0.3, 3.25, variant="b3", params={"bits": 3})
    for seed in range(3):
        compressed("search", 0.28, 3.5, seed, variant="b3", params={"bits": 3, "draws": 10})
    # Two configurations with equal scores share a rank.
    for name in ("cut", "skip"):
        compressed(
            name,
            0.4,
            32.0,
            family="mask",
            storage="simulated",
            accounted_bits=16.0,
            params={"share": 0.5, "of": name},
        )
    compressed(
        "cut", 0.41, 32.0, family="mask", storage="simulated", accounted_bits=15.0, params={"share": 0.53}
    )
    shrink: dict[str, Any] = {**lm, "family": "shrink"}
    maker.run(
        "round", "text-ppl", {"perplexity": np.full(64, 800.0)}, params={"bits": 1}, variant="b1", **shrink
    )
    maker.run(
        "lattice",
        "text-ppl",
        status="oom",
        reason="needed 9 GB, 6 GB were free",
        params={"bits": 2},
        variant="b2",
        **shrink,
    )
    maker.run(
        "lattice", "choice-acc", {"acc": np.full(200, np.nan)}, params={"bits": 2}, variant="b2", **shrink
    )
    # An earlier protocol, and a failure that a later run of the same cell has mended.
    maker.run(
        "round",
        "text-ppl",
        status="failed",
        reason="interrupted",
        params={"bits": 4},
        variant="b4",
        started_at=START - timedelta(days=1),
        **shrink,
    )
    maker.run("round", "text-ppl", {"perplexity": windows}, params={"bits": 4}, variant="b4", protocol=0,
              started_at=START - timedelta(days=2), **shrink)  # fmt: skip
    maker.run(
        f"evil{SCRIPT}", "text-ppl", status="failed", reason=f"{SCRIPT}{ATTRIBUTE}{BIDI}{LONG}",
        variant=f"{ATTRIBUTE}{BIDI}",
        params={SCRIPT: ATTRIBUTE}, command=f"methodbench run {ATTRIBUTE}", log_tail=f"</pre>{SCRIPT}\n=cmd",
        warnings=[SCRIPT], facts={ATTRIBUTE: [SCRIPT, BIDI, "half \ud800"]}, suite=SCRIPT, **shrink,
    )  # fmt: skip

    steps = np.arange(120)
    unit_losses = rng.gamma(2.0, 0.2, 50)
    for place, name in enumerate(("walk", "run", "leap")):
        for seed in range(3):
            wobble = np.random.default_rng(seed + 10 * place)
            curve = np.exp(-steps / (20 + 15 * place)) + 0.05 + wobble.random(120) * 0.02
            for task in ("hill", "valley"):
                scores: dict[str, Any] = {
                    "test-loss": unit_losses + 0.05 * place + wobble.normal(0, 0.01, 50)
                }
                if task == "hill":
                    scores["steps"] = [40.0 + 10 * place + seed]
                if (name, task, seed) == ("leap", "valley", 2):
                    scores["test-loss"] = np.full(50, np.inf)
                    curve = np.where(steps < 30, curve * 10.0**steps, np.inf)
                maker.run(name, task, scores, series={"loss": curve}, seed=seed, kind="optimizer", family="descend",
                          params={"lr": 0.1})  # fmt: skip
    maker.run("crawl", "hill", status="timeout", reason="ran longer than 60 s", kind="optimizer", family="descend",
              params={"lr": 1e-9})  # fmt: skip
    vision: dict[str, Any] = {
        "kind": "explainer",
        "family": "explain",
        "model": "tiny-cnn",
        "model_kind": "cnn",
    }
    maker.run(
        "noise",
        "insert",
        {"insertion": rng.random(30) * 0.5},
        baseline=True,
        facts={FACT: pictures(0)},
        **vision,
    )
    maker.run(
        "glow",
        "insert",
        {"insertion": rng.random(30)},
        series={"insertion": np.linspace(0, 1, 11)},
        facts={FACT: pictures(1), "steps": 10},
        **vision,
    )
    maker.run("round", "insert", status="not-applicable", reason="round applies to causal-lm; tiny-cnn is a cnn",
              **{**vision, "kind": "compressor", "family": "shrink"})  # fmt: skip
    return store
