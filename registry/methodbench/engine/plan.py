"""From suites to cells: what will run, what is done already, and what is skipped, with the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from methodbench import sources
from methodbench.composition import join_params, link_params
from methodbench.engine.cell import Cell
from methodbench.engine.probe import Question, resolve_all
from methodbench.entries import Method, Model, Task
from methodbench.errors import MethodbenchError, MissingExtraError, SourceError
from methodbench.extras import missing_requirements
from methodbench.provenance import digest, source_digest
from methodbench.tuning import labelled

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.suite import Comparison, Suite, Tuning


@dataclass(frozen=True, slots=True)
class Skip:
    """A combination of the grid that is not run, with the reason."""

    method: str
    variant: str
    model: str
    task: str
    reason: str


@dataclass(slots=True)
class Study:
    """Trials of one method on one question; the best of them is run again (see :mod:`methodbench.engine.tuning`)."""

    variant: str
    tuning: Tuning
    seeds: Sequence[int]
    """Seeds that the best is run under."""
    trials: list[list[Cell]] = field(default_factory=list)
    """The cells of each trial, one per seed of the trials; they are among the cells of the plan."""
    points: list[Mapping[str, Any]] = field(default_factory=list)
    """The hyperparameters that each trial sets."""


@dataclass(slots=True)
class Plan:
    """Every cell of a suite, once, in the order of the suite."""

    suite: str
    cells: list[Cell] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    """Trials after which further cells follow."""


@dataclass(slots=True)
class _Setting:
    """A model and a task with its settings: what many cells share."""

    model: Model | None
    task: Task
    passed: Mapping[str, Any]
    comparison: Comparison

    def questions(self) -> list[Question]:
        own = [Question(self.task.name, self.task.impl, {**self.task.options, **self.passed})]
        if self.model:
            own.append(Question(self.model.name, self.model.loader, self.model.options))
        return own


@dataclass(slots=True)
class _Draft:
    """A cell before its parameters are completed."""

    method: Method
    variant: str
    params: Mapping[str, Any]
    setting: _Setting
    seeds: Sequence[int]
    tuning: Mapping[str, Any] = field(default_factory=dict)
    study: Study | None = None

    def questions(self) -> list[Question]:
        asked = link_params(self.method, self.params)
        return [Question(link.name, link.impl, params) for link, params in asked]


def make_plan(suite: Suite, catalog: Catalog) -> Plan:
    """Expand a suite into cells.

    Raises:
        UnknownNameError: a method, preset, model or task that no plugin knows.
        ParameterError: a hyperparameter that does not exist or lies outside its range.
        MissingExtraError: a plugin's optional dependencies are not installed.
    """
    plan = Plan(suite.name)
    with no_collection():
        drafts: list[_Draft] = []
        for comparison in suite.comparisons:
            expanded = _expand(comparison, catalog, plan)
            drafts += _tuned(expanded, comparison.tuning, plan) if comparison.tuning else expanded
        settings = {id(draft.setting): draft.setting for draft in drafts}
        asked = [draft.questions() for draft in drafts]
        shared = {key: setting.questions() for key, setting in settings.items()}
        everything = list(itertools.chain(*asked, *shared.values()))
        answered = iter(resolve_all(everything))
        own = [list(itertools.islice(answered, len(questions))) for questions in asked]
        common = {key: list(itertools.islice(answered, len(questions))) for key, questions in shared.items()}
        made = {}
        seen: set[str] = set()
        for draft, answers in zip(drafts, own, strict=True):
            key = id(draft.setting)
            params = join_params(draft.method, _given(answers))
            if key not in made:
                made[key] = _shared_fields(draft.setting, _given(common[key]), suite.name)
            if draft.study is not None:
                draft.study.trials.append([])
            for seed in draft.seeds:
                cell = Cell(
                    method=draft.method,
                    variant=draft.variant,
                    params_passed=draft.params,
                    params=params,
                    seed=seed,
                    method_digest=method_digest(draft.method),
                    tuning=draft.tuning,
                    **made[key],
                )
                if draft.study is not None:
                    draft.study.trials[-1].append(cell)
                if cell.key not in seen:
                    seen.add(cell.key)
                    plan.cells.append(cell)
    return plan


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking again and again at what is being made, and holds no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _expand(comparison: Comparison, catalog: Catalog, plan: Plan) -> list[_Draft]:
    drafts = []
    models = [catalog.model(name) for name in comparison.models]
    tasks = [(catalog.task(use.name), use.params) for use in comparison.tasks]
    methods = [
        (method, use.variants(method)) for use in comparison.methods if (method := catalog.method(use.name))
    ]
    for task, passed in tasks:
        # A task that brings its own model is run once, whatever models stand beside it in the suite.
        for model in models if task.accepts and models else [None]:
            setting = _Setting(model, task, passed, comparison)
            unavailable = _unavailable(model, task)
            for method, variants in methods:
                names = (method.name, model.name if model else "", task.name)
                kept = [
                    (variant, params)
                    for variant, params in variants
                    if not comparison.excludes(names[0], variant, *names[1:])
                ]
                reason = (
                    catalog.mismatch(method, model, task)
                    or unavailable
                    or _without_gpu(method, task, comparison.device)
                )
                if reason:
                    plan.skips += [Skip(names[0], variant, *names[1:], reason) for variant, _ in kept]
                elif kept:
                    for link in method.links or (method,):
                        _check_extra(catalog, "method", link)
                    for kind, entry in (("model", model), ("task", task)):
                        if entry is not None:
                            _check_extra(catalog, kind, entry)
                    drafts += [
                        _Draft(method, variant, params, setting, comparison.seeds) for variant, params in kept
                    ]
    return drafts


def _tuned(drafts: list[_Draft], tuning: Tuning, plan: Plan) -> list[_Draft]:
    """Return the trials in place of each draft, and add its study to the plan; what tunes itself stays.

    Raises:
        MethodbenchError: a chain, which declares no space.
    """
    chain = next((draft.method.name for draft in drafts if draft.method.links), "")
    if chain:
        raise MethodbenchError(
            f"{chain}: a chain declares no space to tune it in", "Tune its links one by one."
        )
    drawn = (tuning.trials, tuning.seed)
    asked = [Question(one.method.name, one.method.impl, one.params, points=drawn) for one in drafts]
    found = []
    for draft, answer in zip(drafts, _given(resolve_all(asked)), strict=True):
        points = answer["points"]
        if not points:
            label, how = labelled(draft.variant, "self-tuning"), {"regime": "self-tuning"}
            found.append(dataclasses.replace(draft, variant=label, tuning=how))
            continue
        study = Study(draft.variant, tuning, draft.seeds, points=points)
        plan.studies.append(study)
        for number, point in enumerate(points, 1):
            found.append(
                dataclasses.replace(
                    draft,
                    variant=labelled(draft.variant, "trial", number),
                    params={**draft.params, **point},
                    seeds=tuning.trial_seeds,
                    tuning={
                        "regime": "trial",
                        "number": number,
                        "trials": tuning.trials,
                        "seed": tuning.seed,
                    },
                    study=study,
                )
            )
    return found


def _unavailable(model: Model | None, task: Task) -> str:
    """Return why weights or data cannot be had on this machine, or an empty string."""
    for source in (model.source if model else "", task.data):
        if source.startswith("file:"):
            try:
                sources.fetch(source)
            except SourceError as error:
                return f"{error.message}. {error.hint}".strip()
    return ""


def _without_gpu(method: Method, task: Task, device: str) -> str:
    """Return why a cell cannot run on the CPU, or an empty string."""
    if device == "cpu":
        for kind, entry in (("method", method), ("task", task)):
            if entry.resources.gpus:
                return f"{kind} {entry.name} needs a GPU, and the suite asks for the device cpu"
    return ""


def _given(answers: Iterable[dict[str, Any] | MethodbenchError]) -> list[dict[str, Any]]:
    """Return answers that are none of them an error."""
    given = []
    for answer in answers:
        if isinstance(answer, MethodbenchError):
            raise answer
        given.append(answer)
    return given


def _shared_fields(setting: _Setting, answers: list[dict[str, Any]], suite: str) -> dict[str, Any]:
    """Return the fields that the cells of a setting share."""
    model, task, comparison = setting.model, setting.task, setting.comparison
    return {
        "model": model,
        "task": task,
        "task_passed": dict(setting.passed),
        "task_params": answers[0],
        "dtype": comparison.dtype,
        "device": comparison.device,
        "threads": comparison.threads or task.threads,
        "timeout": comparison.timeout,
        "suite": suite,
        "weights_digest": weights_digest(model, answers[1]) if model else "",
        "data_digest": data_digest(task.data),
    }


def method_digest(method: Method) -> str:
    """Return the identity of a method's source; of a chain, that of every link in its order."""
    if not method.links:
        return source_digest(method.impl)
    return digest([source_digest(implementation) for implementation in method.implementations])


def weights_digest(model: Model, options: Mapping[str, Any]) -> str:
    """Return the identity of a model's weights: their source, the loader's source code and its arguments."""
    return digest(
        {
            "source": _source_identity(model.source, model.sha256),
            "loader": source_digest(model.loader),
            "options": dict(options),
        }
    )


def data_digest(source: str) -> str:
    """Return the identity of a task's data; empty for data that the protocol itself generates."""
    return digest(_source_identity(source, "")) if source else ""


@functools.cache
def _source_identity(source: str, sha256: str) -> str:
    scheme = source.partition(":")[0]
    if scheme == "builtin":
        # What ships with the interpreter or a package changes with its version.
        package = source.partition(":")[2].partition("/")[0].partition(".")[0]
        try:
            return f"{source} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{source} python {platform.python_version()}"
    if sha256 or scheme == "recipe":
        return f"{source} {sha256}".strip()
    return f"{source} {sources.fetch(source).digest}"


def _check_extra(catalog: Catalog, kind: str, entry: Method | Model | Task) -> None:
    distribution = catalog.distribution(kind, entry.name)
    for requirement in missing_requirements(distribution, entry.extra):
        raise MissingExtraError(f"{kind} {entry.name}", requirement, f"{distribution}[{entry.extra}]")
