"""Entries of the plugin that changes."""

from __future__ import annotations

from methodbench import hookimpl
from methodbench.entries import Method, Metric, Model, Task

_MEAN = Metric(name="mean", direction="lower", primary=True)


@hookimpl
def methodbench_methods():
    return [
        Method(name="constant", kind="probe", family="toy", impl="changing.methods:Constant", summary="A number."),
        Method(
            name="nudge", kind="compressor", family="toy", impl="changing.methods:Nudge", summary="Nudges a block.",
            applies_to=("chain",),
        ),
    ]  # fmt: skip


@hookimpl
def methodbench_models():
    return [
        Model(
            name="chain",
            kind="chain",
            source="recipe:chain",
            loader="changing.models:Chain",
            summary="Four blocks.",
        )
    ]


@hookimpl
def methodbench_tasks():
    return [
        Task(
            name="chain-mean", kinds=("compressor",), accepts=("chain",), impl="changing.models:Mean",
            summary="Mean of the outputs.", metrics=(_MEAN,), protocol=1, threads=1,
        )
    ]  # fmt: skip
