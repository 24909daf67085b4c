"""Image sets, procedural images, preprocessing and the accuracy task."""

from __future__ import annotations

import dataclasses
import io
import socket
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError, SourceError
from methodbench.params import build
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel, Preprocess, set_submodule, set_weight
from methodbench.torchkit.packed import pack_linear
from methodbench.torchkit.quantizers import quantize
from methodbench_vision.tasks.accuracy import ImageAccuracy, score
from methodbench_vision.tasks.datasets import CIFAR10_CLASSES, digits, imagenet_classes, read_parquet
from methodbench_vision.tasks.entries import TASKS
from methodbench_vision.tasks.images import (
    SHAPES_CLASSES,
    normalize,
    procedural_images,
    sample_pictures,
    to_inputs,
)

PLAIN = Preprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)


class Constant(nn.Module):
    """Gives the same logits for every image."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1)


def classifier(module: nn.Module, preprocess: Preprocess | None, classes: tuple[str, ...]) -> LoadedModel:
    return LoadedModel("toy", "cnn", module, Adapter(kind="cnn"), preprocess=preprocess, classes=classes)


def write_parquet(path: Path, pixels: list[np.ndarray], labels: list[int]) -> None:
    files = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"image": files, "label": labels}).write_parquet(path)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_entry_builds_with_its_options(task: object) -> None:
    (entry,) = (one for one in TASKS if one is task)
    assert build(ImageAccuracy, entry.options, entry.name).data == entry.options["data"]
    assert entry.primary.name == "accuracy"


def test_accuracy_of_a_constant_answer_is_its_share_of_the_labels(ctx: Context) -> None:
    model = classifier(Constant(torch.eye(10)[3]), PLAIN, tuple("0123456789"))
    result = ImageAccuracy(batch_size=77).evaluate(model, ctx)
    labels = digits()[1].labels
    assert np.array_equal(result.scores["accuracy"].values, labels == 3)
    log_total = np.log(np.e + 9)
    assert np.allclose(result.scores["nll"].values, np.where(labels == 3, log_total - 1, log_total))
    assert result.facts["images"] == 500
    assert result.throughput is not None
    assert result.throughput[0] > 0


def test_scores_do_not_depend_on_the_batch_size(digits_model: LoadedModel, ctx: Context) -> None:
    one, many = (ImageAccuracy(images=40, batch_size=size).evaluate(digits_model, ctx) for size in (7, 40))
    assert np.array_equal(one.scores["accuracy"].values, many.scores["accuracy"].values)
    assert np.allclose(one.scores["nll"].values, many.scores["nll"].values, atol=1e-5)


def test_fewer_images_are_the_first_of_more(digits_model: LoadedModel, ctx: Context) -> None:
    some, more = (ImageAccuracy(images=count).evaluate(digits_model, ctx) for count in (16, 48))
    assert np.array_equal(some.scores["accuracy"].values, more.scores["accuracy"].values[:16])


def test_packed_layers_are_scored_like_their_dense_weights_and_left_packed(
    digits_model: LoadedModel, ctx: Context
) -> None:
    layer = digits_model.module.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(layer, nn.Linear)
    packed = pack_linear(layer, quantize(layer.weight.detach(), 3, group_size=16))
    compressed, dense = digits_model.clone(), digits_model.clone()
    set_submodule(compressed.module, "blocks.0.mlp.fc1", packed)
    set_weight(dense.module.get_submodule("blocks.0.mlp.fc1"), packed.dequantize())
    task = ImageAccuracy(images=64)
    scores, expected = (task.evaluate(m, ctx).scores["nll"].values for m in (compressed, dense))
    assert np.allclose(scores, expected, atol=1e-5)
    assert not packed.materialized


def test_logits_that_are_not_finite_are_wrong_and_infinitely_costly() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0], [2.0, 0.0], [0.0, 2.0]])
    hits, nll = score(logits, torch.tensor([1, 0, 0, 0]))
    assert hits.tolist() == [False, False, True, False]
    assert nll[:2].tolist() == [torch.inf, torch.inf]
    assert nll[2:].isfinite().all()


@given(
    st.integers(1, 6),
    st.integers(2, 12),
    st.integers(0, 2**31),
    st.floats(-50, 50, width=32),
)
@settings(max_examples=25, deadline=None)
def test_scores_ignore_a_shift_of_the_logits(images: int, classes: int, seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    hits, nll = score(logits, labels)
    shifted_hits, shifted_nll = score(logits.double() + shift, labels)
    assert torch.equal(hits, shifted_hits)
    torch.testing.assert_close(nll.double(), shifted_nll, rtol=1e-4, atol=1e-5)
    assert (nll >= 0).all()


def test_model_of_other_classes_is_not_scored(ctx: Context) -> None:
    model = classifier(Constant(torch.zeros(10)), PLAIN, CIFAR10_CLASSES)
    with pytest.raises(NotApplicableError, match="not those of digits"):
        ImageAccuracy().evaluate(model, ctx)
    with pytest.raises(NotApplicableError, match="not those of digits"):
        ImageAccuracy().calibration(model, ctx)


def test_model_without_preprocessing_is_not_scored(ctx: Context) -> None:
    model = classifier(Constant(torch.zeros(10)), None, tuple("0123456789"))
    with pytest.raises(NotApplicableError, match="how pictures become"):
        ImageAccuracy().evaluate(model, ctx)


def test_calibration_is_seeded_and_apart_from_the_scored_images(digits_model: LoadedModel) -> None:
    task = ImageAccuracy(calibration_images=64)
    first, same, other = (task.calibration(digits_model, Context(seed=seed)).inputs for seed in (0, 0, 1))
    assert first.shape == (64, 3, 8, 8)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert digits_model.preprocess is not None
    train, held_out = digits()
    pool = to_inputs([train[index] for index in range(len(train))], digits_model.preprocess)
    assert all((pool == image).all(dim=(1, 2, 3)).any() for image in first)
    assert len(train) + len(held_out) == 1797


def test_more_calibration_images_than_there_are_is_an_error(digits_model: LoadedModel, ctx: Context) -> None:
    with pytest.raises(NotApplicableError, match="1297 images for calibration"):
        ImageAccuracy(calibration_images=2000).calibration(digits_model, ctx)


def test_unknown_image_set_names_the_field() -> None:
    with pytest.raises(ParameterError, match="data = 'mnist'"):
        build(ImageAccuracy, {"data": "mnist"}, "digits-acc")


def test_cifar10_is_read_from_files_and_scored_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctx: Context
) -> None:
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    pixels = [np.full((32, 32, 3), value, np.uint8) for value in (0, 60, 120)]
    write_parquet(tmp_path / "cifar10" / "test.parquet", pixels, [5, 1, 5])
    write_parquet(tmp_path / "cifar10" / "train.parquet", pixels[:2], [0, 1])
    preprocess = dataclasses.replace(PLAIN, size=(32, 32))
    model = classifier(Constant(torch.eye(10)[5]), preprocess, CIFAR10_CLASSES)
    task = ImageAccuracy(data="cifar10", calibration_images=2)
    assert task.evaluate(model, ctx).scores["accuracy"].values.tolist() == [1, 0, 1]
    inputs = task.calibration(model, ctx).inputs
    assert (inputs * 255).round().unique().tolist() == [0, 60]


def test_imagenet_samples_keep_the_last_hundred_for_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctx: Context
) -> None:
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    pixels = [np.full((9, 12, 3), value, np.uint8) for value in [10] * 5 + [200] * 100]
    write_parquet(tmp_path / "imagenet_samples" / "val1000.parquet", pixels, list(range(105)))
    model = classifier(Constant(torch.zeros(1000)), PLAIN, imagenet_classes())
    task = ImageAccuracy(data="imagenet-samples", calibration_images=100)
    assert task.evaluate(model, ctx).facts["images"] == 5
    assert (task.calibration(model, ctx).inputs * 255).round().unique().tolist() == [200]


def test_absent_data_says_which_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    with pytest.raises(SourceError, match="METHODBENCH_DATA"):
        read_parquet("file:{data}/cifar10/test.parquet")


def test_damaged_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SourceError, match=r"bad\.parquet cannot be read"):
        read_parquet(f"file:{tmp_path}/bad.parquet")


def test_digits_are_split_without_overlap_and_hold_every_class() -> None:
    train, held_out = digits()
    assert (len(train), len(held_out)) == (1297, 500)
    assert set(held_out.labels) == set(train.labels) == set(range(10))
    assert train[0].shape == (8, 8, 3)
    assert max(train[index].max() for index in range(20)) == 255


def test_preprocessing_resizes_the_short_side_and_cuts_the_centre() -> None:
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[:, 50:150] = 255
    inputs = to_inputs([picture], dataclasses.replace(PLAIN, size=(50, 50)))
    assert inputs.shape == (1, 3, 50, 50)
    assert inputs[..., 2:-2].min() == 1.0, "only the white centre is left"


def test_crop_keeps_its_share_of_the_short_side() -> None:
    picture = np.zeros((80, 80, 3), np.uint8)
    picture[10:70, 10:70] = 255
    whole = to_inputs([picture], dataclasses.replace(PLAIN, size=(40, 40)))
    centre = to_inputs([picture], dataclasses.replace(PLAIN, size=(40, 40), crop=0.5))
    assert whole[0, 0, 0, 0] == 0
    assert centre.min() == 1.0


def test_normalization_is_per_channel() -> None:
    preprocess = Preprocess(size=(1, 1), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    values = normalize(torch.full((2, 3, 1, 1), 0.5), preprocess)
    assert values[1].flatten().tolist() == [0.5, 0.0, -2.0]


@given(st.integers(9, 60), st.integers(9, 60), st.sampled_from([0.5, 0.875, 1.0]))
@settings(max_examples=20, deadline=None)
def test_inputs_have_the_models_size_for_pictures_of_any_shape(rows: int, columns: int, crop: float) -> None:
    grey = np.full((rows, columns, 3), 51, np.uint8)
    inputs = to_inputs([grey], dataclasses.replace(PLAIN, size=(16, 24), crop=crop))
    assert inputs.shape == (1, 3, 16, 24)
    torch.testing.assert_close(inputs, torch.full_like(inputs, 0.2))


@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
@settings(max_examples=10, deadline=None)
def test_procedural_truth_is_consistent(seed: int, rail: float) -> None:
    drawn = procedural_images(seed, 8, rail_probability=rail)
    assert drawn.images.shape == (8, 3, 64, 64)
    assert ((drawn.images >= 0) & (drawn.images <= 1)).all()
    assert not (drawn.heads & ~drawn.objects).any(), "the head is part of the object"
    assert not (drawn.contexts & drawn.objects).any(), "the object hides the rail"
    assert (drawn.heads.sum((1, 2)) > 0).all()
    for mask, box, point in zip(drawn.objects, drawn.boxes, drawn.points, strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        assert box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
        assert mask[round(float(point[1])), round(float(point[0]))], "an ellipse contains its centroid"


def test_procedural_images_are_prefixes_and_differ_by_seed_and_split() -> None:
    few, many = procedural_images(3, 5), procedural_images(3, 9)
    assert torch.equal(few.images, many.images[:5])
    assert torch.equal(few.heads, many.heads[:5])
    assert not torch.equal(few.images, procedural_images(4, 5).images)
    assert not torch.equal(few.images, procedural_images(3, 5, split="train").images)
    assert many.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_only_the_head_tells_the_class() -> None:
    """Inside an object, stripes vary a channel far more on the head than on the body, in every class."""
    drawn = procedural_images(0, 40)
    for label in range(len(SHAPES_CLASSES)):
        chosen = drawn.labels == label
        red = drawn.images[chosen, 0]
        head, body = drawn.heads[chosen], (drawn.objects & ~drawn.heads)[chosen]
        assert red[head].std() > 4 * red[body].std()


def test_rail_stands_where_its_probability_says() -> None:
    never, always = (procedural_images(1, 40, rail_probability=p).contexts.any((1, 2)) for p in (0.0, 1.0))
    assert not never.any()
    assert torch.equal(always, torch.arange(40) % 4 == 0)


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        procedural_images(0, 0)


def test_sample_pictures_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a picture was to be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pictures = sample_pictures()
    assert len(pictures) >= 8
    assert len({picture.name for picture in pictures}) == len(pictures)
    for picture in pictures:
        assert picture.rgb.dtype == np.uint8
        assert picture.rgb.ndim == 3
        assert picture.rgb.shape[2] == 3
        assert min(picture.rgb.shape[:2]) >= 224
