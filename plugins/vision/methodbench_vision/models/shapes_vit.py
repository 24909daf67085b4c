"""A small vision transformer trained on procedural images with exact masks.

Three strided convolutions make its 8 x 8 patches (Xiao et al., Early Convolutions Help Transformers See Better,
2106.14881): from flat patches a transformer does not learn the stripes from two thousand images. Everything behind them
is timm's plain vision transformer, so that whatever reads attention or tokens works on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.seeding import repeatable
from methodbench_vision.models.shapes_cnn import PREPROCESS
from methodbench_vision.models.storage import load_weights, save_weights
from methodbench_vision.models.training import check_accuracy, train
from methodbench_vision.tasks.images import SHAPES_CLASSES, SHAPES_SIZE, normalize, procedural_images
from methodbench_vision.weak.networks import stage

_PATCH = 8


@hyperparameters
class ShapesViT:
    """Trains a transformer of three blocks and width 64 on procedural images of the training split."""

    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over the training images")] = 10
    images: Annotated[int, Field(ge=50, le=100_000, description="training images")] = 2000
    seed: Annotated[int, Field(ge=0, description="of images, initialization and order of images")] = 0
    rail_probability: Annotated[
        float, Field(ge=0, le=1, description="how often class 0 comes with a rail, as a misleading context")
    ] = 0.0
    min_accuracy: Annotated[
        float, Field(ge=0, le=1, description="least held-out accuracy; training that misses it is an error")
    ] = 0.95

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
                weight_decay=0.01,
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


class ConvolutionalPatches(PatchEmbed):
    """Patches of 8 x 8 pixels by three convolutions of stride 2 instead of one Linear."""

    def __init__(self, *, embed_dim: int = 64, **fixed: Any) -> None:
        super().__init__(embed_dim=embed_dim, **fixed)
        self.stem = nn.Sequential(stage(3, 24, stride=2), stage(24, 48, stride=2))
        self.proj = nn.Conv2d(48, embed_dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, 64, 64] to patches [B, 64, D], row by row."""
        tokens: Tensor = self.proj(self.stem(x)).flatten(2).transpose(1, 2)
        return tokens


def build() -> VisionTransformer:
    """Return the network, freshly initialized from torch's global generator; inputs float32 [B, 3, 64, 64]."""
    return VisionTransformer(
        img_size=SHAPES_SIZE,
        patch_size=_PATCH,
        num_classes=len(SHAPES_CLASSES),
        embed_dim=64,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
        embed_layer=ConvolutionalPatches,
    )
