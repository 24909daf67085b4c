"""The optim family: rules that update parameters, methods of training, and the workloads that compare them."""

from __future__ import annotations

from methodbench.entries import Family, Method, SuiteFile, Task
from methodbench.hookspecs import hookimpl
from methodbench_optim.methods import METHODS
from methodbench_optim.tasks import TASKS
from methodbench_optim.training.entries import METHODS as TRAINING


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
    return [*METHODS, *TRAINING]


@hookimpl
def methodbench_tasks() -> list[Task]:
    return list(TASKS)


@hookimpl
def methodbench_suites() -> list[SuiteFile]:
    return [
        SuiteFile(
            name="demo-optim",
            package="methodbench_optim",
            path="suites/demo.yaml",
            summary="sgdm, adam, adamw, lion and diffgrad on three functions and on digits, three seeds.",
            role="demo",
        ),
        SuiteFile(
            name="demo-quick-optim",
            package="methodbench_optim",
            path="suites/demo-quick.yaml",
            summary="sgdm, adam, adamw, lion and diffgrad on three functions and on digits, one seed.",
            role="demo-quick",
        ),
        SuiteFile(
            name="optim-tuned",
            package="methodbench_optim",
            path="suites/tuned.yaml",
            summary="Six optimizers on five workloads, as configured and tuned by eight trials each.",
        ),
        SuiteFile(
            name="optim-claims",
            package="methodbench_optim",
            path="suites/claims.yaml",
            summary="What the claims of the optimizers are about, three seeds.",
        ),
        SuiteFile(
            name="training",
            package="methodbench_optim",
            path="suites/training.yaml",
            summary="Methods of training against plain training, three seeds.",
        ),
        SuiteFile(
            name="optim-with-data",
            package="methodbench_optim",
            path="suites/with-data.yaml",
            summary="ResNet-20 and ViT-Tiny on a part of CIFAR-10, SmolLM2 fine-tuned for 24 steps.",
        ),
    ]
