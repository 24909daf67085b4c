"""Which module reads what another one returns, observed in a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Reads:
    """What :func:`traced` saw, by dotted names."""

    pairs: list[tuple[str, str]] = field(default_factory=list)
    """Reader and writer, in order of calls: every time that a module got another's output, unchanged, as its first
    argument. A module that runs several times may be in several pairs."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often each module that was watched ran."""

    @property
    def writer_of(self) -> dict[str, str]:
        """The writer by the name of its reader; of several that one module read, the last."""
        return dict(self.pairs)


def traced(
    module: nn.Module,
    x: Tensor,
    *,
    writers: Callable[[str, nn.Module], bool],
    readers: Callable[[str, nn.Module], bool],
) -> Reads:
    """Run ``module`` on ``x`` without gradients and say which of its modules read which.

    An output that is written to in place is no longer that of the module which returned it. Hooks are gone when this
    returns or raises. Both hold in inference mode too.

    Args:
        module: run once; any of its modules may run several times in that, and may have several readers.
        x: its only argument.
        writers: by name and module, whose outputs are followed.
        readers: by name and module, whose first arguments are looked at.
    """
    found = Reads()
    # The tensors themselves are kept, so that no later one gets the identity of one that is gone.
    outputs: dict[int, tuple[str, Tensor, int]] = {}

    def write(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[id(output)] = (name, output, output._version)

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen = outputs.get(id(args[0])) if args else None
            if seen is None:
                return
            writer, output, version = seen
            if output._version == version:
                found.pairs.append((name, writer))

        return hook

    def count(name: str) -> Callable[..., None]:
        return lambda *_: found.calls.update([name])

    # Tensors made in inference mode do not count the changes made to them.
    with ExitStack() as hooks, torch.inference_mode(False), torch.no_grad():
        for name, part in module.named_modules():
            writes, looks = writers(name, part), readers(name, part)
            if writes or looks:
                hooks.callback(part.register_forward_pre_hook(count(name)).remove)
            if looks:
                hooks.callback(part.register_forward_pre_hook(read(name)).remove)
            if writes:
                hooks.callback(part.register_forward_hook(write(name)).remove)
        module(x.clone() if x.is_inference() else x)
    return found
