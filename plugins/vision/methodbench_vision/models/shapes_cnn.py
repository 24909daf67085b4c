"""A small convolutional network trained on procedural images with exact masks.

It tells the four classes by the stripes on the head of an ellipse, so that where its evidence lies is known
to the pixel. The last feature map has 16 x 16 cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench.torchkit.seeding import repeatable
from methodbench_vision.models.storage import load_weights, save_weights
from methodbench_vision.models.training import check_accuracy, train
from methodbench_vision.tasks.images import SHAPES_CLASSES, SHAPES_SIZE, normalize, procedural_images

PREPROCESS = Preprocess(size=(SHAPES_SIZE, SHAPES_SIZE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@hyperparameters
class ShapesCNN:
    """Trains four convolutions on procedural images of the training split."""

    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over the training images")] = 4
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
            # Channels last halves the time of these convolutions on a CPU.
            module = ShapesNet().to(memory_format=torch.channels_last)
            train(
                module,
                normalize(drawn.images, PREPROCESS).contiguous(memory_format=torch.channels_last),
                drawn.labels,
                epochs=self.epochs,
                batch_size=50,
                peak_rate=4e-3,
                weight_decay=0.01,
                ctx=ctx,
            )
            check_accuracy(module, normalize(held_out.images, PREPROCESS), held_out.labels, self.min_accuracy)
        save_weights(module.state_dict(), target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        module = load_weights(ShapesNet(), folder, ctx)
        return LoadedModel(
            name="shapes-cnn",
            kind="cnn",
            module=module,
            adapter=detect(module),
            preprocess=PREPROCESS,
            classes=SHAPES_CLASSES,
            facts={"data": "procedural-shapes", "rail_probability": self.rail_probability},
        )


class ShapesNet(nn.Module):
    """Four times convolution, batch norm and ReLU (24 /2, 48, 48 /2, 72 channels), global mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _stage(3, 24, stride=2), _stage(24, 48), _stage(48, 48, stride=2), _stage(48, 72)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(72, len(SHAPES_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Map float images [B, 3, H, W] to logits [B, 4]."""
        return self.fc(self.pool(self.features(x)).flatten(1))


def _stage(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
