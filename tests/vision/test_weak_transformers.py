"""USAGE, DOEI and DoNuSeg: what their cards promise whatever the constants are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench_vision.models.shapes_cnn import PREPROCESS
from methodbench_vision.tasks.images import normalize
from methodbench_vision.tasks.nuclei import NucleiInstances
from methodbench_vision.tasks.scenes import nuclei, scenes
from methodbench_vision.tasks.weak_entries import TASKS
from methodbench_vision.weak.cam_seeds import CamSeeds
from methodbench_vision.weak.doei import DOEI, class_wise, confidence, patch_wise
from methodbench_vision.weak.donuseg import UNKNOWN, DoNuSeg, agreement, initial_label, select, sure
from methodbench_vision.weak.networks import ClassTokenViT
from methodbench_vision.weak.usage import USAGE, disagreement, pooled

SEEDS = st.integers(0, 2**16)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    SEEDS,
    st.lists(st.sampled_from([0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 1e3]), min_size=2, max_size=4, unique=True),
)
@settings(max_examples=20, deadline=None)
def test_pooling_lies_between_mean_and_maximum_and_falls_with_tau(seed: int, taus: list[float]) -> None:
    maps = drawn(seed, 2, 3, 5, 5)
    found = [pooled(maps, tau) for tau in sorted(taus)]
    for sharper, wider in itertools.pairwise(found):
        assert bool((sharper >= wider - 1e-5).all())
    for one in found:
        assert bool((one <= maps.amax((2, 3)) + 1e-5).all())
        assert bool((one >= maps.mean((2, 3)) - 1e-5).all())


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_pooling_at_a_large_tau_is_the_mean(seed: int) -> None:
    maps = drawn(seed, 2, 3, 5, 5)
    torch.testing.assert_close(pooled(maps, 1e6), maps.mean((2, 3)), rtol=0, atol=1e-5)


def test_two_equal_views_do_not_disagree() -> None:
    maps = drawn(0, 2, 3, 4, 4)
    present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert float(disagreement(maps, maps, present)) == 0
    assert float(disagreement(maps, maps.flip(3), present)) > 0


def few(split: str = "train", n: int = 12) -> dict[str, torch.Tensor]:
    data = scenes(0, n, split=split, together=0.8)
    return {"images": normalize(data.images, PREPROCESS), "labels": data.labels}


def test_usage_without_its_parts_is_the_plain_classifier(ctx: Context) -> None:
    weak = few()
    ours = USAGE(temperature=1e6, consistency=0.0, epochs=2, batch_size=6).fit(weak, ctx)
    plain = CamSeeds(epochs=2, batch_size=6).fit(weak, ctx)
    x = few("test", 2)["images"]
    torch.testing.assert_close(ours.maps(x)[0], plain.maps(x)[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("network", ["cnn", "vit"])
def test_usage_trains_both_networks(network: str, ctx: Context) -> None:
    weak = few()
    seeds = USAGE(network=network, epochs=2, warm_up=0.5, batch_size=6).fit(weak, ctx)
    maps, scores = seeds.maps(weak["images"])
    assert maps.shape == (12, 4, 64, 64)
    assert bool(maps.isfinite().all())
    assert scores.shape == (12, 4)


@given(SEEDS, st.floats(0, 0.9))
@settings(max_examples=20, deadline=None)
def test_changed_rows_of_attention_sum_to_one_and_others_stay(seed: int, gain: float) -> None:
    attention = drawn(seed, 2, 2, 7, 7).softmax(-1)
    c = confidence(
        attention.mean(1)[:, :3, 3:], drawn(seed + 1, 2, 4, 4).softmax(-1), torch.ones(2, 3).bool()
    )
    changed = class_wise(attention, c, gain, 0.7, 0.3)
    torch.testing.assert_close(changed.sum(-1), torch.ones(2, 2, 7))
    assert torch.equal(changed[:, :, 3:], attention[:, :, 3:])
    factors = patch_wise(c, gain, 0.7, 0.3)
    assert bool((factors[:, :3] == 1).all())
    assert float(factors.max()) <= 1 + gain + 1e-6


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_confidence_moves_with_the_patches(seed: int) -> None:
    looked, rgb, x = drawn(seed, 2, 3, 6).softmax(-1), drawn(seed + 1, 2, 6, 3), drawn(seed + 2, 2, 6, 8)
    attention = drawn(seed + 3, 2, 6, 6).softmax(-1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    present = torch.tensor([[True, True, False], [True, False, True]])
    method = DOEI()
    plain = confidence(looked, method.affinity(rgb, x, attention), present)
    moved = confidence(
        looked[:, :, order],
        method.affinity(rgb[:, order], x[:, order], attention[:, order][:, :, order]),
        present,
    )
    torch.testing.assert_close(moved, plain[:, :, order])


def test_the_rows_of_the_affinity_sum_to_one() -> None:
    w = DOEI().affinity(drawn(0, 2, 6, 3), drawn(1, 2, 6, 8), drawn(2, 2, 6, 6).softmax(-1))
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 6))


def test_no_gain_is_the_host_bit_for_bit_and_a_gain_adds_no_parameter(ctx: Context) -> None:
    torch.manual_seed(0)
    net = ClassTokenViT(4, (64, 64)).eval()
    x = few("test", 3)["images"]
    present = torch.ones(3, 4).bool()
    host = net(x)
    assert DOEI(gain=0.0).adjustment(net, x, present) is None
    changed = net(x, DOEI(gain=0.2).adjustment(net, x, present))
    assert not torch.equal(changed.maps, host.maps)
    nothing = net(x, lambda number, attention, tokens: (attention, None))
    assert torch.equal(nothing.maps, host.maps)


def test_doei_trains_and_hands_back_seeds(ctx: Context) -> None:
    weak = few()
    maps, _ = DOEI(epochs=1).fit(weak, ctx).maps(weak["images"])
    assert maps.shape == (12, 4, 64, 64)
    assert float(maps.max()) <= 1


def test_points_and_borders_between_them_are_never_overruled() -> None:
    points = torch.tensor([[4.0, 4.0], [12.0, 4.0]])
    certain = sure((10, 16), points, 1)
    assert int(certain[4, 4]) == int(certain[4, 12]) == 1
    assert 0 in certain[4, 7:9]
    everything, nothing = torch.ones(10, 16, dtype=torch.bool), torch.zeros(10, 16, dtype=torch.bool)
    for masks in (torch.stack([everything, nothing]), torch.stack([nothing, nothing])):
        label, _ = select(masks, certain, certain)
        assert torch.equal(label[certain != UNKNOWN], certain[certain != UNKNOWN])


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_agreement_lies_in_0_1_and_the_first_label_agrees_with_itself(seed: int) -> None:
    first = torch.randint(0, 2, (8, 8), generator=torch.Generator().manual_seed(seed))
    first[0] = UNKNOWN
    alpha = agreement(torch.stack([first == 1, first == 0, torch.ones(8, 8).bool()]), first)
    assert float(alpha[0]) == 1
    assert bool(((alpha >= 0) & (alpha <= 1)).all())


def test_first_labels_of_a_picture_without_points_know_nothing() -> None:
    label = initial_label(torch.zeros(3, 8, 8), torch.zeros(0, 2), 2, 20.0, 0)
    assert bool((label == UNKNOWN).all())


def test_donuseg_trains_on_labels_that_it_chose_and_reports_them(ctx: Context) -> None:
    found = NucleiInstances(images=2, train_images=4).evaluate(DoNuSeg(epochs=3), None, ctx)
    (entry,) = (task for task in TASKS if task.name == "nuclei")
    assert set(found.scores) == {metric.name for metric in entry.metrics}
    assert sum(found.facts["chosen_blocks"].values()) == 4
    assert "-1" not in found.facts["chosen_blocks"]


def test_one_block_alone_can_be_asked(ctx: Context) -> None:
    data = nuclei(0, 2, split="train")
    weak = {"images": normalize(data.images, PREPROCESS), "points": list(data.points)}
    assert DoNuSeg(epochs=2, block=2).fit(weak, ctx).chosen == (2, 2)
    assert DoNuSeg(epochs=1, dynamic=False).fit(weak, ctx).chosen == (-1, -1)


def test_labels_of_another_kind_are_refused(ctx: Context) -> None:
    with pytest.raises(NotApplicableError, match="points"):
        DoNuSeg().fit(few(), ctx)
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ParameterError, match="outside"):
        DoNuSeg().fit({"images": images, "points": [torch.tensor([[9.0, 1.0]])]}, ctx)
    for method in (USAGE(), DOEI()):
        with pytest.raises(NotApplicableError, match="labels"):
            method.fit({"images": images, "points": [torch.zeros(1, 2)]}, ctx)
