"""Hyperparameters: typed, validated fields of one dataclass per implementation.

::

    @hyperparameters
    class RTN:
        bits: Annotated[int, Field(ge=2, le=8, description="weight bits")] = 4

    resolve(RTN, {"bits": 3}, owner="rtn")  # {"bits": 3}
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from methodbench.errors import ParameterError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def hyperparameters(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass whose fields are validated and refuse unknown names."""
    config = ConfigDict(extra="forbid", validate_default=True, arbitrary_types_allowed=False)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=config)  # type: ignore[return-value]


def build(cls: type[T], passed: Mapping[str, Any], owner: str) -> T:
    """Return ``cls(**passed)``.

    Raises:
        ParameterError: names the owner, the field, the value and what is allowed.
    """
    known = _names(cls)  # type: ignore[arg-type]
    for name in passed:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Parameters: {', '.join(known) or 'none'}"
            raise ParameterError(f"{owner} has no parameter {name!r}", hint)
    try:
        return cls(**passed)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if not where:
            raise ParameterError(f"{owner}: {_plain(first['msg'])}") from error
        raise ParameterError(
            f"{owner}: {where} = {first['input']!r} is not valid: {_plain(first['msg'])}",
            f"See `methodbench show {owner}` for the parameters and their ranges.",
        ) from error


def resolve(cls: type, passed: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return every hyperparameter with its value, defaults filled in, as JSON-ready values."""
    instance: Any = build(cls, passed, owner)
    return _adapter(cls).dump_python(instance, mode="json")


def describe(cls: type) -> list[dict[str, Any]]:
    """Return name, type, default, range and description of each hyperparameter."""
    schema = _adapter(cls).json_schema()
    rows = []
    for name, spec in schema.get("properties", {}).items():
        allowed = _allowed(spec)
        rows.append(
            {
                "name": name,
                "type": _type_name(spec),
                "default": spec.get("default"),
                "required": name in schema.get("required", []),
                "range": allowed,
                "description": spec.get("description", ""),
            }
        )
    return rows


@functools.cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _type_name(spec: Mapping[str, Any]) -> str:
    if "anyOf" in spec:
        return " or ".join(_type_name(option) for option in spec["anyOf"])
    if "enum" in spec or "const" in spec:
        return "choice"
    names = {
        "integer": "int",
        "number": "float",
        "string": "str",
        "boolean": "bool",
        "array": "list",
        "null": "none",
    }
    return names.get(spec.get("type", ""), spec.get("type", "any"))


def _allowed(spec: Mapping[str, Any]) -> str:
    if "anyOf" in spec:
        return " or ".join(filter(None, (_allowed(option) for option in spec["anyOf"])))
    if "enum" in spec:
        return ", ".join(str(value) for value in spec["enum"])
    if "const" in spec:
        return str(spec["const"])
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {spec[key]}" for key, sign in signs.items() if key in spec)
