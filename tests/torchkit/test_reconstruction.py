"""Windows of blocks: what enters them, what they are to give, and learning over them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.reconstruction import fit, windows

Decoder = Callable[..., LoadedModel]


def hidden_states(model: LoadedModel, tokens: Calibration) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in model.adapter.blocks(model.module)
    ]
    with torch.no_grad():
        model.module(tokens.inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("size", "overlap", "starts"),
    [(1, 0, [0, 1, 2]), (2, 1, [0, 1]), (2, 0, [0, 2]), (3, 2, [0]), (5, 0, [0])],
)
def test_windows_cover_the_blocks_with_both_streams(
    decoder: Decoder, tokens: Calibration, size: int, overlap: int, starts: list[int]
) -> None:
    teacher, student = decoder("llama"), decoder("llama").clone()
    dense = hidden_states(teacher, tokens)
    found = []
    for window in windows(teacher, student, tokens, size=size, overlap=overlap, batch_size=2):
        found.append(window.start)
        assert len(window) == 3
        torch.testing.assert_close(torch.cat(window.dense_inputs), dense[window.start])
        after = hidden_states(student, tokens)[window.start]
        torch.testing.assert_close(torch.cat(window.inputs), after)
        # Without parameters of its own the window computes what the student's blocks compute.
        if window.start == 0:
            torch.testing.assert_close(window.student(1), window.targets[1])
        for block in window.student_blocks[: 1 if overlap else None]:
            set_weight(block.mlp.up_proj, block.mlp.up_proj.weight * 0.5)
        assert window.last is (window.start + len(window.names) == 3)
    assert found == starts


def test_given_tensors_replace_parameters_and_carry_gradients(decoder: Decoder, tokens: Calibration) -> None:
    teacher = decoder("llama")
    student = teacher.clone()
    window = next(windows(teacher, student, tokens, size=2, overlap=1))
    weight = window.student_blocks[0].mlp.up_proj.weight.clone().requires_grad_(True)
    y = window.student(0, [{"mlp.up_proj.weight": weight * 0}, {}])
    assert not torch.allclose(y, window.targets[0])
    y.sum().backward()
    assert weight.grad is not None
    assert torch.equal(
        window.student_blocks[0].mlp.up_proj.weight, teacher.module.model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_fitting_minimizes_and_schedules(schedule: str) -> None:
    x = torch.tensor([4.0], requires_grad=True)
    rates: list[float] = []
    optimizer = torch.optim.SGD([x], lr=0.1)

    def loss(batch: int, done: float) -> torch.Tensor:
        rates.append(optimizer.param_groups[0]["lr"])
        assert done == len(rates[1:]) / 20
        return (x - batch).square().sum()

    found = fit(optimizer, loss, 2, steps=20, schedule=schedule)  # type: ignore[arg-type]
    assert found.last < found.first
    assert rates[0] == pytest.approx(0.1)
    assert (rates[-1] == pytest.approx(0.1)) is (schedule == "constant")
    assert rates == sorted(rates, reverse=True)


def test_a_loss_that_is_not_finite_ends_it_with_the_step() -> None:
    x = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(DivergedError, match="the loss of block 3 is not finite at step 0"):
        fit(torch.optim.SGD([x], lr=1.0), lambda *_: (x / 0).sum(), 1, steps=3, name="block 3")


def test_what_cannot_be_done_says_why(decoder: Decoder, tokens: Calibration) -> None:
    model = decoder("llama")
    with pytest.raises(NotApplicableError, match="needs calibration inputs"):
        next(windows(model, model.clone(), Calibration.none()))
    with pytest.raises(ValueError, match="overlap of 2 blocks"):
        next(windows(model, model.clone(), tokens, size=2, overlap=2))
