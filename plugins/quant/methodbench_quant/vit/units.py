"""The parts of a model that reconstruction learns one after another, with what enters and leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import LoadedModel

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Unit:
    """A layer, or a block of layers, that is called once per forward pass.

    Attributes:
        name: its dotted name in the model.
        layers: the layers in it, by name relative to it; ``("",)`` for a layer alone.
    """

    name: str
    layers: tuple[str, ...]

    def full(self, layer: str) -> str:
        """Return the dotted name in the model of one of :attr:`layers`."""
        return f"{self.name}.{layer}" if layer else self.name

    def parameter(self, layer: str, leaf: str) -> str:
        """Return the name relative to the unit of a tensor of one of :attr:`layers`."""
        return f"{layer}.{leaf}" if layer else leaf


def units(
    model: LoadedModel, layers: Sequence[str], granularity: Literal["layer", "block"], images: Tensor
) -> list[Unit]:
    """Return the units that hold ``layers``, in the order in which a forward pass calls them.

    Blocks are those of a transformer, or the children of a convolutional network's stages; a layer outside of
    them is a unit of its own.

    Args:
        images: [B, C, H, W] for the pass that finds the order.

    Raises:
        NotApplicableError: a unit is called never, or more than once.
    """
    blocks = _blocks(model) if granularity == "block" else []
    found: dict[str, list[str]] = {}
    for layer in layers:
        holder = next((block for block in blocks if layer.startswith(f"{block}.")), layer)
        found.setdefault(holder, []).append(layer.removeprefix(holder).removeprefix("."))
    order = _order(model.module, list(found), images)
    if sorted(order) != sorted(found):
        raise NotApplicableError(f"{model.name} does not call each of its blocks and layers once")
    return [Unit(name, tuple(found[name])) for name in order]


def captured(module: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters and what leaves the submodule called ``name``, over all ``images``.

    Raises:
        NotApplicableError: the submodule takes anything besides one tensor.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (
            len(args) != 1
            or any(isinstance(v, Tensor) for v in kwargs.values())
            or not isinstance(output, Tensor)
        ):
            raise NotApplicableError(f"{name} maps more than one tensor, so that it cannot be learned alone")
        inputs.append(args[0])
        outputs.append(output)
        raise _Reached

    with torch.no_grad(), ExitStack() as hooks:
        handle = module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        hooks.callback(handle.remove)
        for batch in images.split(_BATCH):
            try:
                module(batch)
            except _Reached:
                continue
            raise NotApplicableError(f"no activation reaches {name}")
    return torch.cat(inputs), torch.cat(outputs)


class _Reached(Exception):
    """Leaves a forward pass once the submodule was called."""


def _blocks(model: LoadedModel) -> list[str]:
    names = model.adapter.block_names(model.module)
    if model.adapter.layout is not None:
        return names
    found = []
    for name in names:
        stage = model.module.get_submodule(name)
        children = [f"{name}.{child}" for child, _ in stage.named_children()]
        found += children if isinstance(stage, nn.Sequential) else [name]
    return [name for name in found if not isinstance(model.module.get_submodule(name), nn.Conv2d | nn.Linear)]


def _order(module: nn.Module, names: list[str], images: Tensor) -> list[str]:
    called: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: called.append(name)

    with torch.no_grad(), ExitStack() as hooks:
        for name in names:
            hooks.callback(module.get_submodule(name).register_forward_pre_hook(note(name)).remove)
        module(images)
    return called
