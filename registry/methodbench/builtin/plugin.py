"""Entries of the core: the do-nothing baseline, problems with planted truth, the executor for Ray clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from methodbench.entries import Family, Method, Metric, Model, Task
from methodbench.hookspecs import hookimpl

if TYPE_CHECKING:
    from methodbench.engine.executors import Executor, ExecutorOptions


@hookimpl
def methodbench_families() -> list[Family]:
    return [
        Family(name="baseline", title="Baselines", summary="What a model does when nothing is done to it.")
    ]


@hookimpl
def methodbench_methods() -> list[Method]:
    return [
        Method(
            name="identity",
            kind="compressor",
            family="baseline",
            impl="methodbench.builtin.identity:Identity",
            summary="The dense model, unchanged.",
            applies_to=("*",),
            baseline=True,
            fidelity="baseline",
            properties=(
                "deterministic",
                "no-input-mutation",
                "idempotent",
                "scale-equivariant",
                "dtype-stable",
            ),
        )
    ]


def _planted_model(name: str, kind: str, loader: str, structure: str, summary: str) -> Model:
    return Model(
        name=name,
        kind=kind,
        source=f"recipe:{name}",
        loader=f"methodbench.builtin.{loader}",
        summary=summary,
        options={"structure": structure},
        notes="A random model for checking methods, not for ranking them.",
    )


@hookimpl
def methodbench_models() -> list[Model]:
    return [
        _planted_model(
            "planted-decoder",
            "causal-lm",
            "planted_decoder:PlantedDecoder",
            "llama",
            "A random decoder of two blocks with planted outlier channels.",
        ),
        _planted_model(
            "planted-cnn",
            "cnn",
            "planted:PlantedModel",
            "cnn",
            "A network whose evidence for each class is known to the pixel.",
        ),
    ]


def _planted_task(name: str, kind: str, attribute: str, metric: Metric, summary: str, *accepts: str) -> Task:
    more = (Metric(name="pointing", direction="higher"),) if metric.name == "evidence-mass" else ()
    return Task(
        name=name,
        kinds=(kind,),
        accepts=accepts,
        impl=f"methodbench.builtin.planted:{attribute}",
        summary=summary,
        metrics=(metric, *more),
        protocol=1,
        threads=1,
    )


@hookimpl
def methodbench_tasks() -> list[Task]:
    def lower(name: str) -> Metric:
        return Metric(name=name, direction="lower", primary=True)

    def higher(name: str) -> Metric:
        return Metric(name=name, direction="higher", primary=True)

    return [
        _planted_task(
            "planted-outliers", "compressor", "PlantedOutliers", lower("relative-error"),
            "Outputs of a model with planted outlier channels, against the dense ones.", "causal-lm", "cnn",
        ),
        _planted_task(
            "planted-evidence", "explainer", "PlantedEvidence", higher("evidence-mass"),
            "Maps of a network that looks at one patch, against that patch.", "cnn",
        ),
        _planted_task(
            "planted-quadratic", "optimizer", "PlantedQuadratic", lower("log10-gap"),
            "Gap to the minimum of quadratics of condition 100 after 200 steps.",
        ),
        _planted_task(
            "planted-teacher", "training", "PlantedTeacher", higher("accuracy"),
            "A small student that learns from a linear teacher's labels.",
        ),
        _planted_task(
            "planted-masks", "segmenter", "PlantedMasks", higher("iou"),
            "Masks learned from classes of images with one patch of each class.",
        ),
        _planted_task(
            "planted-contrast", "probe", "PlantedContrast", higher("contrast"),
            "How far measurements move when outlier channels are planted into one function.", "causal-lm",
        ),
    ]  # fmt: skip


@hookimpl
def methodbench_executor(name: str, options: ExecutorOptions) -> Executor | None:
    if name != "ray":
        return None
    from methodbench.builtin.ray_executor import RayExecutor

    return RayExecutor(options)
