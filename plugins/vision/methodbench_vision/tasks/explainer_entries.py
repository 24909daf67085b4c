"""Tasks that score explainers, as light entries."""

from __future__ import annotations

from methodbench.entries import Metric, Task

TASKS: list[Task] = [
    Task(
        name="insertion-deletion",
        kinds=("explainer",),
        impl="methodbench_vision.tasks.faithfulness:InsertionDeletion",
        summary="How the model's confidence rises and falls as pixels are shown or hidden in the map's "
        "order, on photographs that scikit-image and scikit-learn ship.",
        metrics=(
            Metric(name="insertion-auc", direction="higher", title="insertion AUC", primary=True),
            Metric(name="deletion-auc", direction="lower", title="deletion AUC"),
            Metric(name="average-drop", direction="lower"),
            Metric(name="average-gain", direction="higher"),
            Metric(name="increase", direction="higher", title="increase in confidence"),
        ),
        protocol=1,
        accepts=("cnn", "vit"),
        data="builtin:scikit-image/photographs",
        extra="vision",
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
]
