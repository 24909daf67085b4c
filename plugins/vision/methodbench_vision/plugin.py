"""Entries of the vision plugin: image models, image accuracy, explainers, weakly supervised methods, their tasks."""

from __future__ import annotations

from methodbench.entries import Family, Method, Model, SuiteFile, Task
from methodbench.hookspecs import hookimpl
from methodbench_vision.methods import METHODS
from methodbench_vision.models.entries import MODELS, model_named
from methodbench_vision.tasks.entries import TASKS as ACCURACY_TASKS
from methodbench_vision.tasks.explainer_entries import TASKS as EXPLAINER_TASKS
from methodbench_vision.tasks.weak_entries import TASKS as WEAK_TASKS
from methodbench_vision.weak_methods import METHODS as WEAK_METHODS


@hookimpl
def methodbench_families() -> list[Family]:
    return [
        Family(
            name="vision",
            title="Vision",
            summary="Saliency maps of image classifiers: where a network looks, and how faithful the map is.",
        )
    ]


@hookimpl
def methodbench_methods() -> list[Method]:
    return [*METHODS, *WEAK_METHODS]


@hookimpl
def methodbench_models() -> list[Model]:
    return MODELS


@hookimpl
def methodbench_tasks() -> list[Task]:
    return [*ACCURACY_TASKS, *EXPLAINER_TASKS, *WEAK_TASKS]


@hookimpl
def methodbench_model_named(name: str) -> Model | None:
    return model_named(name)


@hookimpl
def methodbench_suites() -> list[SuiteFile]:
    return [
        SuiteFile(
            name="demo-vision",
            package="methodbench_vision",
            path="suites/demo.yaml",
            summary="Grad-CAM, Eigen-CAM and a random control on EfficientNet-Lite0 and on exact masks.",
            role="demo",
        ),
        SuiteFile(
            name="demo-quick-vision",
            package="methodbench_vision",
            path="suites/demo-quick.yaml",
            summary="Grad-CAM, Eigen-CAM and a random control on pictures with exact masks.",
            role="demo-quick",
        ),
        SuiteFile(
            name="explainers",
            package="methodbench_vision",
            path="suites/explainers.yaml",
            summary="Every explainer beside controls: where maps point, and whether they follow the model.",
        ),
        SuiteFile(
            name="explainers-with-data",
            package="methodbench_vision",
            path="suites/explainers-with-data.yaml",
            summary="Insertion, deletion and ROAD on CIFAR-10 and on a sample of ImageNet, where the data is present.",
        ),
        SuiteFile(
            name="weak-supervision",
            package="methodbench_vision",
            path="suites/weak.yaml",
            summary="BAS, USAGE, DOEI and DoNuSeg beside the bases that they claim to beat.",
        ),
        SuiteFile(
            name="image-probes",
            package="methodbench_vision",
            path="suites/probes.yaml",
            summary="Neuron paths, multifaceted pictures and DiSRT on the networks of the procedural pictures.",
        ),
    ]
