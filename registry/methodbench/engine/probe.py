"""Asks implementations about their hyperparameters without importing them here.

Implementations import torch and may be broken; so a child process imports them, and answers are kept in the cache
under the digest of the implementation's source: planning the same suite twice imports nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methodbench.errors import MethodbenchError, ParameterError
from methodbench.provenance import digest, source_digest
from methodbench.sources import cache_dir

_CHILD_LIMIT = 300.0


@dataclass(frozen=True, slots=True)
class Question:
    """Hyperparameters of one implementation, to be checked and completed."""

    owner: str
    """Name of the method, task or loader, for messages."""
    implementation: str
    params: Mapping[str, Any]

    def key(self) -> str:
        try:
            return digest([self.implementation, source_digest(self.implementation), dict(self.params)])
        except (TypeError, ValueError) as error:
            raise _unwritable(self.params, error) from error


def _plain(params: Mapping[str, Any]) -> Any:
    """Return the parameters as JSON has them; what JSON has no form for is refused."""
    try:
        return json.loads(json.dumps(params, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise _unwritable(params, error) from error


def _unwritable(params: Mapping[str, Any], error: Exception) -> ParameterError:
    return ParameterError(f"parameters {dict(params)!r} cannot be written as JSON: {error}")


def resolve_all(questions: Sequence[Question]) -> list[dict[str, Any] | MethodbenchError]:
    """Return the completed hyperparameters of each question, or the error that says what is wrong with them."""
    cached = _read_cache()
    keys = [question.key() for question in questions]
    unknown = {key: question for key, question in zip(keys, questions, strict=True) if key not in cached}
    if unknown:
        answers = _ask([{"do": "resolve", **_request(question)} for question in unknown.values()])
        fresh = dict(zip(unknown, answers, strict=True))
        cached.update(fresh)
        kept = {key: answer for key, answer in fresh.items() if "params" in answer}
        # The import is what costs: its description comes with it, for pages and `show`.
        for key, question in unknown.items():
            described = fresh[key].pop("described", None)
            if described:
                kept[_description_key(question.implementation)] = described
        _write_cache(kept)
    return [_decode(cached[key]) for key in keys]


def describe(owner: str, implementation: str) -> dict[str, Any]:
    """Return ``{"doc": str, "params": [{name, type, default, range, description}]}`` of an implementation.

    Raises:
        MethodbenchError: it cannot be imported.
    """
    answer = _descriptions({owner: implementation})[owner]
    if "error" in answer:
        raise MethodbenchError(answer["error"], answer.get("hint", ""))
    return answer


def describe_all(implementations: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Describe several implementations, by their owners; see :func:`describe`. What cannot be imported is left out."""
    return {owner: answer for owner, answer in _descriptions(implementations).items() if "doc" in answer}


def _descriptions(implementations: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the description of each implementation, or its error; what is not in the cache is asked of one child."""
    keys = {owner: _description_key(implementation) for owner, implementation in implementations.items()}
    cached = _read_cache()
    unknown = [owner for owner, key in keys.items() if key not in cached]
    if unknown:
        answers = _ask(
            [
                {"do": "describe", "owner": owner, "implementation": implementations[owner], "params": {}}
                for owner in unknown
            ]
        )
        fresh = {keys[owner]: answer for owner, answer in zip(unknown, answers, strict=True)}
        cached.update(fresh)
        _write_cache({key: answer for key, answer in fresh.items() if "doc" in answer})
    return {owner: cached[key] for owner, key in keys.items()}


def _description_key(implementation: str) -> str:
    return digest(["describe", implementation, source_digest(implementation)])


def _request(question: Question) -> dict[str, Any]:
    return {
        "owner": question.owner,
        "implementation": question.implementation,
        "params": _plain(question.params),
    }


def _decode(answer: Mapping[str, Any]) -> dict[str, Any] | MethodbenchError:
    if "params" in answer:
        return dict(answer["params"])
    cls = ParameterError if answer.get("kind") == "parameter" else MethodbenchError
    return cls(answer["error"], answer.get("hint", ""))


def _ask(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answer requests in one child; when it dies, each request gets a child of its own, so that one is to blame."""
    answers = _child(requests)
    if answers is not None:
        return answers
    if len(requests) > 1:
        return [_ask([request])[0] for request in requests]
    message = f"{requests[0]['owner']}: importing {requests[0]['implementation']} ended the interpreter"
    return [
        {"error": message, "hint": "Import it by hand to see why: it crashed or took more than 5 minutes."}
    ]


def _child(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "methodbench.engine.probe"],
            input=json.dumps(list(requests)),
            capture_output=True,
            text=True,
            timeout=_CHILD_LIMIT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        return None
    # Implementations may print while they are imported; the answer is the last line.
    return json.loads(done.stdout.splitlines()[-1])


def _cache_file() -> Path:
    return cache_dir() / "resolved.json"


def _read_cache() -> dict[str, Any]:
    try:
        return dict(json.loads(_cache_file().read_text()))
    except (OSError, ValueError, TypeError):
        # Absent or damaged: the answers are asked for again.
        return {}


def _write_cache(fresh: Mapping[str, Any]) -> None:
    path = _cache_file()
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read_cache(), **fresh}))
        temporary.replace(path)
    except OSError:
        # A cache that cannot be written costs seconds, not results.
        temporary.unlink(missing_ok=True)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer one request in this process, importing the implementation."""
    from methodbench import params
    from methodbench.catalog import load_implementation

    owner, implementation = request["owner"], request["implementation"]
    try:
        cls = load_implementation(implementation)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        hint = "" if implementation.startswith(missing) else f"pip install {missing}"
        return {
            "error": f"{owner}: {implementation} needs the module {missing!r}, which is not installed",
            "hint": hint,
        }
    except Exception as error:
        return {"error": f"{owner}: cannot import {implementation}: {type(error).__name__}: {error}"}
    try:
        described = {"doc": cls.__doc__ or "", "params": params.describe(cls)}
        if request["do"] == "describe":
            return described
        return {"params": params.resolve(cls, request["params"], owner), "described": described}
    except ParameterError as error:
        return {"error": error.message, "hint": error.hint, "kind": "parameter"}
    except Exception as error:
        return {
            "error": f"{owner}: {implementation} is not a hyperparameter class: {type(error).__name__}: {error}"
        }


if __name__ == "__main__":
    print("\n" + json.dumps([answer(request) for request in json.load(sys.stdin)]))
