"""Entries of the workloads that compare optimizers and training methods."""

from __future__ import annotations

from methodbench.entries import Metric, Task


def _nonconvex(function: str, summary: str) -> Task:
    return Task(
        name=f"nonconvex-{function}",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.nonconvex:NonConvex",
        summary=summary,
        metrics=(
            Metric(name="final-gap", direction="lower", title="gap to the global minimum", primary=True),
            Metric(name="global-share", direction="higher", title="starts that end at the global minimum"),
            Metric(
                name="start-gap",
                direction="lower",
                title="gap to the global minimum from the paper's start",
                aggregate="single",
            ),
        ),
        protocol=1,
        options={"function": function},
        threads=1,
        extra="optim",
    )


def _digits(architecture: str, steps: int, summary: str) -> Task:
    return Task(
        name=f"digits-{architecture}",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.digits:Digits",
        summary=summary,
        metrics=(
            Metric(name="test-nll", direction="lower", unit="nats", title="test loss", primary=True),
            Metric(name="test-accuracy", direction="higher"),
            Metric(name="steps-to-target", direction="lower", unit="steps", aggregate="single"),
        ),
        protocol=1,
        data="builtin:scikit-learn/digits",
        options={"architecture": architecture, "steps": steps},
        threads=1,
        extra="optim",
    )


TASKS: tuple[Task, ...] = (
    _nonconvex(
        "f1", "Two parabolas, the shallower one on the far side of zero; 300 iterates from 21 starts."
    ),
    _nonconvex(
        "f2",
        "A steep wall, then waves on a cubic with a narrow global valley; 300 iterates from 21 starts.",
    ),
    _nonconvex("f3", "A sharp valley between two ridges; 300 iterates from 21 starts."),
    _digits(
        "mlp",
        400,
        "A small MLP on scikit-learn's digits; five learning rates, chosen by validation loss.",
    ),
    _digits(
        "cnn",
        250,
        "A small CNN on scikit-learn's digits; five learning rates, chosen by validation loss.",
    ),
)
