"""What the Ray executor does with tasks that are lost, on a scripted stand-in for Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from methodbench.builtin import ray_executor
from methodbench.engine.executors import CellOutcome, ExecutorOptions


class RayError(Exception):
    """The root of Ray's own exceptions."""


class Lost(RayError):
    """A task's node has died."""


class Reference:
    """What a task is asked for by."""

    def __init__(self, fate: str) -> None:
        self.fate = fate


class Mailbox:
    """The stand-in of the actor and of its handle."""

    def __init__(self, ray: ScriptedRay) -> None:
        self._ray = ray
        self.take = SimpleNamespace(remote=self._take)

    def _take(self) -> list[Mapping[str, Any]]:
        if self._ray.mailbox_deaths:
            self._ray.mailbox_deaths -= 1
            raise self._ray.exceptions.RayActorError
        events, self._ray.events = self._ray.events, []
        return events


class ScriptedRay:
    """Ends every task at once, in the way that the script says: "ok", "lost" or "lost after the start"."""

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayActorError=type("RayActorError", (RayError,), {}),
        RayTaskError=type("RayTaskError", (RayError,), {}),
        OutOfMemoryError=type("OutOfMemoryError", (RayError,), {}),
    )

    def __init__(self, script: Sequence[str], mailbox_deaths: int = 0) -> None:
        self.script = list(script)
        self.mailbox_deaths = mailbox_deaths
        self.events: list[Mapping[str, Any]] = []
        self.sent: list[tuple[int, float]] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[Any]:
        return [{"Alive": True, "Resources": {"CPU": 4.0, "memory": 2.0**30}}]

    def remote(self, **_options: Any) -> Any:
        def wrap(what: Any) -> Any:
            if isinstance(what, type):
                return SimpleNamespace(remote=lambda: Mailbox(self))
            return SimpleNamespace(
                options=lambda **resources: SimpleNamespace(
                    remote=lambda job, _preload, _limit, _mailbox, attempt: self._run(job, attempt, resources)
                )
            )

        return wrap

    def _run(self, job: Mapping[str, Any], attempt: str, resources: Mapping[str, Any]) -> Any:
        fate = self.script.pop(0) if self.script else "ok"
        self.sent.append((job["first"], resources["num_cpus"]))
        if fate != "lost":
            self.events.append({"attempt": attempt, "event": "started"})
        if fate == "ok":
            outcomes = {index: {"status": "ok"} for index in range(job["first"], len(job["cells"]))}
            self.events.append({"attempt": attempt, "event": "finished", "outcomes": outcomes})
        return Reference(fate)

    def wait(self, refs: list[Any], **_options: Any) -> tuple[list[Any], list[Any]]:
        return refs, []

    def get(self, what: Any) -> Any:
        if isinstance(what, list):
            return what
        if what.fate != "ok":
            raise Lost("the node died")
        return None

    def cancel(self, ref: Any, *, force: bool) -> None: ...


class Outcomes:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.all: dict[int, CellOutcome] = {}

    def admit(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        return job

    def started(self, job: Mapping[str, Any]) -> None: ...
    def phase(self, job: Mapping[str, Any], index: int, phase: str) -> None: ...
    def finished(self, job: Mapping[str, Any], outcomes: Mapping[int, CellOutcome]) -> None:
        assert not self.all.keys() & outcomes.keys()
        self.all |= outcomes


def run(monkeypatch: pytest.MonkeyPatch, ray: ScriptedRay, cells: int = 1) -> dict[int, CellOutcome]:
    monkeypatch.setattr(ray_executor, "_ray", lambda: ray)
    monkeypatch.setattr(ray_executor, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(ray_executor, "_LOOK_SECONDS", 0.001)
    sink = Outcomes()
    job = {"id": "job", "first": 0, "cells": [{}] * cells, "needs": {"cores": 1}}
    ray_executor.RayExecutor(ExecutorOptions(cores=1)).run([job], sink)
    return sink.all


def test_a_job_that_had_not_begun_is_sent_until_ray_has_found_the_dead_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = ScriptedRay(["lost"] * 6)
    assert run(monkeypatch, ray)[0].status == "ok"
    # The first time it takes what it needs, later a whole node.
    assert ray.sent == [(0, 1)] + [(0, 4.0)] * 6


def test_a_job_that_can_never_begin_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ScriptedRay(["lost"] * 100)
    outcome = run(monkeypatch, ray)[0]
    assert outcome.status == "failed"
    assert outcome.reason == "its Ray task was lost: the node died"
    assert len(ray.sent) == 7


def test_a_cell_that_takes_its_node_along_twice_fails_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = ScriptedRay(["lost after the start"] * 2)
    outcomes = run(monkeypatch, ray, cells=3)
    assert [outcomes[index].status for index in range(3)] == ["failed", "ok", "ok"]
    assert [first for first, _ in ray.sent] == [0, 0, 1]


def test_losses_before_the_start_do_not_count_against_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ScriptedRay(["lost after the start", "lost", "lost", "ok"])
    assert run(monkeypatch, ray)[0].status == "ok"


def test_a_mailbox_that_dies_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ScriptedRay(["lost after the start"], mailbox_deaths=3)
    assert run(monkeypatch, ray)[0].status == "ok"
