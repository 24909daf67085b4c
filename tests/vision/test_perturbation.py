"""ROAD, sparseness, infidelity, randomization, and probes on images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_vision.baselines import CentreGaussian, OracleMask, RandomMap
from methodbench_vision.eigen_cam import EigenCAM
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.models.shapes_cnn import PREPROCESS, ShapesNet
from methodbench_vision.tasks.explainer_entries import TASKS
from methodbench_vision.tasks.images import SHAPES_CLASSES
from methodbench_vision.tasks.localization import TRAINING_DATA
from methodbench_vision.tasks.perturbation import (
    Faithfulness,
    Randomization,
    Robustness,
    attack,
    cascade,
    gini,
    imputed,
    infidelity,
    rank_correlation,
    road,
    soft_iou,
)
from methodbench_vision.tasks.probing import ImageProbing
from methodbench_vision.tasks.scenes import scenes
from methodbench_vision.tasks.several import SeveralClasses


@pytest.fixture
def model() -> LoadedModel:
    torch.manual_seed(0)
    net = ShapesNet().eval()
    return LoadedModel(
        "toy", "cnn", net, detect(net), None, PREPROCESS, SHAPES_CLASSES, facts={"data": TRAINING_DATA}
    )


def test_imputed_pixels_are_the_weighted_mean_of_their_neighbours() -> None:
    random = np.random.default_rng(0)
    image, missing = random.random((3, 12, 10)), random.random((12, 10)) < 0.5
    filled = imputed(image, missing)
    assert np.array_equal(filled[:, ~missing], image[:, ~missing])
    padded = np.pad(filled, ((0, 0), (1, 1), (1, 1)))
    inside = np.pad(np.ones((12, 10)), 1)
    total, weight = np.zeros((3, 12, 10)), np.zeros((12, 10))
    for down in (0, 1, 2):
        for right in (0, 1, 2):
            if (down, right) != (1, 1):
                w = 1 / 6 if 1 in (down, right) else 1 / 12
                total += w * padded[:, down : down + 12, right : right + 10]
                weight += w * inside[down : down + 12, right : right + 10]
    np.testing.assert_allclose((total / weight)[:, missing], filled[:, missing], atol=1e-9)
    np.testing.assert_allclose(imputed(np.full((1, 8, 8), 0.3), np.eye(8) > 0), 0.3)
    assert np.array_equal(imputed(image, np.ones((12, 10), dtype=bool)), image)


def left_half(x: Tensor) -> Tensor:
    return x[:, 0, :, : x.shape[3] // 2].double().mean((1, 2))


def test_road_prefers_the_map_that_the_score_follows() -> None:
    x = torch.zeros(1, 3, 16, 16)
    x[:, :, 4:12, 2:6] = 1
    right = x[:, 0]
    scores = [
        float(road(left_half, x, maps, (20, 50, 80), 0.0, np.random.default_rng(0)))
        for maps in (right, torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)), 1 - right)
    ]
    assert scores[0] > scores[1] > scores[2]


def test_sparseness_is_zero_for_constants_and_nearly_one_for_a_single_pixel() -> None:
    point = torch.zeros(10, 10)
    point[3, 4] = 1
    values = gini(torch.stack([torch.ones(10, 10), point, torch.linspace(0, 1, 100).view(10, 10)]))
    torch.testing.assert_close(
        values, torch.tensor([0, 0.99, 0.333], dtype=torch.float64), rtol=0, atol=0.005
    )


def test_infidelity_is_zero_for_the_map_of_an_additive_score_whatever_its_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 16, 16, generator=generator)
    kept = (torch.rand(50, 1, 4, 4, generator=generator) < 0.5).float()
    exact = torch.zeros(2, 16, 16)
    exact[:, :, :8] = x[:, 0, :, :8]
    for scale in (1.0, 0.1):
        assert float(infidelity(left_half, x, scale * exact, kept).max()) < 1e-12
    assert float(infidelity(left_half, x, exact.flip(2), kept).min()) > 1e-4
    assert bool(infidelity(left_half, x, torch.zeros(2, 16, 16), kept).isfinite().all())


def test_the_cascade_changes_one_layer_more_each_time_and_never_the_model(model: LoadedModel) -> None:
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    copies = cascade(model, seed=1)
    assert len(copies) == 9
    changed = [
        {
            name.rpartition(".")[0]
            for name, value in copy.module.named_parameters()
            if name.endswith("weight") and value.ndim > 1 and not torch.equal(value, before[name])
        }
        for copy in copies
    ]
    assert changed[0] == {"fc"}
    assert all(a <= b for a, b in itertools.pairwise(changed))
    assert len(changed[-1]) == 5
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_rank_correlation_follows_spearman() -> None:
    a = torch.rand(1, 5, 5)
    assert rank_correlation(a, a**3)[0] == pytest.approx(1)
    assert rank_correlation(a, -a)[0] == pytest.approx(-1)
    assert rank_correlation(a, torch.ones(1, 5, 5))[0] == 0


def test_a_map_that_ignores_the_head_stays_when_the_logits_are_drawn_anew(model: LoadedModel) -> None:
    task = Randomization(images=6)
    eigen, grad, noise = (
        task.evaluate(method, model, Context()).scores
        for method in (EigenCAM(sign="corr"), GradCAM(), RandomMap())
    )
    assert eigen["map-similarity-head"].values.mean() == pytest.approx(1)
    assert grad["map-similarity-head"].values.mean() < 0.9
    assert noise["map-similarity"].values.mean() == pytest.approx(1)
    with pytest.raises(NotApplicableError, match="oracle"):
        task.evaluate(OracleMask(), model, Context())


def test_an_attack_raises_the_loss_and_keeps_to_its_length(model: LoadedModel) -> None:
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESS.mean, PREPROCESS.std))
    x = (pixels - mean) / std
    moved = attack(model, x, labels, 2 / 255)
    change = (moved * std + mean - pixels).abs()
    assert float(change.max()) == pytest.approx(2 / 255, rel=1e-3)
    assert float((change > 1e-4).double().mean()) > 0.9
    shown = moved * std + mean
    assert -1e-5 <= float(shown.min()) <= float(shown.max()) <= 1 + 1e-5
    before, after = (
        torch.nn.functional.cross_entropy(model.module(images), labels, reduction="none")
        for images in (x, moved)
    )
    assert bool((after > before).all())
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_overlap_of_maps_is_that_of_sets_where_they_are_sets() -> None:
    a, b = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    a[0, :2], b[0, 1:3] = 1, 1
    assert soft_iou(a, b).tolist() == [pytest.approx(1 / 3), 1.0]
    assert soft_iou(0.5 * a, a)[0] == pytest.approx(0.5)


def test_maps_that_look_at_nothing_stay_under_attack(model: LoadedModel) -> None:
    task = Robustness(images=6, batch_size=4)
    centre, grad = (task.evaluate(method, model, Context()) for method in (CentreGaussian(), GradCAM()))
    assert centre.scores["map-iou"].values == pytest.approx(1)
    assert centre.scores["map-correlation"].values == pytest.approx(1)
    assert float(grad.scores["map-iou"].values.mean()) < 1
    assert centre.facts["answers_changed"] == grad.facts["answers_changed"]
    with pytest.raises(NotApplicableError, match="oracle"):
        task.evaluate(OracleMask(), model, Context())


def test_classes_of_one_picture_are_explained_one_by_one(model: LoadedModel) -> None:
    task = SeveralClasses(images=8, batch_size=3)
    oracle, blind, grad = (
        task.evaluate(method, model, Context()) for method in (OracleMask(), EigenCAM(sign="corr"), GradCAM())
    )
    (entry,) = (task for task in TASKS if task.name == "shapes-several")
    assert set(oracle.scores) == {metric.name for metric in entry.metrics}
    assert oracle.scores["seed-miou"].values == pytest.approx(1)
    assert oracle.scores["wrong-class"].values.tolist() == [0.0] * 8
    data = scenes(0, 8)
    assert oracle.facts["maps"] == int(data.labels.sum()) > 8
    # The same map for every class: all that is found goes to the first of them.
    maps, _ = task.maps(EigenCAM(sign="corr"), model, data, Context())
    several = data.labels.sum(1) > 1
    for picture in several.nonzero()[:, 0].tolist():
        shown = maps[picture, data.labels[picture]]
        torch.testing.assert_close(shown, shown[:1].expand_as(shown), atol=1e-5, rtol=0)
    assert bool((maps[~data.labels] == 0).all())
    assert float(blind.scores["wrong-class"].values.mean()) > 0
    assert grad.throughput is not None


def test_the_tasks_report_every_metric(model: LoadedModel) -> None:
    entries = {task.name: task for task in TASKS}
    evaluations = {
        "shapes-faithfulness": Faithfulness(images=4, samples=8, percentiles=(50.0,)).evaluate(
            RandomMap(), model, Context()
        ),
        "shapes-randomization": Randomization(images=4).evaluate(GradCAM(), model, Context()),
        "shapes-robustness": Robustness(images=4).evaluate(GradCAM(), model, Context()),
    }
    for name, evaluation in evaluations.items():
        assert set(evaluation.scores) == {metric.name for metric in entries[name].metrics}
        assert all(len(scores.values) == 4 for scores in evaluation.scores.values())


class Shape:
    """A probe that measures every kind of thing."""

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        images = len(data)
        return {
            "brightness": data.inputs.mean((1, 2, 3)).numpy(),
            "count": float(images),
            "curve": np.arange(3.0),
            "table": np.arange(2.0 * images).reshape(images, 2),
        }


def test_a_probes_numbers_become_metrics_per_image_curves_and_rows(model: LoadedModel) -> None:
    evaluation = ImageProbing(images=5).evaluate(Shape(), model, Context())
    assert set(evaluation.scores) == {"score", "brightness", "count"}
    assert len(evaluation.scores["brightness"].values) == 5
    assert evaluation.scores["count"].values.tolist() == [5.0]
    assert np.array_equal(evaluation.scores["score"].values, evaluation.scores["brightness"].values)
    assert evaluation.series["curve"].tolist() == [0, 1, 2]
    assert evaluation.series["table"].tolist() == [0, 1]
    with pytest.raises(NotApplicableError, match="other classes"):
        ImageProbing(data="digits", images=5).evaluate(Shape(), model, Context())
