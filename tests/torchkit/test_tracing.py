"""Which module reads what another one returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methodbench.torchkit.tracing import Reads, traced


class Net(nn.Module):
    """A convolution with two readers, one of them behind a change in place, and a norm that runs twice."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.ReLU()
        self.second = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        once = self.first(made)
        if self.breaks:
            raise RuntimeError("broken")
        made.mul_(2)
        twice = self.second(made)
        return self.pool(self.last(self.norm(self.norm(once + twice))))


def read(net: nn.Module, writer: type[nn.Module], *readers: type[nn.Module]) -> Reads:
    return traced(
        net.eval(),
        torch.ones(1, 3, 2, 2),
        writers=lambda _, part: isinstance(part, writer),
        readers=lambda _, part: isinstance(part, readers),
    )


def hooks(net: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules())


def test_what_is_read_unchanged_is_linked_to_what_wrote_it() -> None:
    net = Net()
    found = read(net, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d)
    # The second ReLU reads the convolution's tensor too, but after another hand was at it.
    assert found.writer_of == {"first": "conv", "pool": "last"}
    assert found.calls == {"conv": 1, "first": 1, "second": 1, "last": 1, "pool": 1}
    assert hooks(net) == 0


def test_several_readers_and_several_calls_are_told() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.other = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            made = self.conv(self.conv(x))
            return self.one(made) + self.other(made)

    found = read(Twice(), nn.Conv2d, nn.ReLU)
    assert found.writer_of == {"one": "conv", "other": "conv"}
    assert found.calls["conv"] == 2
    assert read(Net(), nn.BatchNorm2d, nn.BatchNorm2d, nn.Conv2d).writer_of == {
        "norm": "norm",
        "last": "norm",
    }


def test_a_module_that_runs_again_keeps_all_that_it_read() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.relu = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            made = self.other(self.relu(self.one(x)))
            made += x
            return self.relu(self.other(self.relu(self.other(self.relu(made)))))

    found = read(Shared(), nn.Conv2d, nn.ReLU)
    # What was added to the second convolution's first output is between it and the ReLU.
    assert found.pairs == [("relu", "one"), ("relu", "other"), ("relu", "other")]
    assert found.writer_of == {"relu": "other"}
    assert found.calls == {"one": 1, "other": 3, "relu": 4}


def test_memory_of_outputs_that_are_gone_is_not_taken_for_theirs() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                self.conv(x)
                self.relu(x + 1)
            return x

    found = read(Forgetful(), nn.Conv2d, nn.ReLU)
    assert found.pairs == []
    assert found.calls == {"conv": 20, "relu": 20}


def test_inference_mode_makes_no_difference() -> None:
    net = Net()
    expected = read(net, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d)
    with torch.inference_mode():
        assert read(net, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d) == expected
        x = torch.ones(1, 3, 2, 2)
    found = traced(
        nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)),
        x,
        writers=lambda _, part: isinstance(part, nn.Conv2d),
        readers=lambda _, part: isinstance(part, nn.ReLU),
    )
    assert found.pairs == [("2", "1")]


def test_an_identity_passes_on_what_another_wrote() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU(inplace=True))
    assert read(chain, nn.Conv2d, nn.ReLU).writer_of == {"2": "0"}


def test_hooks_are_gone_where_the_network_breaks() -> None:
    net = Net(breaks=True)
    with pytest.raises(RuntimeError, match="broken"):
        read(net, nn.Conv2d, nn.ReLU)
    assert hooks(net) == 0
