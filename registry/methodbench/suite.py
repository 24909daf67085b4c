"""Suites: a comparison as a file.

A suite (YAML or TOML) lists comparisons; each is a grid of methods, models, tasks and seeds::

    name: weight-only-3-bits
    title: Three bits, weights only
    comparisons:
      - models: [some-model]
        tasks: [some-task, {name: other-task, params: {windows: 16}}]
        methods:
          - identity
          - {name: some-quantizer, presets: [w3g64]}
          - {name: other-quantizer, params: {bits: 3}, grid: {group_size: [-1, 64, 128]}}
          - some-pruner@s50 + some-quantizer@w3g64
        seeds: [0, 1, 2]
        exclude: [{method: other-quantizer, task: other-task}]

``methodbench.plan`` turns it into cells; what does not fit is skipped with a reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from methodbench.composition import preset_params, split_use
from methodbench.documents import Strict, parse_document
from methodbench.entries import Method
from methodbench.errors import SuiteError

if TYPE_CHECKING:
    from methodbench.catalog import Catalog


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _method_named(value: Any) -> Any:
    if isinstance(value, str):
        name, preset = split_use(value)
        return {"name": name, "presets": [preset]} if preset else {"name": name}
    return value


class MethodUse(Strict):
    """A method with the settings to run it in; ``name`` or ``name@preset`` is short for it.

    A chain of compressors is written ``a + b``, or ``a@preset + b@preset`` for short; its presets read
    ``preset + preset``, and its hyperparameters ``a.name`` and ``b.name``.
    """

    name: str = Field(description="name of the method, or of a chain of compressors")
    presets: list[str] = Field(default=[], description="named settings of the method; one variant each")
    params: dict[str, Any] = Field(default={}, description="hyperparameters common to all variants")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default={}, description="hyperparameters to vary; every combination is a variant"
    )

    def variants(self, method: Method) -> list[tuple[str, dict[str, Any]]]:
        """Return (label, hyperparameters) of each variant.

        Raises:
            UnknownNameError: a preset that the method does not have.
        """
        bases = [(name, preset_params(method, name)) for name in self.presets] or [("", {})]
        found = []
        for (preset, base), values in itertools.product(bases, itertools.product(*self.grid.values())):
            varied = dict(zip(self.grid, values, strict=True))
            own = {**self.params, **varied}
            label = ", ".join(filter(None, [preset, *(f"{key}={value}" for key, value in own.items())]))
            found.append((label, {**base, **own}))
        return found


class TaskUse(Strict):
    """A task with settings of its protocol; the bare name is short for its defaults."""

    name: str = Field(description="name of the task")
    params: dict[str, Any] = Field(default={}, description="settings of the protocol")


class Pattern(Strict):
    """Matches cells by shell-style patterns; a field that is left out matches everything."""

    method: str = Field(default="*", description="name of the method")
    variant: str = Field(default="*", description="label of its settings, as `plan` shows it")
    model: str = Field(default="*", description="name of the model")
    task: str = Field(default="*", description="name of the task")

    def matches(self, method: str, variant: str, model: str, task: str) -> bool:
        """Return whether all four fields match."""
        pairs = ((method, self.method), (variant, self.variant), (model, self.model), (task, self.task))
        return all(fnmatchcase(value, pattern) for value, pattern in pairs)


class Tuning(Strict):
    """Trials that choose each method's hyperparameters on each task, from the space that the method declares.

    Trials run under seeds of their own; what they come to is read from the task's metric of choice (see
    ``Task.tuned_by``). The best one is then run under the seeds of the comparison.
    """

    trials: Annotated[int, Field(ge=2, le=1000)] = Field(
        description="quasi-random points, the same number for all"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="seed that the points are drawn under"
    )
    trial_seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)] = Field(
        default=[1_000_000],
        description="seeds that every trial is run under; none of those of the comparison",
    )


class Comparison(Strict):
    """One grid of a suite."""

    title: str = Field(default="", description="what is compared, for the reader")
    methods: Annotated[list[Annotated[MethodUse, BeforeValidator(_method_named)]], Field(min_length=1)] = (
        Field(description="methods and their settings")
    )
    models: list[str] = Field(default=[], description="names of models; none where the tasks bring their own")
    tasks: Annotated[list[Annotated[TaskUse, BeforeValidator(_named)]], Field(min_length=1)] = Field(
        description="tasks and their settings"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)] = Field(
        default=[0], description="one run of every cell per seed"
    )
    tuning: Tuning | None = Field(
        default=None, description="choose hyperparameters by trials; as configured by default"
    )
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field(
        default="float32", description="floating-point type of models and tensors"
    )
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = Field(
        default="cpu", description="where cells run"
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="CPU threads of a cell, part of its identity; the task's own by default"
    )
    timeout: Annotated[float, Field(gt=0)] = Field(
        default=3600, description="seconds after which a cell is killed"
    )
    include: list[Pattern] = Field(default=[], description="run only cells that match one of these patterns")
    exclude: list[Pattern] = Field(default=[], description="leave out cells that match one of these patterns")

    @model_validator(mode="after")
    def _trials_have_seeds_of_their_own(self) -> Comparison:
        shared = set(self.seeds) & set(self.tuning.trial_seeds) if self.tuning else set()
        if shared:
            raise ValueError(
                f"trial_seeds and seeds share {min(shared)}: what is chosen on a seed must not be scored on it"
            )
        return self

    def excludes(self, method: str, variant: str, model: str, task: str) -> bool:
        """Return whether the suite's patterns leave this cell out."""
        fields = (method, variant, model, task)
        if self.include and not any(pattern.matches(*fields) for pattern in self.include):
            return True
        return any(pattern.matches(*fields) for pattern in self.exclude)


class Suite(Strict):
    """A named list of comparisons."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = Field(description="name of the suite")
    title: str = Field(default="", description="what the suite answers, for the reader")
    description: str = Field(default="", description="more about it")
    comparisons: Annotated[list[Comparison], Field(min_length=1)] = Field(description="the grids")

    def with_seeds(self, count: int) -> Suite:
        """Return the suite with ``count`` seeds in each comparison: its own first, then the next that are free."""

        def enough(own: Sequence[int]) -> list[int]:
            more = (seed for seed in itertools.count() if seed not in own)
            return [*own, *itertools.islice(more, max(0, count - len(own)))][:count]

        comparisons = [one.model_copy(update={"seeds": enough(one.seeds)}) for one in self.comparisons]
        return self.model_copy(update={"comparisons": comparisons})

    def with_settings(self, settings: Mapping[str, Any]) -> Suite:
        """Return the suite with these fields in each comparison; models only where a comparison names some."""

        def chosen(own: Comparison) -> Comparison:
            left_out = () if own.models else ("models",)
            return own.model_copy(
                update={key: value for key, value in settings.items() if key not in left_out}
            )

        return self.model_copy(update={"comparisons": [chosen(one) for one in self.comparisons]})

    @model_validator(mode="before")
    @classmethod
    def _is_mapping(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("a suite is a mapping with the keys name and comparisons")
        return value


def load_suite(name_or_path: str | Path, catalog: Catalog) -> Suite:
    """Load a suite from a file, or one that a plugin ships by its name.

    Raises:
        SuiteError: the file cannot be read or does not say what it must; names file, line and key.
        UnknownNameError: neither a file nor the name of a shipped suite.
    """
    text_name = str(name_or_path)
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".toml") or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SuiteError(
                f"no suite file {path}", "`methodbench list suites` shows the suites that are shipped."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise SuiteError(f"cannot read suite {path}: {error}") from error
        return parse_suite(text, str(path))
    shipped = catalog.suite(text_name)
    resource = files(shipped.package).joinpath(*shipped.path.split("/"))
    return parse_suite(resource.read_text(encoding="utf-8"), f"{shipped.package}/{shipped.path}")


def parse_suite(text: str, filename: str) -> Suite:
    """Parse the text of a suite; ``filename`` tells YAML from TOML and appears in messages.

    Raises:
        SuiteError: names file, line and key.
    """
    return parse_document(text, filename, Suite, SuiteError)
