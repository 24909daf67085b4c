"""Entries of the workloads that compare optimizers and training methods."""

from __future__ import annotations

from typing import Any

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


#: What the workloads that train on data have in common.
_TRAINED = (
    Metric(name="validation-loss", direction="lower", unit="nats", aggregate="single"),
    Metric(name="steps-to-target", direction="lower", unit="steps", aggregate="single"),
)
_CLASSIFIED = (
    Metric(name="test-nll", direction="lower", unit="nats", title="test loss", primary=True),
    Metric(name="test-accuracy", direction="higher"),
    *_TRAINED,
)


def _surface(name: str, summary: str, **options: Any) -> Task:
    return Task(
        name=name,
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.surfaces:Surface",
        summary=summary,
        metrics=(
            Metric(name="log-gap", direction="lower", title="log10 of the gap to the minimum", primary=True),
            Metric(
                name="distance", direction="lower", title="distance from the minimizer", aggregate="median"
            ),
            Metric(name="steps-to-target", direction="lower", unit="steps", aggregate="median"),
        ),
        protocol=1,
        options=options,
        threads=1,
        extra="optim",
    )


def _digits(architecture: str, steps: int, trials: int, summary: str) -> Task:
    return Task(
        name=f"digits-{architecture}",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.digits:Digits",
        summary=summary,
        metrics=_CLASSIFIED,
        protocol=2,
        data="builtin:scikit-learn/digits",
        options={"architecture": architecture, "steps": steps, "trials": trials},
        threads=1,
        tuned_by="validation-loss",
        extra="optim",
    )


def _characters(name: str, text: str, data: str, summary: str, **options: Any) -> Task:
    return Task(
        name=name,
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.characters:Characters",
        summary=summary,
        metrics=(
            Metric(name="test-nll", direction="lower", unit="nats", title="test loss", primary=True),
            *_TRAINED,
        ),
        protocol=1,
        data=data,
        options={"text": text, **options},
        threads=1,
        tuned_by="validation-loss",
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
    _surface(
        "rosenbrock",
        "A curved valley in the plane; 500 steps from 11 starts, gradients clipped to norm 1.",
        function="rosenbrock",
    ),
    _surface(
        "rastrigin",
        "A bowl full of dents in the plane; 500 steps from 11 starts, gradients clipped to norm 1.",
        function="rastrigin",
    ),
    _surface(
        "quadratic",
        "Quadratics in 32 variables of condition 1000 in random bases; 500 steps on 11 of them.",
        function="quadratic",
    ),
    Task(
        name="logistic",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.logistic:Logistic",
        summary="Multinomial logistic regression on heavy-tailed features of unequal scale; 500 steps.",
        metrics=_CLASSIFIED,
        protocol=1,
        threads=1,
        tuned_by="validation-loss",
        extra="optim",
    ),
    _digits(
        "mlp",
        400,
        5,
        "A small MLP on scikit-learn's digits; five learning rates, chosen by validation loss.",
    ),
    _digits(
        "cnn",
        250,
        5,
        "A small CNN on scikit-learn's digits; five learning rates, chosen by validation loss.",
    ),
    _digits("vit", 300, 1, "A small vision transformer on scikit-learn's digits; 300 steps as configured."),
    _characters(
        "char-transformer",
        "pydoc",
        "builtin:pydoc_data/topics",
        "A decoder of two blocks on the characters of Python's language reference; 300 steps.",
    ),
    _characters(
        "char-transformer-shakespeare",
        "shakespeare",
        "file:{data}/tinyshakespeare/input.txt",
        "A decoder of two blocks on the characters of Shakespeare's plays; 300 steps.",
    ),
    Task(
        name="small-scale-proxies",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.proxies:SmallScaleProxies",
        summary="What a small transformer loses over seven learning rates: does the optimizer need the right one?",
        metrics=(
            Metric(
                name="lr-sensitivity",
                direction="lower",
                unit="nats",
                title="learning-rate sensitivity",
                aggregate="single",
                primary=True,
            ),
            Metric(name="best-loss", direction="lower", unit="nats", aggregate="single"),
            Metric(
                name="largest-stable-lr",
                direction="higher",
                title="largest stable learning rate",
                aggregate="single",
            ),
        ),
        protocol=1,
        data="builtin:pydoc_data/topics",
        threads=1,
        extra="optim",
    ),
    Task(
        name="sgd-noise-regimes",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.noise:NoiseRegimes",
        summary="A perceptron trained to zero hinge loss at six temperatures, learning rate over batch size.",
        metrics=(
            Metric(name="test-error", direction="lower", primary=True),
            Metric(
                name="converged-share", direction="higher", title="temperatures at which the training ends"
            ),
        ),
        protocol=1,
        threads=1,
        extra="optim",
    ),
)
