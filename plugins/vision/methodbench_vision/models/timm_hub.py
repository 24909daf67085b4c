"""Image classifiers of the Hugging Face hub in timm's format: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import timm

from methodbench.context import Context
from methodbench.errors import NotApplicableError, SourceError
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench_vision.models.storage import WEIGHTS, load_weights
from methodbench_vision.tasks.datasets import imagenet_classes

CONFIG = "config.json"


@hyperparameters
class TimmHub:
    """Loads a snapshot of a repository in timm's format."""

    kind: Literal["cnn", "vit"] = "cnn"
    """What the model's name promises; a model whose structure is of another kind is refused."""

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        if source is None:
            raise SourceError("the model has no folder", "Its source must be a repository of the hub.")
        for name in (CONFIG, WEIGHTS):
            if not (source / name).is_file():
                raise SourceError(
                    f"{source} has no {name}",
                    "Only repositories in timm's format with safetensors can be read, never pickled weights.",
                )
            shutil.copyfile(source / name, target / name)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        config = read_config(folder / CONFIG)
        architecture = config["architecture"]
        if not timm.is_model(architecture):
            raise SourceError(
                f"timm {timm.__version__} has no architecture {architecture!r}",
                "Upgrade timm, or choose a model that it knows.",
            )
        module = timm.create_model(
            architecture, num_classes=config["num_classes"], **config.get("model_args", {})
        )
        module = load_weights(module, folder, ctx)
        adapter = detect(module)
        if adapter.kind != self.kind:
            raise NotApplicableError(
                f"{architecture} is a {adapter.kind} by its structure, but was taken for a {self.kind}",
                "Register the model in a plugin, with its kind and this loader.",
            )
        return LoadedModel(
            name=architecture,
            kind=self.kind,
            module=module,
            adapter=adapter,
            preprocess=preprocess(config),
            classes=classes(config),
        )


def read_config(path: Path) -> dict[str, Any]:
    """Read timm's ``config.json`` with the entries of ``pretrained_cfg``, which newer files nest, at the top.

    Raises:
        SourceError: it is not JSON, or names no architecture.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = {**config.get("pretrained_cfg", {}), **config}
        config["architecture"], config["num_classes"] = (
            str(config["architecture"]),
            int(config["num_classes"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{path} is not a configuration of timm: {error!r}",
            "It must be a JSON object with 'architecture' and 'num_classes'.",
        ) from error
    return config


def preprocess(config: dict[str, Any]) -> Preprocess:
    """Return how the model wants its pictures; what the file leaves out is ImageNet's usual."""
    return Preprocess(
        size=tuple(config.get("input_size", (3, 224, 224))[1:]),
        mean=tuple(config.get("mean", (0.485, 0.456, 0.406))),
        std=tuple(config.get("std", (0.229, 0.224, 0.225))),
        crop=float(config.get("crop_pct", 0.875)),
        interpolation=config.get("interpolation", "bicubic"),
    )


def classes(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes: ImageNet's for 1,000 outputs, else the file's, else their numbers."""
    count = config["num_classes"]
    if count == 1000:
        return imagenet_classes()
    names = config.get("label_names") or [str(index) for index in range(count)]
    return tuple(str(name) for name in names)
