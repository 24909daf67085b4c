"""Asks implementations about their hyperparameters without importing them here.

Implementations import torch and may be broken; so a child process imports them, and answers are kept in the cache
by the implementation and its source: planning the same suite twice imports nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methodbench.errors import MethodbenchError, ParameterError
from methodbench.provenance import canonical_json, digest, source_digest
from methodbench.sources import cache_dir

_CHILD_LIMIT = 300.0
#: Stands for a description where the text of parameters stands else; no parameters read like this.
_DESCRIPTION = "describe"
#: Begins the text of a question about trials; its number goes up when points are drawn in another way.
_POINTS = "points-1"


@dataclass(frozen=True, slots=True)
class Question:
    """Hyperparameters of one implementation, to be checked and completed."""

    owner: str
    """Name of the method, task or loader, for messages."""
    implementation: str
    params: Mapping[str, Any]
    points: tuple[int, int] | None = None
    """Of a question about trials: how many, and the seed that they are drawn under."""

    def text(self) -> str:
        """The parameters in the one form that they are kept under.

        Raises:
            ParameterError: they hold what JSON has no form for.
        """
        try:
            text = canonical_json(dict(self.params))
            return text if self.points is None else f"{_POINTS} {canonical_json(list(self.points))} {text}"
        except (TypeError, ValueError) as error:
            message = f"parameters {dict(self.params)!r} cannot be written as JSON: {error}"
            raise ParameterError(message) from error


def resolve_all(questions: Sequence[Question]) -> list[dict[str, Any] | MethodbenchError]:
    """Return the completed hyperparameters of each question, or the error that says what is wrong with them."""
    texts = [question.text() for question in questions]
    known = {implementation: _read_answers(implementation) for implementation in _implementations(questions)}
    unknown = {
        (question.implementation, text): question.owner
        for question, text in zip(questions, texts, strict=True)
        if text not in known[question.implementation]
    }
    # The import is what costs: a description comes with it, for pages and `show`.
    for (implementation, _), owner in list(unknown.items()):
        if _DESCRIPTION not in known[implementation]:
            unknown[implementation, _DESCRIPTION] = owner
    _find_out(known, unknown)
    return [
        _decode(known[question.implementation][text]) for question, text in zip(questions, texts, strict=True)
    ]


def _find_out(known: dict[str, dict[str, Any]], unknown: Mapping[tuple[str, str], str]) -> None:
    """Ask one child about what is unknown, by implementation and text of the parameters, and keep the answers.

    Args:
        known: answers by implementation and text; those to the unknown are added.
        unknown: owner of each, for messages.
    """
    if not unknown:
        return
    answers = _ask(
        [
            {"owner": owner, "implementation": implementation, "wanted": wanted}
            for (implementation, wanted), owner in unknown.items()
        ]
    )
    for (implementation, wanted), answer in zip(unknown, answers, strict=True):
        known[implementation][wanted] = answer
    for implementation in dict.fromkeys(implementation for implementation, _ in unknown):
        _write_answers(implementation, known[implementation])


def _implementations(questions: Iterable[Question]) -> Iterable[str]:
    return dict.fromkeys(question.implementation for question in questions)


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
    """Return the description of each implementation, or its error."""
    known = {name: _read_answers(name) for name in dict.fromkeys(implementations.values())}
    unknown = {
        (name, _DESCRIPTION): owner
        for owner, name in implementations.items()
        if _DESCRIPTION not in known[name]
    }
    _find_out(known, unknown)
    return {owner: known[name][_DESCRIPTION] for owner, name in implementations.items()}


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


def _answers_file(implementation: str) -> Path:
    """Return where the answers of an implementation are kept, as long as its source is what it is."""
    return cache_dir() / "resolved" / f"{digest([implementation, source_digest(implementation)])}.json"


def _read_answers(implementation: str) -> dict[str, Any]:
    """Return what an implementation has answered, by the text of the parameters.

    A file is taken as a whole or not at all: parameters that a flipped bit changed would be another experiment.
    """
    try:
        seal, _, text = _answers_file(implementation).read_bytes().partition(b"\n")
        return dict(json.loads(text)) if hashlib.sha256(text).hexdigest() == seal.decode() else {}
    except (OSError, ValueError, TypeError):
        # Absent or damaged: the answers are asked for again.
        return {}


def _write_answers(implementation: str, answers: Mapping[str, Any]) -> None:
    """Keep the answers that are no errors."""
    path = _answers_file(implementation)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    kept = {text: answer for text, answer in answers.items() if "error" not in answer}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(kept).encode()
        temporary.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        temporary.replace(path)
    except OSError:
        # A cache that cannot be written costs seconds, not results.
        temporary.unlink(missing_ok=True)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer one request in this process, importing the implementation."""
    from methodbench import params
    from methodbench.catalog import load_implementation
    from methodbench.tuning import points

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
        if request["wanted"] == _DESCRIPTION:
            return {"doc": cls.__doc__ or "", "params": params.describe(cls)}
        if request["wanted"].startswith(_POINTS):
            _, drawn, given = request["wanted"].split(" ", 2)
            method = params.build(cls, json.loads(given), owner)
            return {"params": {"points": points(method, *json.loads(drawn))}}
        return {"params": params.resolve(cls, json.loads(request["wanted"]), owner)}
    except ParameterError as error:
        return {"error": error.message, "hint": error.hint, "kind": "parameter"}
    except Exception as error:
        return {
            "error": f"{owner}: {implementation} is not a hyperparameter class: {type(error).__name__}: {error}"
        }


if __name__ == "__main__":
    # What is made here is little or lives to the end.
    gc.disable()
    print("\n" + json.dumps([answer(request) for request in json.load(sys.stdin)]))
