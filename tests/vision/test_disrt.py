"""DiSRT: the harness with readers whose answers are known, and Top-K."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_vision.disrt import DiSRT, oddness, quilt, seamed, top_k, triplets
from methodbench_vision.models.shapes_cnn import PREPROCESS, ShapesNet
from methodbench_vision.tasks.images import normalize, procedural_images

SEEDS = st.integers(0, 2**16)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy() -> LoadedModel:
    torch.manual_seed(0)
    net = ShapesNet().eval()
    return LoadedModel("toy", "cnn", net, detect(net), preprocess=PREPROCESS)


@given(SEEDS, st.floats(0.01, 1.0), st.sampled_from(["spatial", "channel"]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_top_k_keeps_exactly_k_again_and_at_any_scale(
    seed: int, share: float, axis: str, tokens: bool
) -> None:
    x = drawn(seed, 2, 12, 5) if tokens else drawn(seed, 2, 5, 3, 4)
    kept = top_k(x, share, axis)
    assert torch.equal(top_k(kept, share, axis), kept)
    assert torch.equal(top_k(4 * x, share, axis), 4 * kept)
    flat = kept.transpose(1, 2) if tokens else kept.flatten(2)
    dim = 2 if axis == "spatial" else 1
    counts = (flat != 0).sum(dim)
    size = flat.shape[dim]
    assert bool((counts == -int(-share * size // 1)).all())


def test_top_k_of_everything_is_the_identity_and_ties_keep_no_more() -> None:
    x = drawn(0, 2, 3, 4, 4)
    assert top_k(x, 1.0, "spatial") is x
    assert int((top_k(torch.ones(1, 1, 2, 5), 0.25, "spatial") != 0).sum()) == 3


@given(SEEDS, st.permutations([0, 1, 2]), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_the_answer_moves_with_the_pictures_and_not_with_the_scale(
    seed: int, order: list[int], scale: float
) -> None:
    features = drawn(seed, 4, 3, 6)
    torch.testing.assert_close(oddness(scale * features[:, order]), oddness(features)[:, order])


def test_two_alike_make_the_third_the_odd_one() -> None:
    features = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.1]]])
    assert int(oddness(features).argmax()) == 0


def test_quilts_are_made_of_the_picture_and_differ_from_each_other() -> None:
    x = normalize(procedural_images(0, 2).images, PREPROCESS)
    triples = triplets(x, 12, 3, 10, 0)
    assert triples.shape == (2, 3, 3, 64, 64)
    assert torch.equal(triples, triplets(x, 12, 3, 10, 0))
    assert not torch.equal(triples[:, 1], triples[:, 2])
    for made in triples.unbind(1):
        assert bool((made.amin((2, 3)) >= x.amin((2, 3)) - 1e-5).all())
        assert bool((made.amax((2, 3)) <= x.amax((2, 3)) + 1e-5).all())


def test_a_constant_picture_is_its_own_quilt() -> None:
    import numpy as np

    flat = np.full((3, 20, 20), 0.5)
    random = np.random.default_rng(0)
    np.testing.assert_allclose(quilt(flat, 8, 2, 5, random), flat)
    np.testing.assert_allclose(seamed(flat, 8, 2), flat)


def test_colours_alone_do_not_find_the_whole_picture_and_one_who_knows_it_does() -> None:
    x = normalize(procedural_images(0, 40).images, PREPROCESS)
    triples = triplets(x, 12, 3, 10, 0)
    colours = torch.stack([part.flatten(2).mean(2) for part in triples.unbind(1)], 1)
    share = float((oddness(colours).argmax(1) == 0).float().mean())
    assert share < 0.7, "chance is a third"
    told = torch.stack([torch.tensor([1.0, 0.0]), *[torch.tensor([0.0, 1.0])] * 2]).expand(40, 3, 2)
    assert bool((oddness(told).argmax(1) == 0).all())


def test_the_model_is_left_without_hooks_and_errors_say_what_to_do(ctx: Context) -> None:
    model = toy()
    x = normalize(procedural_images(0, 4).images, PREPROCESS)
    found = DiSRT(kept=0.2, candidates=4).measure(model, Calibration(x), ctx)
    assert set(found) == {"accuracy", "right", "margin"}
    assert found["right"].shape == (4,)
    assert not any(module._forward_hooks for module in model.module.modules())
    with pytest.raises(NotApplicableError, match="pictures"):
        DiSRT().measure(model, Calibration.none(), ctx)
    with pytest.raises(NotApplicableError, match="do not fit"):
        DiSRT(patch=100).measure(model, Calibration(x), ctx)
