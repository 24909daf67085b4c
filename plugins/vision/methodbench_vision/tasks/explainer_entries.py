"""Tasks that score explainers, as light entries."""

from __future__ import annotations

from methodbench.entries import Metric, Task
from methodbench_vision.tasks.weak_entries import SEED_METRICS

_CONFIDENCE = (
    Metric(name="insertion-auc", direction="higher", title="insertion AUC", primary=True),
    Metric(name="deletion-auc", direction="lower", title="deletion AUC"),
    Metric(name="average-drop", direction="lower"),
    Metric(name="average-gain", direction="higher"),
    Metric(name="increase", direction="higher", title="increase in confidence"),
)

TASKS: list[Task] = [
    Task(
        name="insertion-deletion",
        kinds=("explainer",),
        impl="methodbench_vision.tasks.faithfulness:InsertionDeletion",
        summary="How the model's confidence rises and falls as pixels are shown or hidden in the map's "
        "order, on photographs that scikit-image and scikit-learn ship.",
        metrics=_CONFIDENCE,
        protocol=1,
        accepts=("cnn", "vit"),
        data="builtin:scikit-image/photographs",
        extra="vision",
    ),
    *(
        Task(
            name=f"{data}-faithfulness",
            kinds=("explainer",),
            impl="methodbench_vision.tasks.pictures:PictureFaithfulness",
            summary=f"Insertion, deletion, changes of confidence, ROAD and sparseness on {what}; no masks are known.",
            metrics=(
                *_CONFIDENCE,
                Metric(name="road", direction="higher", title="ROAD (LeRF - MoRF) / 2"),
                Metric(name="sparseness", direction="higher", title="sparseness (Gini)"),
            ),
            protocol=1,
            accepts=("cnn", "vit"),
            data=source,
            options={"data": data, **options},
            extra="vision",
        )
        for data, what, source, options in (
            ("cifar10", "1,000 test images of CIFAR-10", "file:{data}/cifar10/test.parquet", {}),
            (
                "imagenet-samples",
                "1,000 pictures of ImageNet classes, ROAD on 100 of them",
                "file:{data}/imagenet_samples/val1000.parquet",
                {"road_images": 100},
            ),
        )
    ),
    Task(
        name="pointing-game",
        kinds=("explainer",),
        impl="methodbench_vision.tasks.localization:PointingGame",
        summary="Whether the map's highest point, highest pixels and mass lie on the object, on procedural "
        "images whose masks are known exactly.",
        metrics=(
            Metric(name="pointing-object", direction="higher", title="pointing (object)", primary=True),
            Metric(name="pointing-head", direction="higher", title="pointing (discriminative part)"),
            Metric(name="relevance-mass", direction="higher"),
            Metric(name="relevance-rank", direction="higher"),
        ),
        protocol=1,
        accepts=("cnn", "vit"),
        data="builtin:procedural-shapes",
        extra="vision",
    ),
    Task(
        name="shapes-wsol",
        kinds=("explainer",),
        impl="methodbench_vision.tasks.wsol:Localization",
        summary="Whether a map that is cut at a threshold covers the object: MaxBoxAcc V1 and V2, GT-known and "
        "top-1 localization and PxAP on procedural images with exact boxes and masks.",
        metrics=(
            Metric(name="max-box-acc-v2", direction="higher", title="MaxBoxAccV2", primary=True),
            Metric(name="max-box-acc", direction="higher", title="MaxBoxAcc"),
            Metric(name="gt-known-loc", direction="higher", title="GT-known localization"),
            Metric(name="top1-loc", direction="higher", title="top-1 localization"),
            Metric(name="pxap", direction="higher", unit="%", title="PxAP", aggregate="single"),
            Metric(name="piou", direction="higher", title="pooled pixel IoU", aggregate="single"),
            Metric(name="pointing-object", direction="higher", title="pointing (object)"),
        ),
        protocol=2,
        accepts=("cnn", "vit"),
        data="builtin:procedural-shapes",
        extra="vision",
    ),
    Task(
        name="shapes-faithfulness",
        kinds=("explainer",),
        impl="methodbench_vision.tasks.perturbation:Faithfulness",
        summary="ROAD, sparseness and infidelity of maps on procedural images.",
        metrics=(
            Metric(name="road", direction="higher", title="ROAD (LeRF - MoRF) / 2", primary=True),
            Metric(name="sparseness", direction="higher", title="sparseness (Gini)"),
            Metric(name="infidelity", direction="lower"),
        ),
        protocol=1,
        accepts=("cnn", "vit"),
        data="builtin:procedural-shapes",
        extra="vision",
    ),
    Task(
        name="shapes-randomization",
        kinds=("explainer",),
        impl="methodbench_vision.tasks.perturbation:Randomization",
        summary="How alike a map stays while the model's layers are drawn anew from the logits down.",
        metrics=(
            Metric(
                name="map-similarity", direction="lower", title="similarity over the cascade", primary=True
            ),
            Metric(name="map-similarity-head", direction="lower", title="similarity, logits drawn anew"),
            Metric(name="map-similarity-all", direction="lower", title="similarity, all layers drawn anew"),
        ),
        protocol=1,
        accepts=("cnn", "vit"),
        data="builtin:procedural-shapes",
        extra="vision",
    ),
    Task(
        name="shapes-robustness",
        kinds=("explainer",),
        impl="methodbench_vision.tasks.perturbation:Robustness",
        summary="How alike a map stays when the picture is attacked by the sign of the gradient.",
        metrics=(
            Metric(name="map-iou", direction="higher", title="IoU before and after the attack", primary=True),
            Metric(name="map-correlation", direction="higher", title="rank correlation before and after"),
        ),
        protocol=1,
        accepts=("cnn", "vit"),
        data="builtin:procedural-shapes",
        extra="vision",
    ),
    Task(
        name="shapes-several",
        kinds=("explainer",),
        impl="methodbench_vision.tasks.several:SeveralClasses",
        summary="Whether the maps of several classes of one picture lie on the objects of their own class: mIoU at the "
        "best background score.",
        metrics=SEED_METRICS,
        protocol=1,
        accepts=("cnn", "vit"),
        data="builtin:procedural-scenes",
        extra="vision",
    ),
    *(
        Task(
            name=f"{data}-image-probe",
            kinds=("probe",),
            impl="methodbench_vision.tasks.probing:ImageProbing",
            summary=f"What a probe measures of an image classifier on held-out images: {what}.",
            metrics=(
                Metric(name="score", direction="higher", title="first number of the probe", primary=True),
            ),
            protocol=1,
            accepts=("cnn", "vit"),
            data=source,
            options={"data": data},
            extra="vision",
        )
        for data, what, source in (
            ("shapes", "procedural shapes", "builtin:procedural-shapes"),
            ("digits", "digits of scikit-learn", "builtin:scikit-learn/digits"),
            ("cifar10", "CIFAR-10", "file:{data}/cifar10/test.parquet"),
        )
    ),
]
