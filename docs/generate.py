"""Reference pages, made from the code while the documentation is built.

MkDocs calls :func:`on_files` (see ``hooks`` in ``mkdocs.yml``); mkdocstrings reads :class:`PlainRoles`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel, TypeAdapter

from methodbench.catalog import load_catalog
from methodbench.cli import COMMANDS, EXIT_CODES
from methodbench.entries import FIDELITIES, STAGES
from methodbench.kinds import KIND_NAMES, MODEL_KINDS
from methodbench.properties import ALWAYS, PROPERTIES
from methodbench.provenance import module_file
from methodbench.sources import FORMS
from methodbench.variables import VARIABLES

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`~?(?:[\w.]+?\.)??((?:[A-Z]\w*\.)?\w+)`")
#: A bar that would end a cell of a table; within code it does not.
_BAR = re.compile(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)")


class PlainRoles(griffe.Extension):
    """Turns Sphinx roles in docstrings into code, which Markdown knows."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """Return a docstring as Markdown."""
    return re.sub(r"::\n\n(?=    )", ":\n\n", _ROLE.sub(r"`\1`", text).replace("``", "`"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every generated page."""
    for name, text in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(text())))
    return files


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    columns = list(headers)
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        cells = (_BAR.sub(r"\|", " ".join(plain(cell).split())) for cell in row)
        yield f"| {' | '.join(cells)} |"
    yield ""


def fields_of(module: str, name: str) -> Iterator[str]:
    """Section about a class: its docstring, and a table of its fields with their docstrings."""
    path = module_file(module)
    assert path is not None
    cls = griffe.visit(module, filepath=path, code=path.read_text(encoding="utf-8"))[name]
    yield from (f"## {name}", "", plain(cls.docstring.value) if cls.docstring else "", "")
    rows = [
        (f"`{member.name}`", f"`{member.annotation}`", _default(member), member.docstring.value)
        for member in cls.attributes.values()
        if member.docstring is not None and "property" not in member.labels
    ]
    yield from table(("field", "type", "default", "what it says, with its unit"), rows)


def _default(member: griffe.Attribute) -> str:
    """Default of a field as code; empty where a value is required, or where the value only describes a column."""
    text = str(member.value) if member.value is not None else ""
    if text.startswith("Field("):
        found = re.search(r"\bdefault=([^,)]+)", text)
        text = found[1] if found else ""
    made = re.match(r"field\(default_factory=(\w+)\)", text)
    if made:
        text = {"dict": "{}", "list": "[]"}.get(made[1], f"{made[1]}()")
    return f"`{text}`" if text else ""


def hooks() -> Iterator[str]:
    """Page of the hooks."""
    yield from ("# Hooks", "", "What a plugin may implement.", "")
    yield from ("::: methodbench.hookspecs", "")


def kinds() -> Iterator[str]:
    """Page of the kinds of methods, the protocols and the properties."""
    from methodbench.protocols import KINDS

    yield from ("# Kinds and protocols", "")
    yield from table(
        ("kind", "protocol", "its result is"),
        (
            (
                f"`{name}`",
                f"[`{KINDS[name].__name__}`][methodbench.protocols.{KINDS[name].__name__}]",
                "a model, which a task scores" if name in MODEL_KINDS else "scored by the task that runs it",
            )
            for name in KIND_NAMES
        ),
    )
    yield from ("## Protocols", "", "::: methodbench.protocols", "")
    yield from ("## Context", "", "::: methodbench.context.Context", "")
    yield from ("## Models and calibration data", "", "::: methodbench.torchkit.model", "")
    yield from ("## Properties", "", "What an entry may declare in `properties`; each is a test.", "")
    yield from table(
        ("property", "argument", "kind", "meaning"),
        (
            (f"`{name}`", f"`{one.argument}`" if one.argument else "", kind, meaning)
            for name, one in PROPERTIES.items()
            for kind, meaning in one.meaning.items()
        ),
    )
    yield f"Checked of every method, declared or not: {', '.join(f'`{name}`' for name in ALWAYS)}."


def entries() -> Iterator[str]:
    """Page of the entries that plugins register."""
    yield from ("# Entries", "", "What a plugin registers. All are in `methodbench.entries`.", "")
    for name in ("Method", "Paper", "Model", "Task", "Metric", "Axis", "Resources", "Family", "SuiteFile"):
        yield from fields_of("methodbench.entries", name)
    yield from ("## Fidelity", "")
    yield from table(("value", "meaning"), ((f"`{key}`", text) for key, text in FIDELITIES.items()))
    yield from (
        "## Stages",
        "",
        f"In the order of a chain: {', '.join(f'`{stage}`' for stage in STAGES)}.",
        "",
    )
    yield from ("## Sources", "")
    module = importlib.import_module("methodbench.sources")
    yield from table(("scheme", "form"), ((f"`{key}`", f"`{form}`") for key, form in FORMS.items()))
    yield from (plain(module.__doc__ or ""), "")


def suites() -> Iterator[str]:
    """Page of the schema of suites and of files of claims."""
    from methodbench import claims, suite

    yield from ("# Suites and claims", "", "Unknown keys are refused, with file and line.", "")
    for cls in (suite.Suite, suite.Comparison, suite.MethodUse, suite.TaskUse, suite.Tuning, suite.Pattern):
        yield from _schema(cls)
    yield from ("# Files of claims", "")
    for cls in (claims.Claims, claims.Reported, claims.ReportedValue, claims.Claim, claims.Side):
        yield from _schema(cls)


def _schema(model: type[BaseModel]) -> Iterator[str]:
    yield from (f"## {model.__name__}", "", plain(inspect.getdoc(model) or ""), "")
    schema = TypeAdapter(model).json_schema(by_alias=True)
    rows = []
    for name, spec in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        default = "required" if required else f"`{spec['default']!r}`" if "default" in spec else ""
        rows.append((f"`{name}`", _type(spec), default, spec.get("description", "")))
    yield from table(("key", "type", "default", "meaning"), rows)


def _type(spec: dict[str, Any]) -> str:
    if "anyOf" in spec:
        return " or ".join(dict.fromkeys(_type(option) for option in spec["anyOf"]))
    if "$ref" in spec:
        return f"[{(name := spec['$ref'].rpartition('/')[2])}](#{name.lower()})"
    if "enum" in spec:
        return ", ".join(f"`{value}`" for value in spec["enum"])
    if spec.get("type") == "array":
        return f"list of {_type(spec.get('items', {}))}"
    if isinstance(inner := spec.get("additionalProperties"), dict):
        return f"mapping to {_type(inner)}"
    limits = {
        "minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "pattern": "matches",
    }  # fmt: skip
    allowed = ", ".join(f"{sign} `{spec[key]}`" for key, sign in limits.items() if key in spec)
    return f"{spec.get('type', 'any')} {allowed}".strip()


def records() -> Iterator[str]:
    """Page of the tables of the database."""
    from methodbench.store import schema

    module = importlib.import_module("methodbench.store.schema")
    yield from ("# Records", "", plain(module.__doc__ or ""), "")
    yield from (f"Newest revision of the schema: `{schema.SCHEMA_REVISION}`.", "")
    for name in ("Run", "MetricValue", "Series", "Environment", "Fingerprint", "Witness", "Driver", "Claim"):
        yield from fields_of("methodbench.store.schema", name)


def commands() -> Iterator[str]:
    """Page of the command line."""
    yield from ("# Command line", "", "Most commands print JSON with `--json`.", "")
    yield from table(
        ("command", "what it does"),
        ((f"[`{name}`](#methodbench-{name})", summary) for name, (_, summary) in COMMANDS.items()),
    )
    yield from ("## Exit codes", "")
    yield from table(("code", "meaning"), ((f"`{code}`", text) for code, text in EXIT_CODES.items()))
    yield "::: mkdocs-click"
    yield "    :module: methodbench.cli"
    yield "    :command: cli"
    yield "    :prog_name: methodbench"
    yield "    :depth: 1"
    yield "    :style: plain"
    yield ""


def environment() -> Iterator[str]:
    """Page of the environment variables."""
    yield from ("# Environment variables", "")
    yield from table(("variable", "meaning"), ((f"`{name}`", text) for name, text in VARIABLES.items()))


def python() -> Iterator[str]:
    """Page of the verbs as functions, and of the statistics."""
    yield from ("# Python", "", "The verbs of the command line are functions of `methodbench`.", "")
    yield from ("::: methodbench.api", "")
    yield from ("## Statistics", "", "::: methodbench.stats", "")
    yield from ("## Errors", "", "::: methodbench.errors", "")


def installed() -> Iterator[str]:
    """Page of what comes with methodbench."""
    catalog = load_catalog()
    yield from (
        "# Methods, models, tasks and suites",
        "",
        "What this version brings, as `methodbench list` shows it.",
        "",
    )
    for family in sorted({method.family for method in catalog.methods.values()}):
        yield from (f"## {catalog.family(family).title}", "", catalog.family(family).summary, "")
        yield from table(
            ("method", "kind", "applies to", "checked against", "presets", "summary"),
            (
                (
                    f"[`{one.name}`]({one.paper.url})" if one.paper and one.paper.url else f"`{one.name}`",
                    one.kind,
                    ", ".join(one.applies_to) or "its own",
                    one.fidelity,
                    " ".join(f"`{preset}`" for preset in one.presets),
                    one.summary,
                )
                for one in catalog.methods.values()
                if one.family == family
            ),
        )
    yield from ("## Models", "")
    yield from table(
        ("model", "kind", "source", "summary", "to know"),
        ((f"`{m.name}`", m.kind, f"`{m.source}`", m.summary, m.notes) for m in catalog.models.values()),
    )
    yield from ("## Tasks", "")
    yield from table(
        ("task", "evaluates", "accepts", "data", "metrics", "summary"),
        (
            (
                f"`{task.name}`",
                ", ".join(task.kinds),
                ", ".join(task.accepts) or "brings its own",
                f"`{task.data}`" if task.data else "",
                ", ".join(
                    f"`{metric.name}` {'↓' if metric.direction == 'lower' else '↑'} {metric.unit}".strip()
                    for metric in task.metrics
                ),
                task.summary,
            )
            for task in catalog.tasks.values()
        ),
    )
    yield from ("## Suites", "")
    yield from table(("suite", "summary"), ((f"`{s.name}`", s.summary) for s in catalog.suites.values()))


PAGES = {
    "hooks": hooks,
    "kinds": kinds,
    "entries": entries,
    "suites": suites,
    "records": records,
    "command-line": commands,
    "environment": environment,
    "python": python,
    "installed": installed,
}
