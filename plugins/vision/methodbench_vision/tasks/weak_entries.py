"""Tasks of methods that learn from weak labels, as light entries."""

from __future__ import annotations

from methodbench.entries import Metric, Task

TASKS: list[Task] = [
    Task(
        name="shapes-weak-localization",
        kinds=("segmenter",),
        impl="methodbench_vision.tasks.weak:WeakLocalization",
        summary="Whether a map learned from one class per picture covers the object: MaxBoxAcc, GT-known and top-1 "
        "localization on procedural pictures with exact boxes and masks.",
        metrics=(
            Metric(name="max-box-acc-v2", direction="higher", title="MaxBoxAccV2", primary=True),
            Metric(name="max-box-acc", direction="higher", title="MaxBoxAcc"),
            Metric(name="gt-known-loc", direction="higher", title="GT-known localization"),
            Metric(name="top1-loc", direction="higher", title="top-1 localization"),
            Metric(name="pxap", direction="higher", unit="%", title="PxAP", aggregate="single"),
            Metric(name="piou", direction="higher", title="pooled pixel IoU", aggregate="single"),
            Metric(name="pointing-object", direction="higher", title="pointing (object)"),
            Metric(name="accuracy", direction="higher"),
        ),
        protocol=1,
        data="builtin:procedural-shapes",
        threads=1,
        extra="vision",
    ),
]
