"""Entries: light, frozen descriptions of methods, models and tasks.

An entry is what a plugin registers. It names its implementation as ``"package.module:attribute"``; that module is
imported only where the work is done, so that listing a thousand methods costs nothing. This module imports nothing
but the standard library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]*$")
_QUALIFIED_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._/@-]*)?$")
_IMPL = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")

Direction = Literal["lower", "higher"]
Fidelity = Literal["authors-code", "reimplementation", "paper", "partial", "baseline"]
Aggregate = Literal["mean", "exp-mean", "median", "single"]

#: What a compressor does to a model, in the order in which a chain of compressors goes through it.
STAGES = ("transform", "rotate", "prune", "quantize", "compensate", "finetune")

#: How to read ``Method.fidelity`` on the board.
FIDELITIES: Mapping[str, str] = {
    "authors-code": "parity with the authors' code",
    "reimplementation": "parity with a trusted re-implementation",
    "paper": "written from the paper alone",
    "partial": "only partly specified by the paper",
    "baseline": "a baseline: no paper to be faithful to",
}


class EntryError(ValueError):
    """An entry that contradicts itself; raised while a plugin is loaded."""


def _check_name(kind: str, name: str, pattern: re.Pattern[str] = _NAME) -> None:
    if not pattern.match(name):
        raise EntryError(f"{kind} name {name!r} must be lower case letters, digits, '.', '_' and '-'")


def _check_impl(owner: str, impl: str) -> None:
    if not _IMPL.match(impl):
        raise EntryError(f"{owner}: implementation {impl!r} must read 'package.module:attribute'")


def _check_tuples(owner: str, **fields: tuple[str, ...]) -> None:
    for name, value in fields.items():
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
            raise EntryError(f"{owner}: {name} is {value!r}, not a tuple of names such as ('one',)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """Where a method was published."""

    title: str
    """Title as printed."""
    arxiv: str = ""
    """Number on arXiv, for example ``2306.00978``."""
    venue: str = ""
    """Conference or journal."""
    year: int | None = None
    """Year of publication."""
    authors: str = ""
    """Authors, joined by ``and`` as in BibTeX."""
    code: str = ""
    """``owner/name`` of the authors' repository, or empty."""

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def bibtex(self, key: str) -> str:
        """BibTeX entry under ``key``; fields that are unknown are left out."""
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            "year": str(self.year) if self.year else "",
            "booktitle": self.venue,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv" if self.arxiv else "",
        }
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
        return f"@{'inproceedings' if self.venue else 'misc'}{{{key},\n{body}\n}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number that a task reports.

    ``aggregate`` says how the value follows from the per-unit scores: their mean, the exponential of their mean
    (perplexity from losses per token), their median, or the only score there is.
    """

    name: str
    """Unique within the task."""
    direction: Direction
    """``lower`` or ``higher``: which is better."""
    unit: str = ""
    """Unit of the value, for example ``nats``; empty where there is none."""
    title: str = ""
    """What the board calls it; the name by default."""
    aggregate: Aggregate = "mean"
    """``mean``, ``exp-mean``, ``median`` or ``single``."""
    primary: bool = False
    """True for the one metric that the task ranks by."""

    def __post_init__(self) -> None:
        _check_name("metric", self.name)
        if self.direction not in ("lower", "higher"):
            raise EntryError(f"metric {self.name}: direction is {self.direction!r}, not 'lower' or 'higher'")

    @property
    def label(self) -> str:
        return self.title or self.name.replace("-", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Where the points of a task's curves lie: every so many steps, or where a setting of the task lists them.

    A curve without an axis is drawn over the numbers of its points, from 0.
    """

    series: str
    """Name of the curve, a key of an evaluation's ``series``."""
    label: str = "step"
    """What the axis counts."""
    every: str = ""
    """Setting of the task that says how far apart points are; 1 where there is none."""
    last: str = ""
    """Setting that says where the last point lies at most."""
    at: str = ""
    """Setting that lists where each point lies, in place of the two above."""

    def positions(self, settings: Mapping[str, Any], count: int) -> list[float] | None:
        """Return where ``count`` points lie; None where the settings, which strangers may have written, do not say
        so."""
        try:
            if self.at:
                listed = settings.get(self.at)
                places = (
                    [float(value) for value in listed[:count]] if isinstance(listed, list | tuple) else []
                )
            else:
                every = float(settings.get(self.every, 0)) if self.every else 1.0
                last = float(settings.get(self.last) or math.inf)
                places = [min(index * every, last) for index in range(count)] if every > 0 else []
        except (TypeError, ValueError, OverflowError):
            return None
        return places if len(places) == count and all(map(math.isfinite, places)) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one cell takes of a machine; executors start it only where and when that is free."""

    cores: int = 1
    """CPU cores, where they are more than the task's threads (helper processes)."""
    memory: float = 0.0
    """GiB of main memory; 0 where it does not matter."""
    gpus: int = 0
    """GPUs. A cell on a ``cuda`` device has at least one."""

    def __post_init__(self) -> None:
        if self.cores < 1 or self.memory < 0 or self.gpus < 0:
            raise EntryError(f"{self} must ask for at least one core, and for nothing negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A published technique, or a baseline."""

    name: str
    """Unique among all plugins."""
    kind: str
    """One of :data:`methodbench.kinds.KIND_NAMES`."""
    family: str
    """The board that the method appears on; see :class:`Family`."""
    impl: str
    """``"package.module:Class"`` of an implementation of its kind; see :mod:`methodbench.protocols`."""
    summary: str
    """What it does, in one sentence."""
    applies_to: tuple[str, ...] = ()
    """Kinds of models, ``("*",)`` for every one; empty for what trains whatever a task gives it (optimizers)."""
    paper: Paper | None = None
    """Where it was published; None for what has no paper."""
    needs: tuple[str, ...] = ()
    """What it asks of the engine, for example ``"calibration"`` or ``"closure"``."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named settings: hyperparameters by the name of the preset."""
    claims: str = ""
    """File name of the paper's numbers, beside the plugin in ``claims/``."""
    fidelity: Fidelity = "paper"
    """One of :data:`FIDELITIES`: what it was checked against."""
    parity: str = ""
    """What it was compared with: repository and commit of the code that made the vectors."""
    vectors: tuple[str, ...] = ()
    """Parity vectors that its tests compare it with, as ``family/name``; see :mod:`methodbench.parity`."""
    properties: tuple[str, ...] = ()
    """What it promises, in the vocabulary of :mod:`methodbench.properties`."""
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    """Checks of the contract suite that it is known to fail, with the reason."""
    check_params: Mapping[str, Any] = field(default_factory=dict)
    """What the contract suite sets on its planted models where the defaults take minutes, for example fewer steps."""
    baseline: bool = False
    """True for the do-nothing row that a board pins and compares everything with."""
    positions: str = ""
    """Which tokens it touches, where that matters for ranking (``prefill``, ``decode``, ``last-99%``). A name in braces
    stands for a hyperparameter: ``{positions}``."""
    extra: str = ""
    """The optional dependency that it needs."""
    resources: Resources = Resources()
    """What one cell takes of a machine on account of the method."""
    stage: str = ""
    """Of a compressor, one of :data:`STAGES`: where it stands in a chain; empty when it cannot be chained."""
    links: tuple[Method, ...] = ()
    """Of a chain (see :mod:`methodbench.composition`), what it applies one after the other; plugins leave it empty."""

    def __post_init__(self) -> None:
        for name in self.name.split(" + ") if self.links else [self.name]:
            _check_name("method", name)
        _check_name("family", self.family)
        _check_impl(f"method {self.name}", self.impl)
        if self.stage and self.stage not in STAGES:
            raise EntryError(f"method {self.name}: stage {self.stage!r} is not one of {', '.join(STAGES)}")
        _check_tuples(
            f"method {self.name}",
            applies_to=self.applies_to,
            needs=self.needs,
            vectors=self.vectors,
            properties=self.properties,
        )
        if self.fidelity not in FIDELITIES:
            raise EntryError(
                f"method {self.name}: fidelity {self.fidelity!r} is not one of {', '.join(FIDELITIES)}"
            )
        for preset in self.presets:
            _check_name(f"method {self.name}: preset", preset)

    def touches(self, params: Mapping[str, Any]) -> str:
        """Return :attr:`positions` at given hyperparameters; those of a chain carry the link's name."""
        if self.links:
            told = (
                link.touches({key.removeprefix(f"{link.name}."): value for key, value in params.items()})
                for link in self.links
            )
            return ", ".join(dict.fromkeys(filter(None, told)))
        return re.sub(r"\{(\w+)\}", lambda found: str(params.get(found[1], found[0])), self.positions)

    @property
    def implementations(self) -> tuple[str, ...]:
        """Everything that runs: the implementation, and those of the links of a chain."""
        return (self.impl, *(link.impl for link in self.links))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A trained model: where its weights come from, and what loads them."""

    name: str
    """Unique among all plugins; a qualified name (``scheme:name``) where a plugin describes it on demand."""
    kind: str
    """What it is to a method: ``causal-lm``, ``vit``, ``cnn``, ``sentence-encoder`` ..."""
    source: str
    """``hub:``, ``pypi:``, ``file:``, ``recipe:`` or ``builtin:``; see :mod:`methodbench.sources`."""
    loader: str
    """``"package.module:Class"`` of a :class:`methodbench.protocols.ModelLoader`."""
    summary: str
    """What it is, in one sentence."""
    sha256: str = ""
    """Digest of the file at ``source``, checked after every fetch."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the loader; part of the model's identity."""
    licence: str = ""
    """Licence of the weights."""
    notes: str = ""
    """What a reader must know before trusting numbers on it."""
    extra: str = ""
    """The optional dependency that it needs."""

    def __post_init__(self) -> None:
        _check_name("model", self.name, _QUALIFIED_NAME)
        _check_impl(f"model {self.name}", self.loader)
        if ":" not in self.source:
            raise EntryError(f"model {self.name}: source {self.source!r} has no scheme")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A protocol: data, procedure and metrics, under a version."""

    name: str
    """Unique among all plugins; a qualified name (``scheme:name``) where a plugin describes it on demand."""
    kinds: tuple[str, ...]
    """Kinds of methods that it evaluates."""
    impl: str
    """``"package.module:Class"`` of a task; see :mod:`methodbench.protocols`."""
    summary: str
    """What it measures, on what, in one sentence."""
    metrics: tuple[Metric, ...]
    """What it reports; exactly one is primary."""
    protocol: int
    """Version of the procedure; records of another version are never compared with it."""
    accepts: tuple[str, ...] = ()
    """Kinds of models; empty where the task brings its own."""
    data: str = ""
    """Source of the data; ``file:`` sources that are absent make the task unavailable, with that reason."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fixed arguments of the implementation; part of the task's identity."""
    threads: int = 2
    """CPU threads of one cell, part of its identity. The count is fixed, whatever the machine has: sums are split by
    thread, and what is rounded differently in the last bits can grow (an error-compensating quantizer at 3 bits
    moves a perplexity by several per cent). A machine with more cores runs more cells side by side; a suite may ask
    for another count, which makes other cells."""
    tuned_by: str = ""
    """Metric by which hyperparameters are chosen (see :mod:`methodbench.engine.tuning`), one that test data has no part
    in; the primary one by default, which is right only where there is no test data."""
    extra: str = ""
    """The optional dependency that it needs."""
    resources: Resources = Resources()
    """What one cell takes of a machine on account of the task."""
    axes: tuple[Axis, ...] = ()
    """Where the points of its curves lie, for those that are not drawn over the numbers of their points."""

    def __post_init__(self) -> None:
        _check_name("task", self.name, _QUALIFIED_NAME)
        _check_impl(f"task {self.name}", self.impl)
        if self.threads < 1:
            raise EntryError(f"task {self.name}: threads {self.threads} must be 1 or more")
        _check_tuples(f"task {self.name}", kinds=self.kinds, accepts=self.accepts)
        if self.protocol < 1:
            raise EntryError(f"task {self.name}: protocol version {self.protocol} must be 1 or more")
        if sum(metric.primary for metric in self.metrics) != 1:
            raise EntryError(f"task {self.name}: exactly one metric must be primary")
        if self.tuned_by and all(metric.name != self.tuned_by for metric in self.metrics):
            raise EntryError(
                f"task {self.name}: tuned_by names {self.tuned_by!r}, which is none of its metrics"
            )

    @property
    def primary(self) -> Metric:
        return next(metric for metric in self.metrics if metric.primary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A board: methods that a reader would choose between."""

    name: str
    """What methods give as their ``family``."""
    title: str
    """Heading of the board."""
    summary: str
    """What the board is about, in one sentence."""

    def __post_init__(self) -> None:
        _check_name("family", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteFile:
    """A comparison that a plugin ships: a YAML or TOML file inside its package."""

    name: str
    """What ``methodbench run`` calls it."""
    package: str
    """Import package that holds the file."""
    path: str
    """File inside ``package``, with forward slashes."""
    summary: str
    """What it compares, in one sentence."""
    role: Literal["", "demo", "demo-quick"] = ""
    """``methodbench demo`` runs every suite of role ``demo``, ``demo --quick`` every one of role ``demo-quick``."""

    def __post_init__(self) -> None:
        _check_name("suite", self.name)
