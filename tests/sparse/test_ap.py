"""AP: what goes by magnitude, what by sign and movement, and training that keeps what is pruned at zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench_sparse.ap import (
    AP,
    Masked,
    dead_rate,
    occurrences,
    prunable,
    prune_smallest,
    prune_unmoved_negatives,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )


@given(seed=st.integers(0, 99), base=st.floats(0, 60), ap=st.floats(0, 20))
def test_as_many_go_as_asked_and_only_negative_ones_by_movement(seed: int, base: float, ap: float) -> None:
    draw = planted.generator(seed)
    weights = {"a.weight": torch.randn(40, 30, generator=draw), "b.weight": torch.randn(70, generator=draw)}
    start = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=draw) for name, weight in weights.items()
    }
    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    counts = dict.fromkeys(weights, 1)
    kept, number = prune_smallest(weights, ones, base, ap, counts)
    total = sum(weight.numel() for weight in weights.values())
    assert number == int(total * ap / 100)
    gone = total - sum(int(mask.sum()) for mask in kept.values())
    assert abs(gone - total * base / 100) <= 1
    fallen = torch.cat([weight[kept[name] == 0].abs() for name, weight in weights.items()])
    largest_gone = float(fallen.max()) if len(fallen) else 0.0
    assert all(float(w[kept[name] == 1].abs().min()) >= largest_gone for name, w in weights.items())
    after = prune_unmoved_negatives(weights, start, kept, number, counts)
    taken = {name: (kept[name] == 1) & (after[name] == 0) for name in weights}
    assert all(bool((weights[name][mask] < 0).all()) for name, mask in taken.items())
    assert sum(int(mask.sum()) for mask in taken.values()) == (number + 1 if number else 0)
    moved = {name: (weights[name] - start[name]).abs() for name in weights}
    if number:
        farthest = max(float(moved[name][mask].max()) for name, mask in taken.items() if mask.any())
        left = [moved[name][(after[name] == 1) & (weights[name] < 0)] for name in weights]
        assert all(float(rest.min()) > farthest for rest in left if len(rest))


def test_fewer_negatives_than_asked_all_go_and_positives_stay() -> None:
    weights = {"weight": torch.tensor([1.0, -1.0, 2.0, -2.0])}
    masks = {"weight": torch.ones(4)}
    found = prune_unmoved_negatives(weights, {"weight": torch.zeros(4)}, masks, 9, {"weight": 1})
    assert found["weight"].tolist() == [1, 0, 1, 0]
    positive = {"weight": torch.ones(4)}
    assert prune_unmoved_negatives(positive, {"weight": torch.zeros(4)}, masks, 9, {"weight": 1})[
        "weight"
    ].all()
    nothing, number = prune_smallest({"weight": torch.zeros(4)}, masks, 20, 2, {"weight": 1})
    assert (int(nothing["weight"].sum()), number) == (4, 0)


def test_tensors_count_again_for_what_follows_them() -> None:
    model = network()
    names = prunable(model, norms=True)
    assert names == ["0.weight", "1.weight", "4.weight"]
    assert prunable(model, norms=False) == ["0.weight", "4.weight"]
    assert occurrences(model, dict.fromkeys(names, torch.empty(0))) == {
        "0.weight": 1,
        "1.weight": 2,
        "4.weight": 2,
    }


def trained(method: AP, steps: int) -> tuple[Masked, list[float]]:
    model = method.wrap(network(), Context(seed=1))
    assert isinstance(model, Masked)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    draw = planted.generator(3)
    x, y = torch.randn(64, 1, 8, 8, generator=draw), torch.randint(5, (64,), generator=draw)
    shares = []
    for step in range(steps):
        outputs = model(x)
        loss = method.loss(model, outputs, y, nn.functional.cross_entropy(outputs, y))
        optimizer.zero_grad()
        loss.backward()
        method.after_backward(model, step)
        optimizer.step()
        method.after_step(model, step)
        shares.append(model.sparsity)
        for name, weight in model.weights().items():
            assert not weight[model.masks[name] == 0].any(), name
    return model, shares


@pytest.mark.parametrize("restart", ["rewind", "reinit"])
def test_masks_only_grow_and_pruned_weights_stay_zero(restart: Any) -> None:
    _, shares = trained(AP(cycles=3, cycle_steps=5, restart=restart), 25)
    assert shares == sorted(shares)
    # 20 % of what is alive goes in each of the three cycles, one weight more or less in each.
    assert shares[-1] == pytest.approx(1 - 0.8**3, abs=0.01)
    assert shares[4] == pytest.approx(0.2, abs=0.01)
    assert shares[3] == 0


def test_a_cycle_begins_at_the_initial_values_of_what_is_left() -> None:
    model, _ = trained(AP(cycles=1, cycle_steps=4), 4)
    for name, parameter in model.model.named_parameters():
        mask = model.masks.get(name, torch.ones(()))
        assert torch.equal(parameter, model.initial[name] * mask), name
    fresh, _ = trained(AP(cycles=1, cycle_steps=4, restart="reinit"), 4)
    (weight, initial, mask) = (d["4.weight"] for d in (fresh.weights(), fresh.initial, fresh.masks))
    assert not torch.equal(weight, initial * mask)
    # Without its second step it is iterative magnitude pruning.
    plain, _ = trained(AP(base=20.0, ap=0.0, cycles=1, cycle_steps=4), 4)
    assert plain.sparsity == pytest.approx(0.2, abs=0.005)


def test_no_cycles_train_the_dense_model_bit_for_bit() -> None:
    model, shares = trained(AP(cycles=0), 6)
    assert set(shares) == {0.0}
    reference = network()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    draw = planted.generator(3)
    x, y = torch.randn(64, 1, 8, 8, generator=draw), torch.randint(5, (64,), generator=draw)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        optimizer.step()
    for (name, ours), theirs in zip(model.model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_dead_units_are_counted_by_sample_and_for_all() -> None:
    activations = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    assert dead_rate(activations) == (4 / 6, 1 / 3)
    assert dead_rate(torch.relu(torch.randn(64, 3, 4, 4, generator=planted.generator(0))))[
        0
    ] == pytest.approx(0.5, abs=0.05)


def test_hostile_input_is_refused() -> None:
    with pytest.raises(NotApplicableError, match="no parameters called weight"):
        AP().wrap(nn.ReLU(), Context())
    for hyper in ({"base": -1.0}, {"base": 100.0}, {"ap": np.nan}, {"cycle_steps": 0}, {"restart": "later"}):
        with pytest.raises(ParameterError, match=next(iter(hyper))):
            build(AP, hyper, "ap")
