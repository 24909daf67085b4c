"""Files that people write, YAML or TOML, checked against a pydantic model: a mistake names file, line and key."""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from methodbench.errors import MethodbenchError, UnknownNameError

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """A part of a file: frozen, and refusing keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_document(text: str, filename: str, model: type[M], error: type[MethodbenchError]) -> M:
    """Parse ``text`` into ``model``; the suffix of ``filename`` tells TOML from YAML.

    Raises:
        ``error``: names file, line and key, and what is expected there.
    """
    try:
        data: Any = tomllib.loads(text) if filename.endswith(".toml") else yaml.safe_load(text)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f"{filename}:{mark.line + 1}" if mark else filename
        raise error(f"{where}: not valid YAML: {getattr(problem, 'problem', None) or problem}") from problem
    except tomllib.TOMLDecodeError as problem:
        found = re.search(r"line (\d+)", str(problem))
        where = f"{filename}:{found[1]}" if found else filename
        raise error(f"{where}: not valid TOML: {problem}") from problem
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        raise _explain(problem, text, filename, model, error) from problem


def line_of(text: str, filename: str, loc: Sequence[str | int]) -> int:
    """Return the line (from 1) of the deepest part of ``loc``, keys and list positions, that the text has."""
    return _toml_line(text, loc) if filename.endswith(".toml") else _yaml_line(text, loc)


def _explain(
    problem: ValidationError, text: str, filename: str, model: type[BaseModel], error: type[MethodbenchError]
) -> MethodbenchError:
    first = problem.errors()[0]
    loc = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join(str(part) for part in loc) or "the file"
    hint = ""
    if first["type"] == "extra_forbidden":
        message = f"unknown key {str(loc[-1])!r}"
        hint = UnknownNameError("key", str(loc[-1]), _fields_at(model, loc[:-1])).hint
    elif first["type"] == "missing":
        message = f"the key {str(loc[-1])!r} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
    return error(f"{filename}:{line_of(text, filename, loc)}: {key}: {message}", hint)


def _fields_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        inner = next(_models_in(field.annotation), None) if field else None
        model = inner or model
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _yaml_line(text: str, loc: Sequence[Any]) -> int:
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


_HEADER = re.compile(r"^\s*(\[\[?)\s*([\w\-.\" ]+?)\s*\]\]?\s*(#.*)?$")
_ASSIGNMENT = re.compile(r"^\s*([\w\-]+|\"[^\"]*\")\s*=")


def _toml_line(text: str, loc: Sequence[Any]) -> int:
    places = _toml_places(text)
    wanted = tuple(loc)
    known = max((length for length in range(len(wanted) + 1) if wanted[:length] in places), default=0)
    offset = places.get(wanted[:known], 0)
    for part in wanted[known:]:
        inside = _toml_element(text, offset, part) if isinstance(part, int) else _toml_key(text, offset, part)
        if inside is None:
            break
        offset = inside
    return text.count("\n", 0, offset) + 1


def _toml_places(text: str) -> dict[tuple[str | int, ...], int]:
    """Return the offset of every table and of every key that begins a line, by its path."""
    places: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    offset = 0
    for line in text.splitlines(keepends=True):
        start = offset + len(line) - len(line.lstrip())
        if header := _HEADER.match(line):
            path: tuple[str | int, ...] = ()
            names = [name.strip().strip('"') for name in header[2].split(".")]
            for depth, name in enumerate(names):
                path = (*path, name)
                places.setdefault(path, start)
                if header[1] == "[[" and depth == len(names) - 1:
                    counts[path] = counts.get(path, -1) + 1
                if path in counts:
                    path = (*path, counts[path])
            table = path
            places.setdefault(table, start)
        elif assignment := _ASSIGNMENT.match(line):
            places.setdefault((*table, assignment[1].strip('"')), start)
        offset += len(line)
    return places


def _toml_tokens(text: str, start: int) -> Iterator[tuple[int, int, str]]:
    """Yield (offset, depth of brackets before it, character) outside of strings and comments."""
    depth = 0
    position = start
    while position < len(text):
        character = text[position]
        if character == "#":
            position = text.find("\n", position)
            if position < 0:
                return
        elif character in "\"'":
            quote = character * 3 if text.startswith(character * 3, position) else character
            end = text.find(quote, position + len(quote))
            while end > 0 and character == '"' and text[end - 1] == "\\":
                end = text.find(quote, end + 1)
            yield position, depth, character
            if end < 0:
                return
            position = end + len(quote) - 1
        elif not character.isspace():
            yield position, depth, character
            if character in "[{":
                depth += 1
            elif character in "]}":
                depth -= 1
                if depth == 0:
                    return
        position += 1


def _toml_element(text: str, start: int, index: int) -> int | None:
    """Return the offset of an element of the array whose key stands at ``start``."""
    equals = text.find("=", start)
    seen = -1
    fresh = False
    for position, depth, character in _toml_tokens(text, equals + 1):
        if (depth == 0 and character == "[") or (depth == 1 and character == ","):
            fresh = True
        elif fresh:
            fresh = False
            seen += 1
            if seen == index:
                return position
    return None


def _toml_key(text: str, start: int, key: str) -> int | None:
    """Return the offset of a key of the inline table at or after ``start``."""
    opened = text.find("{", start)
    if opened < 0:
        return None
    for position, depth, _ in _toml_tokens(text, opened):
        if depth == 1 and re.compile(rf"\"?{re.escape(key)}\"?\s*=").match(text, position):
            return position
    return None
