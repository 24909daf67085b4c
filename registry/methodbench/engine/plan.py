"""From suites to cells: what will run, what is done already, and what is skipped, with the reason."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import platform
from collections.abc import Iterable, Mapping
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

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.suite import Comparison, Suite


@dataclass(frozen=True, slots=True)
class Skip:
    """A combination of the grid that is not run, with the reason."""

    method: str
    variant: str
    model: str
    task: str
    reason: str


@dataclass(slots=True)
class Plan:
    """Every cell of a suite, once, in the order of the suite."""

    suite: str
    cells: list[Cell] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


@dataclass(slots=True)
class _Draft:
    """A cell before its parameters are completed."""

    method: Method
    variant: str
    params: Mapping[str, Any]
    model: Model | None
    task: Task
    task_passed: Mapping[str, Any]
    comparison: Comparison

    def questions(self) -> Iterable[Question]:
        for link, params in link_params(self.method, self.params):
            yield Question(link.name, link.impl, params)
        yield Question(self.task.name, self.task.impl, {**self.task.options, **self.task_passed})
        if self.model:
            yield Question(self.model.name, self.model.loader, self.model.options)


def make_plan(suite: Suite, catalog: Catalog) -> Plan:
    """Expand a suite into cells.

    Raises:
        UnknownNameError: a method, preset, model or task that no plugin knows.
        ParameterError: a hyperparameter that does not exist or lies outside its range.
        MissingExtraError: a plugin's optional dependencies are not installed.
    """
    plan = Plan(suite.name)
    drafts: list[_Draft] = []
    for comparison in suite.comparisons:
        drafts += _expand(comparison, catalog, plan)
    for draft in drafts:
        for method in draft.method.links or (draft.method,):
            _check_extra(catalog, "method", method)
        for kind, entry in (("model", draft.model), ("task", draft.task)):
            if entry is not None:
                _check_extra(catalog, kind, entry)
    asked = [list(draft.questions()) for draft in drafts]
    answered = iter(resolve_all([question for questions in asked for question in questions]))
    seen: set[str] = set()
    for draft, questions in zip(drafts, asked, strict=True):
        answers = []
        for answer in itertools.islice(answered, len(questions)):
            if isinstance(answer, MethodbenchError):
                raise answer
            answers.append(answer)
        for seed in draft.comparison.seeds:
            cell = _cell(draft, answers, seed, suite.name)
            if cell.key not in seen:
                seen.add(cell.key)
                plan.cells.append(cell)
    return plan


def _expand(comparison: Comparison, catalog: Catalog, plan: Plan) -> list[_Draft]:
    drafts = []
    models = [catalog.model(name) for name in comparison.models]
    tasks = [(catalog.task(use.name), use.params) for use in comparison.tasks]
    for task, task_passed in tasks:
        # A task that brings its own model is run once, whatever models stand beside it in the suite.
        for model in models if task.accepts and models else [None]:
            for use in comparison.methods:
                method = catalog.method(use.name)
                for variant, params in use.variants(method):
                    names = (method.name, variant, model.name if model else "", task.name)
                    if comparison.excludes(*names):
                        continue
                    reason = (
                        catalog.mismatch(method, model, task)
                        or _unavailable(model, task)
                        or _without_gpu(method, task, comparison.device)
                    )
                    if reason:
                        plan.skips.append(Skip(*names, reason))
                    else:
                        drafts.append(_Draft(method, variant, params, model, task, task_passed, comparison))
    return drafts


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


def _cell(draft: _Draft, answers: list[dict[str, Any]], seed: int, suite: str) -> Cell:
    model = draft.model
    links = len(draft.method.links) or 1
    of_links, (task_params, *model_options) = answers[:links], answers[links:]
    return Cell(
        method=draft.method,
        variant=draft.variant,
        params_passed=dict(draft.params),
        params=join_params(draft.method, of_links),
        model=model,
        task=draft.task,
        task_passed=dict(draft.task_passed),
        task_params=task_params,
        seed=seed,
        dtype=draft.comparison.dtype,
        device=draft.comparison.device,
        threads=draft.comparison.threads or draft.task.threads,
        timeout=draft.comparison.timeout,
        suite=suite,
        method_digest=method_digest(draft.method),
        weights_digest=weights_digest(model, model_options[0]) if model else "",
        data_digest=data_digest(draft.task.data),
    )


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
