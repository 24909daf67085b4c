"""Explainers on labelled pictures: stand-ins written here, and the real sets where they are present."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, SourceError
from methodbench.params import build
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench_vision.baselines import OracleMask, RandomMap
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.models.cifar10 import CifarResNet, ResNetCifar10, ViTTinyCifar10
from methodbench_vision.models.efficientnet import EfficientNetLite0
from methodbench_vision.tasks.datasets import CIFAR10_CLASSES, imagenet_classes
from methodbench_vision.tasks.explainer_entries import TASKS
from methodbench_vision.tasks.pictures import PictureFaithfulness

ENTRIES = {task.name: task for task in TASKS if task.impl.endswith(":PictureFaithfulness")}


class LeftHalf(nn.Module):
    """Confident in class 1 as far as the left half of the picture is bright."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.bias.expand(len(x), -1).clone()
        logits[:, 1] += 6 * x[:, :, :, : x.shape[3] // 2].mean((1, 2, 3))
        return logits


@dataclass
class Half:
    """An explainer that points at one half, whatever the model does."""

    left: bool

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        maps = torch.zeros(len(x), *x.shape[2:])
        half = x.shape[3] // 2
        maps[:, :, slice(None, half) if self.left else slice(half, None)] = 1
        return maps


def model_of(module: nn.Module, classes: tuple[str, ...], side: int = 8) -> LoadedModel:
    plain = Preprocess(size=(side, side), mean=(0.0,) * 3, std=(1.0,) * 3)
    return LoadedModel("toy", "cnn", module.eval(), Adapter(kind="cnn"), preprocess=plain, classes=classes)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve bright pictures of 8 x 8 pixels as CIFAR-10's test set and as the sample of ImageNet."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(12):
        buffer = io.BytesIO()
        pixels = random.integers(100, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        files.append(buffer.getvalue())
    frame = pl.DataFrame({"image": files, "label": [1, 0] * 6})
    for name in ("cifar10/test.parquet", "imagenet_samples/val1000.parquet"):
        path = tmp_path / name
        path.parent.mkdir()
        frame.write_parquet(path)
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ENTRIES)
def test_every_metric_of_the_entry_is_scored_on_every_picture(name: str, data: Path, ctx: Context) -> None:
    entry = ENTRIES[name]
    classes = CIFAR10_CLASSES if entry.options["data"] == "cifar10" else imagenet_classes()
    task = build(PictureFaithfulness, {**entry.options, "steps": 4}, entry.name)
    found = task.evaluate(Half(left=True), model_of(LeftHalf(len(classes)), classes), ctx)
    assert set(found.scores) == {metric.name for metric in entry.metrics}
    for scores in found.scores.values():
        assert scores.values.shape == (12,)
        assert np.isfinite(scores.values).all()
    assert found.facts["accuracy"] == 0.5
    assert found.series["insertion"].shape == (5,)
    assert [one.name for one in found.pictures] == [f"{n}: {classes[k]}" for n, k in ((1, 1), (2, 0), (3, 1))]


def test_the_half_that_the_model_looks_at_wins_on_every_metric(data: Path, ctx: Context) -> None:
    model = model_of(LeftHalf(10), CIFAR10_CLASSES)
    task = PictureFaithfulness(noise=0.0)
    right, wrong = (task.evaluate(Half(left=left), model, ctx).scores for left in (True, False))
    for name, sign in (("insertion-auc", 1), ("deletion-auc", -1), ("average-drop", -1)):
        assert (sign * (right[name].values - wrong[name].values) > 0).all(), name
    assert right["average-drop"].values.max() < 1e-12
    assert (right["sparseness"].values == wrong["sparseness"].values).all()


def test_the_answers_do_not_depend_on_the_batch_and_pictures_are_spread(data: Path, ctx: Context) -> None:
    torch.manual_seed(0)
    model = model_of(CifarResNet(1), CIFAR10_CLASSES)
    whole = PictureFaithfulness(noise=0.0, road_images=3).evaluate(GradCAM(), model, ctx)
    parts = PictureFaithfulness(noise=0.0, road_images=3, batch_size=5).evaluate(GradCAM(), model, ctx)
    for name, scores in whole.scores.items():
        np.testing.assert_allclose(scores.values, parts.scores[name].values, atol=1e-5, err_msg=name)
    assert np.flatnonzero(~np.isnan(whole.scores["road"].values)).tolist() == [0, 4, 8]
    fewer = PictureFaithfulness(images=4, noise=0.0).evaluate(GradCAM(), model, ctx)
    inserted = whole.scores["insertion-auc"].values[[0, 3, 6, 9]]
    np.testing.assert_allclose(fewer.scores["insertion-auc"].values, inserted, atol=1e-5)


def test_other_classes_oracles_and_absent_data_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctx: Context
) -> None:
    model = model_of(LeftHalf(10), CIFAR10_CLASSES)
    with pytest.raises(NotApplicableError, match="does not tell the classes of imagenet-samples apart"):
        PictureFaithfulness(data="imagenet-samples").evaluate(RandomMap(), model, ctx)
    with pytest.raises(NotApplicableError, match="no model"):
        PictureFaithfulness().evaluate(RandomMap(), None, ctx)
    with pytest.raises(NotApplicableError, match="nothing says where"):
        PictureFaithfulness().evaluate(OracleMask(), model, ctx)
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="METHODBENCH_DATA"):
        PictureFaithfulness().evaluate(RandomMap(), model, ctx)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("real_file", "loader", "task"),
    [
        ("resnet20-cifar10", ResNetCifar10(depth=20), PictureFaithfulness(images=40, road_images=8)),
        ("resnet56-cifar10", ResNetCifar10(depth=56), PictureFaithfulness(images=40, road_images=8)),
        ("vit-tiny-cifar10", ViTTinyCifar10(), PictureFaithfulness(images=40, road_images=8)),
        (
            "efficientnet-lite0",
            EfficientNetLite0(),
            PictureFaithfulness(data="imagenet-samples", images=24, road_images=2),
        ),
    ],
    indirect=["real_file"],
    ids=["resnet20", "resnet56", "vit-tiny", "efficientnet-lite0"],
)
def test_grad_cam_is_more_faithful_than_noise_on_real_pictures(
    real_file: Path,
    loader: ResNetCifar10 | ViTTinyCifar10 | EfficientNetLite0,
    task: PictureFaithfulness,
    tmp_path: Path,
    ctx: Context,
) -> None:
    loader.prepare(real_file, tmp_path, ctx)
    model = loader.load(tmp_path, ctx)
    try:
        ours, noise = (task.evaluate(method, model, ctx) for method in (GradCAM(), RandomMap()))
    except SourceError as error:
        pytest.skip(error.message)
    assert ours.facts["accuracy"] > 0.7
    difference = ours.scores["insertion-auc"].values - noise.scores["insertion-auc"].values
    assert difference.mean() > 2 * difference.std() / len(difference) ** 0.5
