"""Power-of-two and log2 grids."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.torchkit.logarithmic import Floor, Log2Grid, power_of_two, power_of_two_ste

FLOORS: list[Floor] = ["clamp", "extra", "zero"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_powers_of_two_keep_the_sign_and_lie_within_half_an_octave(seed: int) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    y = power_of_two(x)
    assert torch.equal(torch.log2(y.abs()), torch.log2(y.abs()).round())
    ratio = y / x
    assert bool((ratio > 0).all())
    assert bool(((ratio >= 2**-0.5001) & (ratio <= 2**0.5001)).all())
    assert torch.equal(power_of_two(y), y)
    assert float(power_of_two(torch.zeros(1))) == 0


def test_the_gradient_passes_through_the_exponent() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    power_of_two_ste(x).backward()
    # d 2^round(log2 x) / dx with rounding as the identity: y / x.
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([4.0 / 3.0]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), floor=st.sampled_from(FLOORS))
def test_levels_are_the_scale_times_powers_of_two(seed: int, bits: int, floor: Floor) -> None:
    x = torch.rand(200, generator=torch.Generator().manual_seed(seed)) ** 4
    grid = Log2Grid(x.max(), bits, floor)
    y = grid.snap(x)
    levels = torch.cat([x.max() * torch.exp2(-torch.arange(grid.levels)), torch.zeros(1)])
    assert bool((y[:, None] == levels).any(1).all())
    assert len(y.unique()) <= {"clamp": 2**bits, "extra": 2**bits + 1, "zero": 2**bits}[floor]
    assert torch.equal(grid.decode(grid.encode(x)), y)
    torch.testing.assert_close(grid.snap(y), y)


def test_what_lies_below_the_last_level_follows_the_rule() -> None:
    x = torch.tensor([1.0, 0.3, 0.125, 0.07, 0.0])
    one = torch.tensor(1.0)
    assert Log2Grid(one, 2, "clamp").snap(x).tolist() == [1, 0.25, 0.125, 0.125, 0.125]
    assert Log2Grid(one, 2, "extra").snap(x).tolist() == [1, 0.25, 0.125, 0, 0]
    assert Log2Grid(one, 2, "zero").snap(x).tolist() == [1, 0.25, 0, 0, 0]


def test_the_gradient_passes_from_zero_to_the_largest_level() -> None:
    x = torch.tensor([-0.1, 0.3, 0.9, 2.0], requires_grad=True)
    grid = Log2Grid(torch.tensor(1.0), 3)
    out = grid.pass_through(x)
    assert torch.equal(out.detach(), grid.snap(x.detach()))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
