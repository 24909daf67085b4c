"""A small vision transformer trained on scikit-learn's digits, optionally with outlier channels put in.

A ViT this small has no outlier channels, so that the simplest activation quantizer loses nothing on it. The
option ``outlier_scale`` makes the difficulty of large networks explicit without changing the function: for
every norm and the layer that reads it, with r_c = exp(s N(0, 1)) per channel and a few channels 30 times
larger,

    gamma <- gamma * r,    beta <- beta * r,    W[:, c] <- W[:, c] / r_c.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench.torchkit.seeding import repeatable
from methodbench_vision.models.outlier_channels import OutlierChannels
from methodbench_vision.models.storage import load_weights, save_weights
from methodbench_vision.models.training import check_accuracy, train
from methodbench_vision.tasks.datasets import DIGITS_CLASSES, LabelledImages, digits
from methodbench_vision.tasks.images import to_inputs

PREPROCESS = Preprocess(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@hyperparameters
class DigitsViT(OutlierChannels):
    """Trains a ViT of three blocks (width 48, three heads, patches of 2 x 2) on 1,297 digits."""

    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over the training images")] = 40
    seed: Annotated[int, Field(ge=0, description="of initialization and order of images")] = 0
    min_accuracy: Annotated[
        float, Field(ge=0, le=1, description="least held-out accuracy; training that misses it is an error")
    ] = 0.95

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        train_set, held_out = (_tensors(part) for part in digits())
        with repeatable(self.seed):
            module = build()
            train(
                module,
                *train_set,
                epochs=self.epochs,
                batch_size=64,
                peak_rate=4e-3,
                weight_decay=0.05,
                ctx=ctx,
            )
            check_accuracy(module, *held_out, self.min_accuracy)
        self.spread(module)
        save_weights(module.state_dict(), target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        module = load_weights(build(), folder, ctx)
        return LoadedModel(
            name="digits-vit",
            kind="vit",
            module=module,
            adapter=detect(module),
            preprocess=PREPROCESS,
            classes=DIGITS_CLASSES,
            facts={"data": "digits", "outlier_scale": self.outlier_scale},
        )


def build() -> VisionTransformer:
    """Return the network, freshly initialized from torch's global generator; inputs float32 [B, 3, 8, 8]."""
    return VisionTransformer(
        img_size=8, patch_size=2, num_classes=10, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2.0
    )


def _tensors(images: LabelledImages) -> tuple[Tensor, Tensor]:
    pictures = [images[index] for index in range(len(images))]
    return to_inputs(pictures, PREPROCESS), torch.from_numpy(images.labels)
