"""Why a cell is a hit, a miss or stale: its identity, field by field, against the records.

A record answers a request (method, settings, model, task, seed ...) as long as what the request means has not
changed. When the method's source, the weights, the data or the protocol have, the cell has another key: its records
are ``stale``. They stay in the database and are shown as stale, and no plan takes them for done.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from methodbench import sources
from methodbench.engine.cell import IDENTITY_VERSION, Cell
from methodbench.engine.plan import data_digest, make_plan, weights_digest
from methodbench.engine.probe import Question, resolve_all
from methodbench.errors import MethodbenchError, UnknownNameError
from methodbench.provenance import source_digest
from methodbench.store import Run, Store, Version
from methodbench.suite import Comparison, MethodUse, Suite, TaskUse

if TYPE_CHECKING:
    from methodbench.catalog import Catalog

#: What each field of a cell's identity is called in a sentence, and what it says.
FIELDS: Mapping[str, tuple[str, str]] = {
    "version": ("the form of identities", "how identities are made"),
    "method": ("the method", "name of the method"),
    "method_params": ("its hyperparameters", "hyperparameter, defaults included"),
    "method_digest": ("the method's source", "source of the method and of the shared code that it imports"),
    "model": ("the model", "name of the model"),
    "weights_digest": ("the weights or their loader", "weights, the loader's source and its options"),
    "task": ("the task", "name of the task"),
    "task_params": ("the task's settings", "setting of the task, defaults included"),
    "protocol": ("the task's protocol", "version of the task's procedure"),
    "data_digest": ("the data", "data of the task"),
    "seed": ("the seed", "seed"),
    "dtype": ("the floating-point type", "floating-point type"),
    "device_class": ("the device", "cpu or cuda"),
    "threads": ("the thread count", "CPU threads of the cell"),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an identity, or one parameter of it, as a record has it and as it is wanted."""

    name: str
    """For parameters ``method_params.bits``."""
    recorded: Any
    """None where the record has no such field."""
    wanted: Any

    @property
    def same(self) -> bool:
        return bool(self.recorded == self.wanted)

    @property
    def meaning(self) -> str:
        return FIELDS.get(self.name.partition(".")[0], ("", ""))[1]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the records have to say to a wanted cell."""

    verdict: Literal["hit", "stale", "miss", "gone"]
    """``gone``: method, model or task are not installed any more, or refuse the recorded settings."""
    reason: str
    label: str
    key: str
    """Of the wanted cell; empty where it cannot be made any more."""
    record: Run | None
    """The hit, the stale record, or the nearest one; None where nothing is near."""
    fields: list[Field] = field(default_factory=list)
    """Every field, compared with ``record``; what differs comes first. Empty without a record."""


def explain(cell: Cell, store: Store) -> Answer:
    """Return why a wanted cell is a hit, a miss or stale."""
    found = store.latest([cell.key]).get(cell.key)
    if found is not None:
        again = "" if found.status in ("ok", "not-applicable") else "; --retry runs it again"
        reason = f"run {found.id} is {found.status}{again}"
        return Answer("hit", reason, cell.label, cell.key, found, compare(found.identity, cell.identity()))
    before = superseded(store, [cell]).get(cell.key)
    if before is not None:
        fields = compare(before.identity, cell.identity())
        reason = f"run {before.id} answered the same request; since then {_changed(fields)}"
        return Answer("stale", reason, cell.label, cell.key, before, fields)
    nearest = _nearest(cell, store)
    if nearest is None:
        return Answer("miss", "no run of this method or on this task", cell.label, cell.key, None)
    fields = compare(nearest.identity, cell.identity())
    count = sum(not one.same for one in fields)
    reason = f"never asked for; run {nearest.id} is nearest, {count} field{'s' * (count != 1)} away"
    return Answer("miss", reason, cell.label, cell.key, nearest, fields)


def explain_run(run: Run, store: Store, catalog: Catalog) -> Answer:
    """Return whether the request of a run would be answered by it today, and if not, why."""
    label = _label(run)
    try:
        cell = present_cell(run, catalog)
    except MethodbenchError as error:
        return Answer("gone", f"it cannot be asked for any more: {error.message}", label, "", run)
    fields = compare(run.identity, cell.identity())
    if cell.key == run.cell_key:
        latest = store.latest([cell.key]).get(cell.key)
        newer = latest is not None and latest.id != run.id
        reason = (
            f"run {latest.id} is newer and counts" if latest and newer else f"it is {run.status} and counts"
        )
        return Answer("hit", reason, label, cell.key, run, fields)
    return Answer("stale", f"since then {_changed(fields)}", label, cell.key, run, fields)


def present_cell(run: Run, catalog: Catalog, *, exactly: bool = False) -> Cell:
    """Return the cell that the request of a run makes with what is installed.

    Args:
        exactly: take the resolved parameters of the record instead of what was passed, so that a changed default
            changes nothing.

    Raises:
        MethodbenchError: method, model or task are not there any more, or refuse the recorded parameters.
    """
    method_params = run.params if exactly else run.params_passed
    task_params = run.task_params if exactly or run.task_passed is None else run.task_passed
    comparison = Comparison(
        methods=[MethodUse(name=run.method, params=method_params)],
        models=[run.model] if run.model else [],
        tasks=[TaskUse(name=run.task, params=task_params)],
        seeds=[run.seed],
        dtype=run.dtype,  # type: ignore[arg-type]
        device=run.device,
        threads=max(1, run.threads),
    )
    plan = make_plan(Suite(name="record", comparisons=[comparison]), catalog)
    if not plan.cells:
        raise MethodbenchError(f"{_label(run)}: {plan.skips[0].reason}")
    return dataclasses.replace(
        plan.cells[0],
        variant=run.variant,
        params_passed=run.params_passed,
        task_passed=run.task_params if run.task_passed is None else run.task_passed,
        suite=run.suite,
    )


def compare(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Field]:
    """Return the fields of two identities, parameters one by one; what differs comes first."""
    one, other = flat(recorded), flat(wanted)
    names = [*other, *(name for name in one if name not in other)]
    fields = [Field(name, one.get(name), other.get(name)) for name in names]
    return sorted(fields, key=lambda found: found.same)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = item
    return found


def superseded(store: Store, cells: Sequence[Cell]) -> dict[str, Run]:
    """Return the newest record of the same request for each cell that has none of its own, by cell key."""
    if not cells:
        return {}
    wanted: dict[str, list[Cell]] = {}
    for cell in cells:
        model = cell.model.name if cell.model else ""
        passed = dict(cell.task_passed)
        request = _request(
            cell.method.name, cell.params_passed, model, cell.task.name, cell.seed, cell.dtype, cell.device
        )
        wanted.setdefault(f"{request} {_json(passed)}", []).append(cell)
        # Records of schema 0001 kept only the settings with their defaults.
        wanted.setdefault(f"{request} {_json(dict(cell.task_params))} resolved", []).append(cell)
    found: dict[str, Run] = {}
    methods = {cell.method.name for cell in cells}
    for run in store.runs_of(methods, {cell.task.name for cell in cells}):
        request = _request(
            run.method, run.params_passed, run.model, run.task, run.seed, run.dtype, run.device
        )
        resolved = run.task_passed is None
        passed = run.task_params if run.task_passed is None else run.task_passed
        for cell in wanted.get(f"{request} {_json(passed)}{' resolved' * resolved}", ()):
            before = found.get(cell.key)
            if run.cell_key != cell.key and (before is None or run.status == "ok" or before.status != "ok"):
                found[cell.key] = run
    return found


def stale_runs(store: Store, catalog: Catalog) -> dict[str, str]:
    """Return why each stale run is stale, by its id; see :func:`stale_versions`."""
    found: dict[str, str] = {}
    for version, reason in stale_versions(store.versions(), catalog).items():
        found |= dict.fromkeys(store.ids(version), reason)
    return found


def stale_versions(versions: Iterable[Version], catalog: Catalog) -> dict[Version, str]:
    """Return why each stale version is stale.

    A run is stale when source, weights, data or protocol are other ones today. One whose method, model or task is
    not installed cannot be told to be stale, and neither can one whose source only a download could tell.
    """
    present = _Present(catalog)
    found: dict[Version, str] = {}
    versions = list(versions)
    present.ask_loaders({version.model for version in versions if version.weights_digest})
    for version in versions:
        fields = present.fields(version)
        # A record that does not say, or a present that cannot be told, makes nothing stale.
        changed = [name for name, then, now in fields if then and now is not None and then != now]
        if changed:
            found[version] = _changes(changed)
    return found


class _Present:
    """What is installed, asked once per method, model and task."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.weights: dict[str, str | None] = {}
        self.method = functools.cache(self._method)
        self.task = functools.cache(self._task)

    def ask_loaders(self, names: Iterable[str]) -> None:
        """Learn the weights' digests of these models, all loaders asked at once."""
        models = []
        for name in sorted(filter(None, names)):
            try:
                model = self.catalog.model(name)
                if sources.resolve_digest(model.source, model.sha256) is not None:
                    models.append(model)
            except MethodbenchError:
                # Not there any more: nothing can be said about its records.
                continue
        answers = resolve_all([Question(model.name, model.loader, model.options) for model in models])
        for model, answer in zip(models, answers, strict=True):
            if not isinstance(answer, MethodbenchError):
                self.weights[model.name] = weights_digest(model, answer)

    def fields(self, version: Version) -> Iterable[tuple[str, Any, Any]]:
        """Yield (field, as recorded, as it is; None where that cannot be told)."""
        protocol, data = self.task(version.task)
        yield "version", version.identity, IDENTITY_VERSION
        yield "method_digest", version.method_digest, self.method(version.method)
        yield "weights_digest", version.weights_digest, self.weights.get(version.model)
        yield "protocol", version.protocol, protocol
        yield "data_digest", version.data_digest, data

    def _method(self, name: str) -> str | None:
        try:
            return source_digest(self.catalog.method(name).impl)
        except UnknownNameError:
            return None

    def _task(self, name: str) -> tuple[int | None, str | None]:
        try:
            task = self.catalog.task(name)
            known = not task.data or sources.resolve_digest(task.data) is not None
            return task.protocol, data_digest(task.data) if known else None
        except MethodbenchError:
            return None, None


def _nearest(cell: Cell, store: Store) -> Run | None:
    """Return the run whose identity differs in the fewest fields; the newest of several."""
    runs = store.runs_of({cell.method.name}) or store.runs_of(None, {cell.task.name})
    identity = cell.identity()

    def distance(run: Run) -> int:
        return sum(not one.same for one in compare(run.identity, identity))

    return min(reversed(runs), key=distance, default=None)


def _changed(fields: Iterable[Field]) -> str:
    return _changes(dict.fromkeys(one.name.partition(".")[0] for one in fields if not one.same))


def _changes(names: Iterable[str]) -> str:
    words = [FIELDS.get(name, (name, ""))[0] for name in names]
    return f"{' and '.join(filter(None, [', '.join(words[:-1]), words[-1]]))} changed"


def _request(
    method: str, params: Mapping[str, Any], model: str, task: str, seed: int, dtype: str, device: str
) -> str:
    return _json([method, dict(params), model, task, seed, dtype, device.partition(":")[0]])


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _label(run: Run) -> str:
    method = f"{run.method} ({run.variant})" if run.variant else run.method
    return " · ".join(filter(None, [method, run.model, run.task, f"seed {run.seed}"]))
