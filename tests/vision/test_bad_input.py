"""What every method but the class activation maps does with pictures, models and labels that it cannot use.

One table of methods against one table of inputs: the outcome is an error of one message, or finite numbers of the
documented shape. Class activation maps have the same table in ``test_cam.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel, Preprocess
from methodbench_vision.craft import CRAFT
from methodbench_vision.disrt import DiSRT
from methodbench_vision.layer_masking import LayerMasking
from methodbench_vision.models.shapes_cnn import ShapesNet
from methodbench_vision.multifaceted_viz import MultifacetedViz, facets
from methodbench_vision.neuron_path import NeuronPath
from methodbench_vision.weak.bas import BAS
from methodbench_vision.weak.cam_seeds import CamSeeds
from methodbench_vision.weak.doei import DOEI
from methodbench_vision.weak.donuseg import DoNuSeg
from methodbench_vision.weak.usage import USAGE

SIDE = 32
CLASSES = 4
PREPROCESS = Preprocess((SIDE, SIDE), (0.5,) * 3, (0.25,) * 3)


class WithIdle(ShapesNet):
    """A network with a layer that no picture reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.ReLU()


def cnn() -> LoadedModel:
    torch.manual_seed(0)
    module = WithIdle().eval()
    return LoadedModel("toy", "cnn", module, detect(module), preprocess=PREPROCESS)


def vit() -> LoadedModel:
    torch.manual_seed(0)
    module = timm.models.VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES
    ).eval()
    return LoadedModel("toy", "vit", module, detect(module), preprocess=PREPROCESS)


@dataclass(frozen=True)
class Reader:
    """A method that looks at a trained model."""

    model: Callable[[], LoadedModel]
    run: Callable[[LoadedModel, Tensor, Tensor], Any]
    any_size: bool = True


def measured(probe: Any) -> Callable[[LoadedModel, Tensor, Tensor], Mapping[str, Any]]:
    return lambda model, x, _: probe.measure(model, Calibration(x, "test"), Context())


READERS = {
    "craft": Reader(cnn, CRAFT(concepts=3, patch_size=16, designs=4).explain),
    "layer-masking": Reader(cnn, LayerMasking(samples=16, cells=4).explain),
    "neuron-path": Reader(vit, measured(NeuronPath(steps=2)), any_size=False),
    "multifaceted-viz": Reader(cnn, measured(MultifacetedViz(effort=0.01, facets=2)), any_size=False),
    "disrt": Reader(cnn, measured(DiSRT(patch=8, candidates=2))),
}
LEARNERS: dict[str, tuple[Any, str]] = {
    "usage": (USAGE(epochs=1, warm_up=0, batch_size=2), "labels"),
    "usage on a transformer": (USAGE(epochs=1, warm_up=0, batch_size=2, network="vit"), "labels"),
    "doei": (DOEI(epochs=1, batch_size=2), "labels"),
    "bas": (BAS(epochs=1, batch_size=2), "labels"),
    "cam-seeds": (CamSeeds(epochs=1, batch_size=2), "labels"),
    "donuseg": (DoNuSeg(epochs=2, warm_up=0.5, batch_size=2), "points"),
}
#: Networks whose patches must divide the picture.
BOUND = ("usage on a transformer", "doei")

DAMAGED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "grayscale": (lambda x: x[:, :1], "1 channels"),
    "alpha": (lambda x: torch.cat([x, x[:, :1]], 1), "4 channels"),
    "bytes": (lambda x: x.to(torch.uint8), "floating point"),
    "no batch": (lambda x: x[0], "floating point"),
    "nan": (lambda x: x.index_fill(3, torch.tensor([2]), torch.nan), "not finite"),
    "infinite": (lambda x: x.index_fill(3, torch.tensor([2]), torch.inf), "not finite"),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def target() -> Tensor:
    return torch.tensor([0, 3, 1, 1])


def labels_for(what: str, count: int) -> Any:
    if what == "points":
        return [torch.tensor([[5.0, 6.0], [20.0, 20.0]])] * count
    return torch.arange(count) % CLASSES


def finite(found: Any, x: Tensor) -> bool:
    """Whether maps, or what a probe measured, are numbers."""
    if isinstance(found, Tensor):
        assert found.shape == (len(x), *x.shape[2:])
        return bool(found.isfinite().all()) and float(found.min()) >= 0 and float(found.max()) <= 1
    return all(np.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_what_is_no_batch_of_pictures(
    name: str, damage: str, x: Tensor, target: Tensor
) -> None:
    reader, (spoil, reason) = READERS[name], DAMAGED[damage]
    with pytest.raises(ParameterError, match=reason):
        reader.run(reader.model(), spoil(x), target)


@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_no_pictures_at_all(name: str, x: Tensor, target: Tensor) -> None:
    with pytest.raises((ParameterError, NotApplicableError)):
        READERS[name].run(READERS[name].model(), x[:0], target[:0])


@pytest.mark.parametrize("name", READERS)
def test_odd_sizes_are_read_or_refused_by_name(name: str, target: Tensor) -> None:
    reader, odd = READERS[name], torch.randn(4, 3, 31, 45, generator=torch.Generator().manual_seed(2))
    if reader.any_size:
        assert finite(reader.run(reader.model(), odd, target), odd)
    else:
        with pytest.raises(ParameterError, match=r"31.*45.*32.*32"):
            reader.run(reader.model(), odd, target)


@pytest.mark.parametrize("name", READERS)
def test_constant_pictures_give_numbers(name: str, x: Tensor, target: Tensor) -> None:
    reader, even = READERS[name], torch.full_like(x, 0.3)
    assert finite(reader.run(reader.model(), even, target), even)


@pytest.mark.parametrize("name", READERS)
def test_a_model_in_training_mode_is_refused(name: str, x: Tensor, target: Tensor) -> None:
    model = READERS[name].model()
    model.module.train()
    with pytest.raises(NotApplicableError, match=r"training mode[^\n]*\n[^\n]*eval\(\)"):
        READERS[name].run(model, x, target)


@pytest.mark.parametrize(
    "method",
    [CRAFT(concepts=3, patch_size=16, designs=4, layer="idle"), DiSRT(patch=8, candidates=2, layer="idle")],
    ids=["craft", "disrt"],
)
def test_a_layer_that_is_never_reached_is_named(method: Any, x: Tensor, target: Tensor) -> None:
    run = method.explain if isinstance(method, CRAFT) else measured(method)
    model = cnn()
    with pytest.raises(NotApplicableError, match="does not run its layer 'idle'"):
        run(model, x, target)
    assert not any(layer._forward_hooks for layer in model.module.modules())


@pytest.mark.parametrize(
    "method",
    [CRAFT(concepts=3, patch_size=16, designs=4, layer="nowhere"), DiSRT(patch=8, layer="nowhere")],
    ids=["craft", "disrt"],
)
def test_a_layer_that_does_not_exist_is_named(method: Any, x: Tensor, target: Tensor) -> None:
    run = method.explain if isinstance(method, CRAFT) else measured(method)
    with pytest.raises(ParameterError, match="no layer 'nowhere'"):
        run(cnn(), x, target)


@pytest.mark.parametrize("name", ["craft", "layer-masking"])
@pytest.mark.parametrize("classes", [[0, 4, 1, 1], [-1, 0, 0, 0], [0, 1]])
def test_targets_out_of_range_are_refused(name: str, classes: list[int], x: Tensor) -> None:
    with pytest.raises(ParameterError, match=r"targets must be 4 classes in 0\.\.3"):
        READERS[name].run(READERS[name].model(), x, torch.tensor(classes))


def test_a_class_that_the_model_does_not_have_is_refused(x: Tensor, target: Tensor) -> None:
    with pytest.raises(NotApplicableError, match="for class 9"):
        measured(MultifacetedViz(effort=0.01, unit=9))(cnn(), x, target)


@pytest.mark.parametrize("name", READERS)
def test_scores_that_ignore_the_picture_explain_nothing(name: str, x: Tensor, target: Tensor) -> None:
    """Zero gradients: maps and attributions are zero, an ascent stays where it began."""
    model = READERS[name].model()
    head = model.adapter.head(model.module)
    assert head is not None
    with torch.no_grad():
        head.weight.zero_()
    found = READERS[name].run(model, x, target)
    assert finite(found, x)
    if isinstance(found, Tensor):
        assert float(found.abs().max()) < 1e-12
    elif name == "neuron-path":
        assert not np.any(found["jas"])
        assert not np.any(found["removed"])
    elif name == "multifaceted-viz":
        assert found["activation"] == pytest.approx(found["start-activation"])


@pytest.mark.parametrize("name", READERS)
def test_a_model_that_returns_nan_is_said_to(name: str, x: Tensor, target: Tensor) -> None:
    model = READERS[name].model()
    with torch.no_grad():
        next(model.module.parameters()).fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"toy.*not finite"):
        READERS[name].run(model, x, target)


def test_images_that_are_all_alike_have_one_facet() -> None:
    assert facets(np.ones((8, 5)), 3, seed=0).tolist() == [0] * 8


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", LEARNERS)
def test_learners_refuse_what_is_no_batch_of_pictures(
    name: str, damage: str, x: Tensor, ctx: Context
) -> None:
    (method, what), (spoil, reason) = LEARNERS[name], DAMAGED[damage]
    spoiled = spoil(x)
    with pytest.raises(ParameterError, match=reason):
        method.fit({"images": spoiled, what: labels_for(what, len(spoiled))}, ctx)


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_take_odd_sizes_and_constant_pictures_or_say_why_not(
    name: str, x: Tensor, ctx: Context
) -> None:
    method, what = LEARNERS[name]
    odd = torch.randn(4, 3, 31, 45, generator=torch.Generator().manual_seed(2))
    weak = {"images": odd, what: labels_for(what, 4)}
    if name in BOUND:
        with pytest.raises(ParameterError, match="31 x 45 pixels do not divide"):
            method.fit(weak, ctx)
    else:
        assert method.fit(weak, ctx)(odd).shape == (4, 31, 45)
    even = torch.full_like(x, 0.3)
    predictor = method.fit({"images": even, what: labels_for(what, 4)}, ctx)
    masks = predictor(even)
    assert masks.shape == (4, SIDE, SIDE)
    assert not masks.is_floating_point()


@pytest.mark.parametrize("name", LEARNERS)
def test_predictors_refuse_what_they_were_not_trained_for(name: str, x: Tensor, ctx: Context) -> None:
    method, what = LEARNERS[name]
    predictor = method.fit({"images": x, what: labels_for(what, 4)}, ctx)
    for damage in ("grayscale", "alpha", "nan"):
        spoil, reason = DAMAGED[damage]
        with pytest.raises(ParameterError, match=reason):
            predictor(spoil(x))
    if name in BOUND:
        with pytest.raises(ParameterError, match="the network takes 32 x 32"):
            predictor(x[..., :24])


@pytest.mark.parametrize("name", [name for name, (_, what) in LEARNERS.items() if what == "labels"])
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.tensor([0, -1, 2, 3]), "negative"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "classes"),
        (torch.zeros(4, 2, 2, dtype=torch.bool), "classes"),
        (torch.tensor([0, 1]), "4 images and labels of 2"),
    ],
    ids=["negative", "float", "too many dimensions", "too few"],
)
def test_labels_that_are_no_classes_are_refused(
    name: str, labels: Tensor, reason: str, x: Tensor, ctx: Context
) -> None:
    with pytest.raises(ParameterError, match=reason):
        LEARNERS[name][0].fit({"images": x, "labels": labels}, ctx)


@pytest.mark.parametrize("name", [name for name, (_, what) in LEARNERS.items() if what == "labels"])
@pytest.mark.parametrize("present", [False, True])
def test_pictures_of_no_class_and_of_all_train_a_predictor(
    name: str, present: bool, x: Tensor, ctx: Context
) -> None:
    labels = torch.full((4, CLASSES), present)
    masks = LEARNERS[name][0].fit({"images": x, "labels": labels}, ctx)(x)
    assert masks.shape == (4, SIDE, SIDE)
    assert 0 <= int(masks.min()) <= int(masks.max()) <= CLASSES


def test_pictures_without_points_are_learned_from_as_long_as_one_has_some(x: Tensor, ctx: Context) -> None:
    method, none = LEARNERS["donuseg"][0], torch.zeros(0, 2)
    some = [torch.tensor([[5.0, 6.0]]), none, none, none]
    assert method.fit({"images": x, "points": some}, ctx)(x).shape == (4, SIDE, SIDE)
    with pytest.raises(ParameterError, match="no picture has a point"):
        method.fit({"images": x, "points": [none] * 4}, ctx)
