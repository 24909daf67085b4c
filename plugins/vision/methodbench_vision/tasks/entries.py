"""Image accuracy tasks."""

from __future__ import annotations

from methodbench.entries import Metric, Task

_METRICS = (
    Metric(name="accuracy", direction="higher", title="top-1 accuracy", primary=True),
    Metric(name="nll", direction="lower", unit="nats", title="negative log-likelihood"),
)

TASKS: list[Task] = [
    Task(
        name="digits-acc",
        kinds=("compressor",),
        impl="methodbench_vision.tasks.accuracy:ImageAccuracy",
        summary="Top-1 accuracy on 500 held-out 8 x 8 digits of scikit-learn.",
        metrics=_METRICS,
        protocol=1,
        accepts=("vit", "cnn"),
        data="builtin:scikit-learn/digits",
        options={"data": "digits"},
        threads=1,
        extra="vision",
    ),
    Task(
        name="cifar10-acc",
        kinds=("compressor",),
        impl="methodbench_vision.tasks.accuracy:ImageAccuracy",
        summary="Top-1 accuracy on the first 2,000 test images of CIFAR-10.",
        metrics=_METRICS,
        protocol=1,
        accepts=("vit", "cnn"),
        data="file:{data}/cifar10/test.parquet",
        options={"data": "cifar10", "images": 2000},
        extra="vision",
    ),
    Task(
        name="imagenet-samples-acc",
        kinds=("compressor",),
        impl="methodbench_vision.tasks.accuracy:ImageAccuracy",
        summary="Top-1 accuracy on 900 pictures of ImageNet classes, one per class.",
        metrics=_METRICS,
        protocol=1,
        accepts=("vit", "cnn"),
        data="file:{data}/imagenet_samples/val1000.parquet",
        options={"data": "imagenet-samples"},
        extra="vision",
    ),
]
