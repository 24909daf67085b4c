"""A small vision transformer trained on procedural images with exact masks.

It is asked the same as the small convolutional network: which stripes does the head of the ellipse carry? Patches of
8 x 8 pixels make a grid of 8 x 8 tokens, beside a class token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from timm.models.vision_transformer import VisionTransformer

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.seeding import repeatable
from methodbench_vision.models.shapes_cnn import PREPROCESS
from methodbench_vision.models.storage import load_weights, save_weights
from methodbench_vision.models.training import check_accuracy, train
from methodbench_vision.tasks.images import SHAPES_CLASSES, SHAPES_SIZE, normalize, procedural_images


@hyperparameters
class ShapesViT:
    """Trains a ViT of three blocks (width 64, four heads, patches of 8 x 8) on procedural images."""

    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over the training images")] = 24
    images: Annotated[int, Field(ge=50, le=100_000, description="training images")] = 4000
    seed: Annotated[int, Field(ge=0, description="of images, initialization and order of images")] = 0
    rail_probability: Annotated[
        float, Field(ge=0, le=1, description="how often class 0 comes with a rail, as a misleading context")
    ] = 0.0
    min_accuracy: Annotated[
        float, Field(ge=0, le=1, description="least held-out accuracy; training that misses it is an error")
    ] = 0.9

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        drawn = procedural_images(
            self.seed, self.images, split="train", rail_probability=self.rail_probability
        )
        held_out = procedural_images(self.seed, 200, rail_probability=self.rail_probability)
        with repeatable(self.seed):
            module = build()
            train(
                module,
                normalize(drawn.images, PREPROCESS),
                drawn.labels,
                epochs=self.epochs,
                batch_size=50,
                peak_rate=2e-3,
                weight_decay=0.05,
                ctx=ctx,
            )
            check_accuracy(module, normalize(held_out.images, PREPROCESS), held_out.labels, self.min_accuracy)
        save_weights(module.state_dict(), target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        module = load_weights(build(), folder, ctx)
        return LoadedModel(
            name="shapes-vit",
            kind="vit",
            module=module,
            adapter=detect(module),
            preprocess=PREPROCESS,
            classes=SHAPES_CLASSES,
            facts={"data": "procedural-shapes", "rail_probability": self.rail_probability},
        )


def build() -> VisionTransformer:
    """Return the network, freshly initialized from torch's global generator; inputs float32 [B, 3, 64, 64]."""
    return VisionTransformer(
        img_size=SHAPES_SIZE,
        patch_size=8,
        num_classes=len(SHAPES_CLASSES),
        embed_dim=64,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
    )
