"""Entries of the quant plugin: language models and their tasks, quantizers of language models and of ViTs."""

from __future__ import annotations

from methodbench.entries import Family, Method, Model, SuiteFile, Task
from methodbench.hookspecs import hookimpl
from methodbench_quant.llm.entries import METHODS as LLM_METHODS
from methodbench_quant.models.entries import MODELS, model_named
from methodbench_quant.tasks.entries import TASKS, task_named
from methodbench_quant.vit.entries import METHODS as VIT_METHODS


@hookimpl
def methodbench_families() -> list[Family]:
    return [
        Family(
            name="quant",
            title="Quantization",
            summary="Fewer bits per weight or activation, without training or with little of it.",
        )
    ]


@hookimpl
def methodbench_methods() -> list[Method]:
    return [*LLM_METHODS, *VIT_METHODS]


@hookimpl
def methodbench_models() -> list[Model]:
    return MODELS


@hookimpl
def methodbench_tasks() -> list[Task]:
    return TASKS


@hookimpl
def methodbench_model_named(name: str) -> Model | None:
    return model_named(name)


@hookimpl
def methodbench_task_named(name: str) -> Task | None:
    return task_named(name)


@hookimpl
def methodbench_suites() -> list[SuiteFile]:
    return [
        SuiteFile(
            name="demo-quant",
            package="methodbench_quant",
            path="suites/demo.yaml",
            summary="rtn, gptq and awq at 4 and 3 bits on SmolLM2-135M; a quantized vision transformer.",
            role="demo",
        ),
        SuiteFile(
            name="demo-quick-quant",
            package="methodbench_quant",
            path="suites/demo-quick.yaml",
            summary="rtn and awq at 3 bits on SmolLM2-135M; a vision transformer at 4 bits.",
            role="demo-quick",
        ),
        SuiteFile(
            name="llm-weight-activation",
            package="methodbench_quant",
            path="suites/llm-weight-activation.yaml",
            summary="rtn, smoothquant, dgq-llm, llm-fp4 and agile-quant at 8, 6 and 4 bits for both.",
        ),
        SuiteFile(
            name="llm-weight-only",
            package="methodbench_quant",
            path="suites/llm-weight-only.yaml",
            summary="Eight quantizers of weights at 4, 3 and 2 bits, per channel and in groups.",
        ),
        SuiteFile(
            name="llm-rotation",
            package="methodbench_quant",
            path="suites/llm-rotation.yaml",
            summary="Rotation and reconstruction where rounding to nearest breaks the model: W4A4, KV4, W3 and W2.",
        ),
        SuiteFile(
            name="llm-moe",
            package="methodbench_quant",
            path="suites/llm-moe.yaml",
            summary="eaquant and rounding at four bits for all on a mixture of experts, with and without outliers.",
        ),
        SuiteFile(
            name="vit-ptq",
            package="methodbench_quant",
            path="suites/vit-ptq.yaml",
            summary="Vision transformers at 8, 6, 4 and 3 bits for weights and activations, with and without outliers.",
        ),
        SuiteFile(
            name="cnn-ptq",
            package="methodbench_quant",
            path="suites/cnn-ptq.yaml",
            summary="Convolutional networks with weights of 4, 3 and 2 bits, and with activations of few bits.",
        ),
    ]
