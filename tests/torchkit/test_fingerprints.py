"""Fingerprints: they tell models apart, disturb nothing, and cost next to nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.fingerprints import Watch, mark, weight_marks
from methodbench.torchkit.model import LoadedModel


def make_model(blocks: int = 4, width: int = 64) -> LoadedModel:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(
        nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))),
        nn.Linear(width, 10),
    )
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
    return LoadedModel("m", "toy", module.eval(), Adapter(kind="toy", stack="0", head_name="1"))


def outputs(model: LoadedModel, x: torch.Tensor) -> list[tuple[str, str]]:
    with torch.no_grad(), Watch(model) as watch:
        model.module(x)
        model.module(x * 2)
    return [(mark.at, mark.digest) for mark in watch.marks]


def test_outputs_of_blocks_and_head_are_marked_once_in_the_order_of_the_computation() -> None:
    model, x = make_model(), torch.randn(8, 64)
    found = outputs(model, x)
    assert [at for at, _ in found] == ["0.0", "0.1", "0.2", "0.3", "1"]
    assert outputs(model, x) == found
    assert not any(module._forward_hooks for module in model.module.modules())


def test_one_changed_weight_shows_in_its_block_and_in_every_output_behind_it() -> None:
    model, x = make_model(), torch.randn(8, 64)
    weights, before = [one.digest for one in weight_marks(model)], outputs(model, x)
    model.module[0][2][0].weight.data[3, 5] += 1e-3
    changed = [one.digest for one in weight_marks(model)]
    assert [a == b for a, b in zip(weights, changed, strict=True)] == [True, True, False, True]
    same = [a == b for a, b in zip(before, outputs(model, x), strict=True)]
    assert same == [True, True, False, False, False]


def test_hooks_are_gone_after_an_evaluation_that_fails_or_never_calls_the_model() -> None:
    model = make_model()
    try:
        with Watch(model) as watch:
            raise RuntimeError
    except RuntimeError:
        pass
    assert watch.marks == []
    assert not any(module._forward_hooks for module in model.module.modules())


def test_a_mark_says_shape_and_rounded_statistics_and_sees_every_bit_of_a_small_tensor() -> None:
    x = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    found = mark("output", "block", x)
    assert (found.shape, found.mean, found.largest) == ([2, 2], 0.0, 3.0)
    assert found.std == 1.87083
    nudged = x.clone()
    nudged[0, 0] = torch.nextafter(x[0, 0], torch.tensor(2.0))
    assert mark("output", "block", nudged).digest != found.digest
    assert mark("output", "block", x.double()).digest != found.digest
    assert mark("output", "block", x.reshape(4)).digest != found.digest
    assert mark("output", "block", x.T.contiguous().T).digest == found.digest


def test_marks_hold_nothing_that_json_has_no_form_for() -> None:
    bad = mark("output", "block", torch.tensor([float("nan"), 1.0, float("inf")]))
    assert (bad.mean, bad.std, bad.largest) == (None, None, None)
    empty = mark("output", "block", torch.empty(0, 3))
    assert (empty.mean, empty.shape) == (None, [0, 3])
    tokens = mark("calibration", "", torch.tensor([[1, 2, 3]]))
    assert tokens.mean == 2.0
    assert mark("output", "block", torch.ones(3, dtype=torch.bfloat16)).largest == 1.0


def test_packed_integers_and_tensors_without_bits_do_no_harm() -> None:
    model = make_model()
    block = model.module[0][0]
    block.register_buffer("packed", torch.arange(100_000, dtype=torch.uint8))
    block.register_buffer("absent", torch.empty(5, device="meta"))
    marks = weight_marks(model)
    assert marks[0].shape == [64 * 64 + 64 + 100_000]
    block.packed[-1] += 1
    assert weight_marks(model)[0].digest != marks[0].digest


def test_the_bits_of_a_view_into_a_larger_storage_are_those_of_its_copy() -> None:
    storage = torch.randn(1001)
    assert mark("output", "", storage[1:]).digest == mark("output", "", storage[1:].clone()).digest
    assert mark("output", "", storage[1:].flip(0)).digest != mark("output", "", storage[1:]).digest


def test_an_output_as_large_as_logits_is_sampled() -> None:
    logits = torch.randn(3000, 3000)
    found = mark("output", "head", logits)
    assert (found.shape, mark("output", "head", logits.clone()).digest) == ([3000, 3000], found.digest)
    logits += 1e-3
    assert mark("output", "head", logits).digest != found.digest


def test_what_cannot_be_read_costs_its_mark_and_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    class Sealed(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if getattr(function, "__name__", "") == "detach":
                raise RuntimeError("sealed")
            return super().__torch_function__(function, types, args, kwargs or {})

    class Seal(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.as_subclass(Sealed)

    model = make_model(2)
    model.module[1] = Seal()
    with torch.no_grad(), Watch(model) as watch:
        model.module(torch.randn(2, 64))
    assert [one.at for one in watch.marks] == ["0.0", "0.1"]
    assert "no fingerprint of the output of 1: sealed" in capsys.readouterr().err
