"""Random vision models whose norms have channels of different sizes, and the trained ViT of digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_vision.models.digits_vit import DigitsViT
from methodbench_vision.tasks.accuracy import ImageAccuracy

Vit = Callable[..., LoadedModel]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loaded(module: nn.Module, name: str) -> LoadedModel:
    module.eval().requires_grad_(False)
    adapter = detect(module)
    return LoadedModel(name, adapter.kind, module, adapter)


@pytest.fixture
def vit() -> Vit:
    """Builds a random ViT of two blocks; outlier channels behind its norms."""

    def build(**options: object) -> LoadedModel:
        torch.manual_seed(0)
        sizes: dict[str, object] = {
            "img_size": 8,
            "patch_size": 4,
            "embed_dim": 24,
            "num_heads": 3,
            "depth": 2,
            "mlp_ratio": 2,
            "num_classes": 5,
        }
        model = loaded(VisionTransformer(**(sizes | options)), "tiny")  # type: ignore[arg-type]
        for name, parameter in model.module.named_parameters():
            if "norm" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
                parameter[::7] *= 8
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return build


class TinyCNN(nn.Module):
    """Two stages of one residual block, with batch norms whose statistics are not trivial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8))
        self.layer2 = nn.Sequential(Residual(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


@pytest.fixture
def cnn() -> LoadedModel:
    torch.manual_seed(1)
    module = TinyCNN()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
            norm.running_mean = torch.randn(norm.num_features)
            norm.running_var = torch.rand(norm.num_features) + 0.5
    return loaded(module, "tiny-cnn")


@pytest.fixture
def images() -> Calibration:
    return Calibration(normal(16, 3, 8, 8, seed=3), "random images")


class Digits:
    """The trained ViT of digits with planted outliers, its task, and calibration images."""

    def __init__(self, folder: Path) -> None:
        loader, ctx = DigitsViT(outlier_scale=1.0), Context()
        loader.prepare(None, folder, ctx)
        self.model = loader.load(folder, ctx)
        self.task = ImageAccuracy(data="digits")

    def images(self, count: int = 32) -> Calibration:
        return ImageAccuracy(data="digits", calibration_images=count).calibration(self.model, Context())

    def accuracy(self, model: LoadedModel) -> float:
        return float(self.task.evaluate(model, Context()).scores["accuracy"].values.mean())

    def after(self, method: object, count: int = 32) -> float:
        """Accuracy behind a method; 0 where it diverges."""
        try:
            return self.accuracy(method.compress(self.model, self.images(count), Context()))  # type: ignore[attr-defined]
        except DivergedError:
            return 0.0


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits"))
