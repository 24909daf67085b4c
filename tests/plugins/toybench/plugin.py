"""Entries of the toy plugin."""

from __future__ import annotations

from methodbench import hookimpl
from methodbench.entries import Family, Method, Metric, Model, Resources, SuiteFile, Task


def _probe(name: str, attribute: str, **more: object) -> Method:
    return Method(
        name=name, kind="probe", family="toy", impl=f"toybench.methods:{attribute}", summary=name, **more
    )  # type: ignore[arg-type]


@hookimpl
def methodbench_families():
    return [Family(name="toy", title="Toys", summary="For tests.")]


def _link(name: str, attribute: str, stage: str, **more: object) -> Method:
    return Method(
        name=name, kind="compressor", family="toy", impl=f"toybench.methods:{attribute}", summary=f"{name}.",
        applies_to=("toy-net",), stage=stage, **more,
    )  # type: ignore[arg-type]  # fmt: skip


@hookimpl
def methodbench_methods():
    return [
        _probe("noop", "Noop", presets={"twice": {"value": 2.0}}, claims="noop.toml"),
        _probe("sleeper", "Sleeper"),
        _probe("jitter", "Jitter"),
        _probe("misbehave", "Misbehave"),
        _probe("needs-absent-module", "Absent"),
        Method(
            name="scale", kind="compressor", family="toy", impl="toybench.methods:Scale", summary="Scales weights.",
            applies_to=("toy-net",), needs=("calibration",),
        ),
        _probe("needs-gpus", "Noop", resources=Resources(gpus=2)),
        _probe("needs-memory", "Noop", resources=Resources(memory=1e6)),
        _link("zero-columns", "ZeroColumns", "prune", presets={"two": {"columns": 2}}),
        _link("round", "Round", "quantize", presets={"coarse": {"step": 0.5}, "off-zero": {"shift": 0.1}}),
        _link("mask", "Mask", "prune"),
        _link("restore", "Restore", "compensate"),
        Method(
            name="needs-extra", kind="probe", family="toy", impl="toybench.methods:Noop", summary="x", extra="absent"
        ),
    ]  # fmt: skip


@hookimpl
def methodbench_models():
    return [
        Model(
            name="toy-linear", kind="toy-net", source="recipe:toy-linear", loader="toybench.models:ToyLoader",
            summary="A linear layer.",
        ),
        Model(
            name="toy-broken", kind="toy-net", source="recipe:toy-broken", loader="toybench.models:BrokenLoader",
            summary="Cannot be prepared.",
        ),
        Model(
            name="toy-file", kind="toy-net", source="file:{models}/toy.safetensors", loader="toybench.models:ToyLoader",
            summary="Needs a file.",
        ),
    ]  # fmt: skip


@hookimpl
def methodbench_tasks():
    value = Metric(name="value", direction="higher", primary=True)
    return [
        Task(
            name="toy-value", kinds=("probe",), impl="toybench.tasks:Value", summary="Returns the method's value.",
            metrics=(value, Metric(name="square", direction="lower")), protocol=1, threads=1,
        ),
        Task(
            name="toy-norm", kinds=("compressor",), accepts=("toy-net",), impl="toybench.tasks:Norm", summary="Norm.",
            metrics=(Metric(name="norm", direction="lower", aggregate="single", primary=True),), protocol=1, threads=1,
        ),
        Task(
            name="toy-mean", kinds=("compressor",), accepts=("toy-net",), impl="toybench.tasks:Mean", summary="Mean.",
            metrics=(Metric(name="mean", direction="lower", primary=True),), protocol=3, threads=1,
        ),
        Task(
            name="toy-crash", kinds=("compressor",), accepts=("toy-net",), impl="toybench.tasks:Crash", summary="Dies.",
            metrics=(Metric(name="norm", direction="lower", primary=True),), protocol=1, threads=1,
        ),
    ]  # fmt: skip


@hookimpl
def methodbench_task_named(name):
    if name.startswith("toy:"):
        return Task(
            name=name, kinds=("probe",), impl="toybench.tasks:Value", summary="By name.", protocol=1, threads=1,
            metrics=(Metric(name="value", direction="higher", primary=True),),
            options={"units": int(name.removeprefix("toy:"))},
        )  # fmt: skip
    return None


@hookimpl
def methodbench_suites():
    return [SuiteFile(name="toy-suite", package="toybench", path="suites/toy.yaml", summary="Toys.")]
