"""EfficientNet-Lite0 with ImageNet weights.

Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019 (1905.11946).
The Lite variants drop squeeze-and-excitation and replace swish by ReLU6. The checkpoint is TensorFlow's,
under the names of a PyTorch port; here its tensors get timm's names. Like all of TensorFlow's, it needs
asymmetric "same" padding, batch norms with an epsilon of 1e-3 and inputs scaled to (255 x - 127) / 128.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import timm
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import SourceError
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench_vision.models.storage import load_weights, read_checkpoint, save_weights
from methodbench_vision.tasks.datasets import imagenet_classes

#: Inverted residual blocks per stage.
_STAGES = (1, 2, 2, 3, 3, 4, 1)

_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_IN_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_IN_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


@hyperparameters
class EfficientNetLite0:
    """Loads the checkpoint ``efficientnet-lite0-57934424.pth``."""

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        save_weights(timm_names(read_checkpoint(source)), target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        module = load_weights(timm.create_model("tf_efficientnet_lite0"), folder, ctx)
        return LoadedModel(
            name="efficientnet-lite0",
            kind="cnn",
            module=module,
            adapter=detect(module),
            preprocess=Preprocess(size=(224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3, crop=0.875),
            classes=imagenet_classes(),
            facts={"data": "imagenet"},
        )


def timm_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint under the names of timm's ``tf_efficientnet_lite0``.

    Raises:
        SourceError: a name that this architecture does not have.
    """
    places = [(stage, block) for stage, blocks in enumerate(_STAGES) for block in range(blocks)]
    renamed = {}
    for name, tensor in weights.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        try:
            if block:
                stage, index = places[int(block[1])]
                layer = (_IN_FIRST_STAGE if stage == 0 else _IN_BLOCK)[block[2]]
                renamed[f"blocks.{stage}.{index}.{layer}.{block[3]}"] = tensor
            else:
                layer, _, leaf = name.partition(".")
                renamed[f"{_OUTSIDE[layer]}.{leaf}"] = tensor
        except (KeyError, IndexError):
            raise SourceError(
                f"the checkpoint holds {name!r}, which EfficientNet-Lite0 does not have",
                "The file is of another network; fetch the source again.",
            ) from None
    return renamed
