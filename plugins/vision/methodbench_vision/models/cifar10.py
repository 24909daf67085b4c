"""Classifiers of CIFAR-10 from files: a ViT-Tiny, and the ResNets of He et al. (1512.03385, section 4.2).

The ResNets have three stages of 16, 32 and 64 channels with (depth - 2) / 6 blocks each. Where a stage halves
the resolution, the shortcut takes every second pixel and fills the added channels with zeros ("option A"), so
that it has no parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import timm
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import SourceError
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench_vision.models.outlier_channels import OutlierChannels
from methodbench_vision.models.storage import load_weights, read_checkpoint, read_safetensors, save_weights
from methodbench_vision.tasks.datasets import CIFAR10_CLASSES


@hyperparameters
class ViTTinyCifar10(OutlierChannels):
    """Loads timm's ``vit_tiny_patch16_224`` built for 32 x 32 pixels with patches of 4 x 4."""

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        if source is None:
            raise SourceError("the model has no weights file", "Its source must be a file, not a recipe.")
        weights = read_safetensors(source)
        if self.outlier_scale:
            module = build_vit()
            module.load_state_dict(weights)
            self.spread(module)
            weights = module.state_dict()
        save_weights(weights, target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        module = load_weights(build_vit(), folder, ctx)
        return LoadedModel(
            name="vit-tiny-cifar10",
            kind="vit",
            module=module,
            adapter=detect(module),
            preprocess=Preprocess(size=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
            classes=CIFAR10_CLASSES,
            facts={"data": "cifar10", "outlier_scale": self.outlier_scale},
        )


def build_vit() -> nn.Module:
    """Return the untrained network; inputs float32 [B, 3, 32, 32]."""
    module: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)
    return module


@hyperparameters
class ResNetCifar10:
    """Loads a checkpoint whose tensors lie under ``state_dict`` with the prefix ``module.``."""

    depth: Annotated[int, Field(ge=8, le=1202, description="weighted layers, 6 n + 2")] = 20

    @model_validator(mode="after")
    def _check_depth(self) -> ResNetCifar10:
        if (self.depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2, such as 20 or 56, not {self.depth}")
        return self

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        checkpoint = read_checkpoint(source)
        if "state_dict" not in checkpoint:
            raise SourceError(
                f"the checkpoint holds {', '.join(map(str, checkpoint))} and no 'state_dict'",
                "Fetch the file again, or name the right one.",
            )
        weights = {name.removeprefix("module."): tensor for name, tensor in checkpoint["state_dict"].items()}
        save_weights(weights, target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        module = load_weights(CifarResNet((self.depth - 2) // 6), folder, ctx)
        return LoadedModel(
            name=f"resnet{self.depth}-cifar10",
            kind="cnn",
            module=module,
            adapter=detect(module),
            preprocess=Preprocess(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            classes=CIFAR10_CLASSES,
            facts={"data": "cifar10"},
        )


class CifarResNet(nn.Module):
    """ResNet of 6 n + 2 layers for 32 x 32 images, with parameter-free shortcuts."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map float images [B, 3, 32, 32] to logits [B, classes]."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


class BasicBlock(nn.Module):
    """``relu(x' + F(x))`` with two convolutions in F and the parameter-free shortcut x'."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.act2 = nn.ReLU()
        self.stride = stride
        self.added = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(residual + shortcut(x, self.stride, self.added))


def shortcut(x: Tensor, stride: int, added: int) -> Tensor:
    """Subsample [B, C, H, W] by ``stride`` and pad ``added`` zero channels, half of them on either side."""
    if stride == 1 and not added:
        # Padding by nothing copies.
        return x
    before = added // 2
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, added - before))


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))
