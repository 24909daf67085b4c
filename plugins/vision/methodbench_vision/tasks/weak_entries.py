"""Tasks of methods that learn from weak labels, as light entries."""

from __future__ import annotations

from methodbench.entries import Metric, Task

#: What maps that compete for the pixels of several classes are scored by.
SEED_METRICS = (
    Metric(name="seed-miou", direction="higher", title="seed mIoU", aggregate="single", primary=True),
    Metric(name="image-miou", direction="higher", title="mIoU per picture"),
    Metric(name="wrong-class", direction="lower", title="objects labelled as another class"),
    Metric(name="over-activation", direction="lower", title="FP / union", aggregate="single"),
    Metric(name="under-activation", direction="lower", title="FN / union", aggregate="single"),
)

TASKS: list[Task] = [
    Task(
        name="shapes-weak-localization",
        kinds=("segmenter", "explainer"),
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
    Task(
        name="shapes-wsss",
        kinds=("segmenter", "explainer"),
        impl="methodbench_vision.tasks.weak:SeedSegmentation",
        summary="Seeds of semantic segmentation learned from the classes of whole pictures: mIoU at the best "
        "background score, on procedural pictures of several objects whose classes come together.",
        metrics=(
            *SEED_METRICS,
            Metric(name="classification", direction="higher", title="classes told right"),
            Metric(name="seed-area", direction="higher", title="share covered at the method's threshold"),
        ),
        protocol=1,
        data="builtin:procedural-scenes",
        threads=1,
        extra="vision",
    ),
    Task(
        name="nuclei",
        kinds=("segmenter", "explainer"),
        impl="methodbench_vision.tasks.nuclei:NucleiInstances",
        summary="Instances of touching nuclei learned from one jittered point each, on procedural tissue.",
        metrics=(
            Metric(name="aji", direction="higher", title="AJI", primary=True),
            Metric(name="dice", direction="higher", title="Dice"),
            Metric(name="pq", direction="higher", title="PQ"),
            Metric(name="pseudo-iou", direction="higher", title="IoU of the labels trained on"),
        ),
        protocol=1,
        data="builtin:procedural-nuclei",
        threads=1,
        extra="vision",
    ),
]
