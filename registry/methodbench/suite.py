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
        seeds: [0, 1, 2]
        exclude: [{method: other-quantizer, task: other-task}]

``methodbench.plan`` turns it into cells; what does not fit is skipped with a reason.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from methodbench.entries import Method
from methodbench.errors import SuiteError, UnknownNameError

if TYPE_CHECKING:
    from methodbench.catalog import Catalog


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _method_named(value: Any) -> Any:
    if isinstance(value, str):
        name, at, preset = value.partition("@")
        return {"name": name, "presets": [preset]} if at else {"name": name}
    return value


class MethodUse(_Strict):
    """A method with the settings to run it in; ``name`` or ``name@preset`` is short for it."""

    name: str = Field(description="name of the method")
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
        for preset in self.presets:
            if preset not in method.presets:
                raise UnknownNameError(f"preset of {method.name}", preset, method.presets)
        bases: list[tuple[str, Mapping[str, Any]]] = [
            (name, method.presets[name]) for name in self.presets
        ] or [("", {})]
        found = []
        for (preset, base), values in itertools.product(bases, itertools.product(*self.grid.values())):
            varied = dict(zip(self.grid, values, strict=True))
            own = {**self.params, **varied}
            label = ", ".join(filter(None, [preset, *(f"{key}={value}" for key, value in own.items())]))
            found.append((label, {**base, **own}))
        return found


class TaskUse(_Strict):
    """A task with settings of its protocol; the bare name is short for its defaults."""

    name: str = Field(description="name of the task")
    params: dict[str, Any] = Field(default={}, description="settings of the protocol")


class Pattern(_Strict):
    """Matches cells by shell-style patterns; a field that is left out matches everything."""

    method: str = "*"
    variant: str = "*"
    model: str = "*"
    task: str = "*"

    def matches(self, method: str, variant: str, model: str, task: str) -> bool:
        """Return whether all four fields match."""
        pairs = ((method, self.method), (variant, self.variant), (model, self.model), (task, self.task))
        return all(fnmatchcase(value, pattern) for value, pattern in pairs)


class Comparison(_Strict):
    """One grid of a suite."""

    title: str = Field(default="", description="what is compared, for the reader")
    methods: Annotated[list[Annotated[MethodUse, BeforeValidator(_method_named)]], Field(min_length=1)] = (
        Field(description="methods and their settings")
    )
    models: list[str] = Field(default=[], description="names of models; none where the tasks bring their own")
    tasks: Annotated[list[Annotated[TaskUse, BeforeValidator(_named)]], Field(min_length=1)] = Field(
        description="tasks and their settings"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        default=[0], description="one run of every cell per seed"
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

    def excludes(self, method: str, variant: str, model: str, task: str) -> bool:
        """Return whether the suite's patterns leave this cell out."""
        fields = (method, variant, model, task)
        if self.include and not any(pattern.matches(*fields) for pattern in self.include):
            return True
        return any(pattern.matches(*fields) for pattern in self.exclude)


class Suite(_Strict):
    """A named list of comparisons."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = Field(description="name of the suite")
    title: str = Field(default="", description="what the suite answers, for the reader")
    description: str = Field(default="", description="more about it")
    comparisons: Annotated[list[Comparison], Field(min_length=1)] = Field(description="the grids")

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
    try:
        if filename.endswith(".toml"):
            data: Any = tomllib.loads(text)
        else:
            data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{filename}:{mark.line + 1}" if mark else filename
        raise SuiteError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        where = f"{filename}:{found[1]}" if found else filename
        raise SuiteError(f"{where}: not valid TOML: {error}") from error
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        raise _explain(error, text, filename) from error


def _explain(error: ValidationError, text: str, filename: str) -> SuiteError:
    first = error.errors()[0]
    loc = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    line = _toml_line(text, loc) if filename.endswith(".toml") else _yaml_line(text, loc)
    key = ".".join(str(part) for part in loc) or "the file"
    hint = ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(loc[:-1])
        problem = f"unknown key {str(loc[-1])!r}"
        hint = UnknownNameError("key", str(loc[-1]), known).hint
    elif first["type"] == "missing":
        problem = f"the key {str(loc[-1])!r} is missing"
    else:
        problem = first["msg"].removeprefix("Value error, ")
    return SuiteError(f"{filename}:{line}: {key}: {problem}", hint)


def _fields_at(loc: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Suite
    steps: dict[str, type[BaseModel]] = {
        "comparisons": Comparison,
        "methods": MethodUse,
        "tasks": TaskUse,
        "include": Pattern,
        "exclude": Pattern,
    }
    for part in loc:
        model = steps.get(part, model)
    return list(model.model_fields)


def _yaml_line(text: str, loc: Sequence[Any]) -> int:
    """Return the line (from 1) of the deepest node along ``loc`` that the text has."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = node.start_mark.line if node else 0
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == part), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1


def _toml_line(text: str, loc: Sequence[Any]) -> int:
    """Return the line (from 1) where the keys of ``loc`` appear in turn; array tables are counted."""
    lines = text.splitlines()
    line, at = 0, 0
    for index, part in enumerate(loc):
        if isinstance(part, str):
            following = loc[index + 1] if index + 1 < len(loc) else None
            nth = following if isinstance(following, int) else 0
            header = re.compile(rf"^\s*\[\[?[\w.]*\b{re.escape(part)}\s*\]\]?")
            value = re.compile(rf"(^|[{{,\s])\"?{re.escape(part)}\"?\s*=")
            headers = [n for n in range(at, len(lines)) if header.match(lines[n])]
            if len(headers) > nth:
                line = headers[nth]
                at = line + 1
                continue
            line = next((n for n in range(at, len(lines)) if value.search(lines[n])), line)
            at = line
    return line + 1
