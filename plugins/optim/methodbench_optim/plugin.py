"""Entries of the optim family: rules that update parameters, and the workloads that compare them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from methodbench.entries import Family, Method, Metric, Paper, SuiteFile, Task
from methodbench.hookspecs import hookimpl

#: The setting of diffGrad's analysis on non-convex functions, for every rule that has these fields.
_SYNTHETIC: Mapping[str, Any] = {"lr": 0.1, "beta1": 0.95, "beta2": 0.999}

_TORCH = "torch.optim of torch 2.15"


@hookimpl
def methodbench_families() -> list[Family]:
    return [
        Family(
            name="optim",
            title="Optimizers",
            summary="Rules that turn gradients into steps: where they end up, and how soon.",
        )
    ]


@hookimpl
def methodbench_methods() -> list[Method]:
    return [
        Method(
            name="sgd",
            kind="optimizer",
            family="optim",
            impl="methodbench_optim.baselines:SGD",
            summary="Gradient descent with heavy-ball or Nesterov momentum.",
            paper=Paper(
                title="On the importance of initialization and momentum in deep learning",
                venue="ICML",
                year=2013,
                authors="Ilya Sutskever and James Martens and George Dahl and Geoffrey Hinton",
            ),
            presets={
                "nesterov": {"nesterov": True},
                "plain": {"momentum": 0.0},
                "synthetic": {"lr": 0.1},
            },
            claims="sgd.toml",
            fidelity="reimplementation",
            parity=_TORCH,
            vectors=("optim/optim_baselines",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "channel-permutation-equivariant",
                "dtype-stable",
            ),
        ),
        Method(
            name="adam",
            kind="optimizer",
            family="optim",
            impl="methodbench_optim.baselines:Adam",
            summary="Steps of the first moment over the root of the second, freed of their start at zero.",
            paper=Paper(
                title="Adam: A Method for Stochastic Optimization",
                arxiv="1412.6980",
                venue="ICLR",
                year=2015,
                authors="Diederik P. Kingma and Jimmy Ba",
            ),
            presets={"amsgrad": {"amsgrad": True}, "synthetic": _SYNTHETIC},
            claims="adam.toml",
            fidelity="reimplementation",
            parity=_TORCH,
            vectors=("optim/optim_baselines",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "channel-permutation-equivariant",
                "dtype-stable",
                "gradient-scale-invariant",
            ),
        ),
        Method(
            name="adamw",
            kind="optimizer",
            family="optim",
            impl="methodbench_optim.baselines:AdamW",
            summary="Adam with decay taken off the weights themselves instead of added to the gradient.",
            paper=Paper(
                title="Decoupled Weight Decay Regularization",
                arxiv="1711.05101",
                venue="ICLR",
                year=2019,
                authors="Ilya Loshchilov and Frank Hutter",
                code="loshchil/AdamW-and-SGDW",
            ),
            presets={
                "language-model": {"beta1": 0.9, "beta2": 0.99},
                "synthetic": {**_SYNTHETIC, "weight_decay": 0.0},
            },
            claims="adamw.toml",
            fidelity="reimplementation",
            parity=_TORCH,
            vectors=("optim/optim_baselines",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "channel-permutation-equivariant",
                "dtype-stable",
                "gradient-scale-invariant",
            ),
        ),
        Method(
            name="lion",
            kind="optimizer",
            family="optim",
            impl="methodbench_optim.lion:Lion",
            summary="Moves every coordinate by the learning rate, along the sign of momentum and gradient.",
            paper=Paper(
                title="Symbolic Discovery of Optimization Algorithms",
                arxiv="2302.06675",
                venue="NeurIPS",
                year=2023,
                authors="Xiangning Chen and Chen Liang and Da Huang and Esteban Real and Kaiyuan Wang"
                " and Yao Liu and Hieu Pham and Xuanyi Dong and Thang Luong and Cho-Jui Hsieh"
                " and Yifeng Lu and Quoc V. Le",
                code="google/automl",
            ),
            presets={"language-model": {"beta1": 0.95, "beta2": 0.98}, "synthetic": _SYNTHETIC},
            claims="lion.toml",
            fidelity="authors-code",
            parity="lion-pytorch 0.2.5, equal to google/automl@6a54c8741",
            vectors=("optim/lion",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "channel-permutation-equivariant",
                "dtype-stable",
                "gradient-scale-invariant",
            ),
        ),
        Method(
            name="diffgrad",
            kind="optimizer",
            family="optim",
            impl="methodbench_optim.diffgrad:DiffGrad",
            summary="Adam whose steps are slowed, down to half, where the gradient hardly changes.",
            paper=Paper(
                title="diffGrad: An Optimization Method for Convolutional Neural Networks",
                arxiv="1909.11015",
                venue="IEEE Transactions on Neural Networks and Learning Systems",
                year=2020,
                authors="Shiv Ram Dubey and Soumendu Chakraborty and Swalpa Kumar Roy"
                " and Snehasis Mukherjee and Satish Kumar Singh and Bidyut Baran Chaudhuri",
                code="shivram1987/diffGrad",
            ),
            presets={
                "synthetic": _SYNTHETIC,
                "synthetic-notebook": {**_SYNTHETIC, "eps_position": "after-correction"},
                "version-1": {"previous_grad_alias": True},
            },
            claims="diffgrad.toml",
            fidelity="authors-code",
            parity="shivram1987/diffGrad@73233ba47, diffGrad_v2.py and the notebook",
            vectors=("optim/diffgrad",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "channel-permutation-equivariant",
                "dtype-stable",
            ),
        ),
    ]


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


@hookimpl
def methodbench_tasks() -> list[Task]:
    return [
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
    ]


@hookimpl
def methodbench_suites() -> list[SuiteFile]:
    return [
        SuiteFile(
            name="demo-optim",
            package="methodbench_optim",
            path="suites/demo.yaml",
            summary="sgd, adam, adamw, lion and diffgrad on three functions and on digits, three seeds.",
            role="demo",
        ),
        SuiteFile(
            name="demo-quick-optim",
            package="methodbench_optim",
            path="suites/demo-quick.yaml",
            summary="sgd, adam, adamw, lion and diffgrad on three functions and on digits, one seed.",
            role="demo-quick",
        ),
    ]
