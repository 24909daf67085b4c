"""Methods that learn from weak labels: BAS and its base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench_vision.baselines import CentreGaussian, FullImage, OracleMask, RandomMap
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.models.shapes_cnn import PREPROCESS
from methodbench_vision.tasks.images import normalize, procedural_images
from methodbench_vision.tasks.nuclei import NucleiInstances
from methodbench_vision.tasks.scenes import nuclei
from methodbench_vision.tasks.weak import SeedSegmentation, WeakLocalization, learned
from methodbench_vision.weak.bas import BAS, Parts, against_negatives, largest_box, loss, suppress
from methodbench_vision.weak.cam_seeds import CamSeeds
from methodbench_vision.weak.networks import SmallCNN
from methodbench_vision.weak.training import labelled, seed_maps

SEEDS = st.integers(0, 2**16)


def cut(seed: int, bias: float = 0.0, weight: float = 1.0) -> tuple[Parts, Tensor, Tensor]:
    """A small network cut at F, F itself and classes."""
    torch.manual_seed(seed)
    net = SmallCNN(3)
    localize = nn.Conv2d(48, 3, 3, padding=1)
    with torch.no_grad():
        localize.weight.mul_(weight)
        localize.bias.fill_(bias)
        net.classify.bias.fill_(1.0)
    parts = Parts(net.stem, net.tail, net.classify, localize)
    features = parts.stem(torch.randn(4, 3, 32, 32)).detach().requires_grad_()
    return parts, features, torch.randint(3, (4,))


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_a_map_of_zeros_leaves_the_background_all_activation(seed: int) -> None:
    step = suppress(*cut(seed, bias=-1e4, weight=0.0))
    assert torch.equal(step.background, step.activation)
    positive = step.activation.relu()
    torch.testing.assert_close(step.bas, positive / (positive + 1e-8))


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_a_map_of_ones_leaves_the_background_the_answer_to_nothing(seed: int) -> None:
    parts, features, label = cut(seed, bias=1e4, weight=0.0)
    step = suppress(parts, features, label)
    nothing = parts.classify(parts.tail(torch.zeros_like(features))).mean((2, 3))
    torch.testing.assert_close(step.background, nothing.gather(1, label[:, None])[:, 0])
    torch.testing.assert_close(step.area, torch.ones(4))


@given(SEEDS, st.sampled_from([0.0, 1.0]))
@settings(max_examples=5, deadline=None)
def test_the_suppression_lies_in_0_1_and_reaches_neither_the_tail_nor_f_directly(
    seed: int, above: float
) -> None:
    parts, features, label = cut(seed, weight=0.0)
    step = suppress(parts, features, label, above=above)
    assert bool(((step.bas >= 0) & (step.bas <= 1)).all())
    # A map that does not depend on F leaves F no path to the loss.
    assert bool((torch.autograd.grad(step.bas.sum(), features, retain_graph=True)[0] == 0).all())
    held = [p for part in (parts.tail, parts.classify) for p in part.parameters()]
    assert all(g is None for g in torch.autograd.grad(step.bas.sum(), held, allow_unused=True))


def test_the_copies_leave_the_statistics_of_the_network_alone() -> None:
    parts, features, label = cut(0)
    before = parts.tail[1].num_batches_tracked.clone()
    suppress(parts, features, label)
    assert int(parts.tail[1].num_batches_tracked - before) == 1


def test_the_rules_of_the_two_codes_differ_below_zero_alone() -> None:
    parts, features, label = cut(1)
    ours, theirs = (suppress(parts, features, label, rule=rule) for rule in ("extension", "cvpr"))
    positive = (ours.background > 0) & (ours.activation > 0)
    torch.testing.assert_close(ours.bas[positive], theirs.bas[positive])


def test_only_the_weights_of_the_loss_are_hyperparameters() -> None:
    parts, features, label = cut(2)
    step = suppress(parts, features, label)
    classified = torch.tensor(3.0)
    torch.testing.assert_close(
        loss(step, label, classified, 0.0, 2.0), classified + step.bas.mean() + 2 * step.area.mean()
    )


def test_classes_are_told_from_absent_ones_alone() -> None:
    score = torch.tensor([[2.0, 1.0, -1.0]])
    both = against_negatives(score, torch.tensor([[True, True, False]]))
    single = [
        torch.nn.functional.cross_entropy(torch.tensor([[s, -1.0]]), torch.tensor([0])) for s in (2.0, 1.0)
    ]
    torch.testing.assert_close(both, single[0] + single[1])
    assert float(against_negatives(score, torch.tensor([[True, True, True]]))) == 0


def test_the_box_of_an_empty_map_is_the_whole_picture() -> None:
    one = torch.zeros(8, 6).numpy()
    assert largest_box(one, 0.5).tolist() == [0, 0, 6, 8]
    one[2, 1] = one[3, 2] = one[7, 5] = 1.0
    assert largest_box(one, 0.5).tolist() == [1, 2, 3, 4]


def test_labels_are_the_highest_plane_of_those_present() -> None:
    maps = torch.tensor([[[[0.9, 0.2]], [[0.8, 0.6]]]])
    assert labelled(maps, torch.tensor([[True, True]]), 0.5).tolist() == [[[1, 2]]]
    assert labelled(maps, torch.tensor([[False, True]]), 0.7).tolist() == [[[2, 0]]]


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_maps_have_the_size_of_the_picture_and_a_peak_of_one(seed: int) -> None:
    raw = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    maps = seed_maps(raw, (16, 20))
    assert maps.shape == (2, 3, 16, 20)
    assert float(maps.min()) >= 0
    assert float(maps.max()) <= 1
    assert bool((seed_maps(torch.zeros(1, 1, 4, 4), (8, 8)) == 0).all())


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        ({"images": torch.zeros(4, 3, 32, 32)}, NotApplicableError),
        ({"images": torch.zeros(4, 3, 32, 32), "labels": torch.zeros(3).long()}, ParameterError),
        ({"images": torch.zeros(4, 3, 32).long(), "labels": torch.zeros(4).long()}, ParameterError),
        ({"images": torch.full((4, 3, 32, 32), torch.nan), "labels": torch.zeros(4).long()}, ParameterError),
    ],
)
@pytest.mark.parametrize("method", [BAS, CamSeeds])
def test_what_no_mask_can_be_learned_from_is_refused(
    method: type, labels: dict[str, Tensor], error: type[Exception], ctx: Context
) -> None:
    with pytest.raises(error):
        method().fit(labels, ctx)


def test_several_classes_per_picture_train_the_segmenting_variant(ctx: Context) -> None:
    data = procedural_images(0, 8, split="train")
    x = normalize(data.images, PREPROCESS)
    present = torch.nn.functional.one_hot(data.labels).bool()
    seeds = BAS(epochs=1).fit({"images": x, "labels": present}, ctx)
    assert seeds.several
    maps, scores = seeds.maps(x)
    assert maps.shape == (8, 4, 64, 64)
    assert scores.shape == (8, 4)


def test_predictors_without_maps_are_refused() -> None:
    class Masks:
        def fit(self, weak_labels: object, ctx: Context) -> Callable[[Tensor], Tensor]:
            return lambda x: x

    with pytest.raises(NotApplicableError, match="no map"):
        learned(Masks(), {}, Context())


def test_the_task_reports_every_metric_of_its_entry(ctx: Context) -> None:
    from methodbench_vision.tasks.weak_entries import TASKS

    (entry,) = (task for task in TASKS if task.name == "shapes-weak-localization")
    found = WeakLocalization(images=4, train_images=8, validation_images=4).evaluate(
        CamSeeds(epochs=1), None, ctx
    )
    assert set(found.scores) == {metric.name for metric in entry.metrics}
    assert found.scores["top1-loc"].values.mean() <= found.scores["gt-known-loc"].values.mean()


WEAK_TASKS = {
    "boxes": WeakLocalization(images=12, train_images=8, validation_images=8),
    "seeds": SeedSegmentation(images=12, train_images=4),
    "nuclei": NucleiInstances(images=3, train_images=2),
}


def test_the_oracle_is_the_upper_end_of_weak_supervision(ctx: Context) -> None:
    boxes, seeds, instances = (task.evaluate(OracleMask(), None, ctx).scores for task in WEAK_TASKS.values())
    assert boxes["max-box-acc-v2"].values.tolist() == [1.0] * 12
    assert boxes["pxap"].values == pytest.approx(100)
    assert boxes["piou"].values == pytest.approx(1)
    assert seeds["seed-miou"].values == pytest.approx(1)
    assert seeds["image-miou"].values.tolist() == [1.0] * 12
    assert seeds["wrong-class"].values.tolist() == [0.0] * 12
    # A perfect mask does not part nuclei that touch.
    assert instances["dice"].values.tolist() == [1.0] * 3
    assert bool((instances["aji"].values < 1).all())
    # It classifies nothing, and has no threshold of its own.
    assert not {"accuracy", "top1-loc"} & set(boxes)
    assert not {"classification", "seed-area"} & set(seeds)


def test_what_knows_nothing_scores_what_chance_does(ctx: Context) -> None:
    whole, noise, centre = (
        {name: task.evaluate(control, None, ctx) for name, task in WEAK_TASKS.items()}
        for control in (FullImage(), RandomMap(), CentreGaussian())
    )
    share = whole["boxes"].facts["object_share"]
    # The precision of noise, and of the whole picture, is the share of the objects.
    for found in (whole, noise):
        assert found["boxes"].scores["pxap"].values == pytest.approx(100 * share, rel=0.05)
    # One region, which is the whole picture: it overlaps with every nucleus.
    share = (nuclei(0, 3, split="test").instances > 0).double().mean((1, 2)).numpy()
    np.testing.assert_allclose(whole["nuclei"].scores["dice"].values, 2 * share / (1 + share))
    assert whole["nuclei"].scores["pq"].values.tolist() == [0.0] * 3
    # Objects lie near the centre of these pictures.
    for found in (whole, noise):
        assert centre["boxes"].scores["pxap"].values > found["boxes"].scores["pxap"].values
        assert centre["seeds"].scores["seed-miou"].values > found["seeds"].scores["seed-miou"].values


@pytest.mark.parametrize("task", WEAK_TASKS.values(), ids=WEAK_TASKS)
def test_what_explains_a_model_has_none_here(task: Any, ctx: Context) -> None:
    with pytest.raises(NotApplicableError, match="explains a trained model"):
        task.evaluate(GradCAM(), None, ctx)
