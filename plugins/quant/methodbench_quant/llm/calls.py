"""What one block's layers and modules were called with during calibration, kept for searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from methodbench.errors import DivergedError
from methodbench.torchkit.adapters import Adapter, ScaleGroup
from methodbench.torchkit.quantizers import finite
from methodbench.torchkit.sequential import Observer

T = TypeVar("T")


class ChannelRanges:
    """Largest magnitudes of the input channels of one block's layers over the calibration set.

    Attributes:
        highest: layer name -> fp32 [in], over all tokens.
        lowest: layer name -> fp32 [in], the least over sequences of each sequence's largest magnitude.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.highest: dict[str, Tensor] = {}
        self.lowest: dict[str, Tensor] = {}

    def watch(self, block: nn.Module) -> Mapping[str, Observer]:
        """Forget the block before, and return observers of the layers of ``block``."""
        self.highest, self.lowest = {}, {}
        return {name: self.observer(name) for name in self.adapter.linears(block)}

    def observer(self, name: str) -> Observer:
        """Return what takes the inputs of the layer ``name``, [sequences, tokens, in] or [tokens, in]."""

        def observe(x: Tensor) -> None:
            if not x.numel():
                return
            sequences = x.detach().float().abs().reshape(-1, *x.shape[-2:]).amax(-2)
            high, low = sequences.amax(0), sequences.amin(0)
            if name in self.highest:
                high, low = torch.maximum(high, self.highest[name]), torch.minimum(low, self.lowest[name])
            self.highest[name], self.lowest[name] = high, low

        return observe

    def of(self, name: str, owner: str) -> Tensor:
        """Return ``highest`` of the layer ``name``.

        Raises:
            DivergedError: it is not finite; names ``owner``.
        """
        require_finite_inputs(self.highest[name], owner)
        return self.highest[name]


def require_finite_inputs(x: Tensor, owner: str) -> None:
    """Check calibration inputs, or what was computed from them.

    Raises:
        DivergedError: they hold NaN or infinity; names ``owner``, the layer that reads them.
    """
    if not finite(x):
        raise DivergedError(f"calibration activations that enter {owner} hold NaN or infinity")


@dataclass(frozen=True, slots=True)
class Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The first argument, [B, T, hidden]."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()))
        assert isinstance(first, Tensor)
        return first


class Recorder:
    """Keeps the inputs of one block's Linears and the calls of its inspected modules, one entry per batch."""

    def __init__(self, adapter: Adapter, inspected: Callable[[nn.Module], set[str]] | None = None) -> None:
        """``inspected`` names the modules of a block whose calls are kept; those of its scale groups by
        default."""
        self.adapter = adapter
        self.inspected = inspected or self._inspected_by_groups
        self.inputs: dict[str, list[Tensor]] = {}
        self.calls: dict[str, list[Call]] = {}
        self._hooks: list[RemovableHandle] = []

    def watch(self, block: nn.Module) -> Mapping[str, Observer]:
        """Forget the block before, and return observers of the Linears of ``block``."""
        self.inputs, self.calls = {}, {}

        def observer(name: str) -> Observer:
            return lambda x: self.inputs.setdefault(name, []).append(x)

        for name in self.inspected(block):
            calls: list[Call] = []
            self.calls[name] = calls
            self._hooks.append(
                block.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, kwargs, calls=calls: calls.append(Call(args, kwargs)), with_kwargs=True
                )
            )
        return {name: observer(name) for name in self.adapter.linears(block)}

    def stop(self) -> None:
        """Stop recording calls."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _inspected_by_groups(self, block: nn.Module) -> set[str]:
        return {group.inspect for group in self.adapter.scale_groups(block)} - {""}

    def source(self, group: ScaleGroup) -> list[Tensor]:
        """Return the inputs that all of ``group.linears`` read; empty where no token reached them."""
        if group.linears[0] in self.inputs:
            return self.inputs[group.linears[0]]
        return [call.hidden for call in self.calls.get(group.inspect, [])]


def sample_tokens(parts: Sequence[Tensor], tokens: int) -> Tensor:
    """Return about ``tokens`` rows [rows, in] of ``parts`` [..., in]: every n-th, fewer than twice as
    many."""
    x = torch.cat([part.flatten(0, -2) for part in parts])
    return x[:: max(1, len(x) // tokens)]


def subset(parts: Sequence[T], tokens: Callable[[T], int], limit: int) -> list[T]:
    """Return batches of about ``limit`` tokens in all, evenly spread over ``parts``; all of them where it is
    0."""
    total = sum(tokens(part) for part in parts)
    if not limit or total <= limit:
        return list(parts)
    keep = max(1, round(len(parts) * limit / total))
    return [parts[i * len(parts) // keep] for i in range(keep)]


def count(x: Tensor) -> int:
    """Return how many tokens ``x`` [..., features] has."""
    return x.shape[:-1].numel()


@torch.no_grad()
def output_of(module: nn.Module, call: Call, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the output of ``module`` for a recorded call, with some of its parameters replaced by
    ``weights``."""
    output = functional_call(module, dict(weights or {}), call.args, call.kwargs)
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def squared_error(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from weight changes [groups, out, g] to ``sum over tokens of (x d)^2`` [groups,
    out].

    Args:
        x: fp32 [groups, tokens, g]. Where there are more tokens than inputs, their second moments serve
            instead.
    """
    if x.shape[1] <= x.shape[2]:
        transposed = x.transpose(1, 2)
        return lambda delta: (delta @ transposed).square_().sum(-1)
    moments = x.transpose(1, 2) @ x
    return lambda delta: (delta @ moments).mul_(delta).sum(-1)
