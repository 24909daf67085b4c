"""Block after block: the calibration loop that methods on deep stacks share.

The inputs of the first block and every block's other arguments (masks, position embeddings) are captured
once; then one block at a time is handed to the consumer with its inputs, and those inputs advance to the
next block. Only one block's inputs and outputs are in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import Calibration, LoadedModel

Observer = Callable[[Tensor], None]

_BATCH_TOKENS = 512
_BATCH_IMAGES = 32


@dataclass
class BlockStep:
    """One block with everything that it is called with."""

    index: int
    name: str
    """Dotted name in the model."""
    block: nn.Module
    inputs: list[Tensor]
    """Hidden states, one [B, T, hidden] (or [B, C, H, W]) per batch of calibration sequences; none once the next step
    was asked for."""
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    """The block's other arguments, by name, one dictionary per batch."""
    outputs: list[Tensor] | None = None
    """What the untouched block makes of its inputs, where :func:`walk` ran it before the consumer (``observe`` with
    ``propagate="dense"``)."""

    def forward(self, observers: Mapping[str, Observer] | None = None) -> list[Tensor]:
        """Run the block, as it is at this moment, on every batch, without gradients.

        Args:
            observers: submodule name relative to the block -> called with the first positional input of that
                submodule, once per batch. Inputs that the block flattens to [B * T, in] arrive as [B, T, in];
                experts of a mixture see only the tokens routed to them, [tokens, in], and none at all where
                no token was.

        Returns:
            Hidden states, one per batch.

        Raises:
            AttributeError: an observer names no submodule of the block.
        """
        outputs = []
        for x, kwargs in zip(self.inputs, self.kwargs, strict=True):
            with torch.no_grad(), ExitStack() as hooks:
                for name, observer in (observers or {}).items():
                    submodule = self.block.get_submodule(name)
                    hooks.callback(_observe(submodule, observer, x.shape[:-1]).remove)
                outputs.append(hidden_of(self.block(x, **kwargs)))
        return outputs


def walk(
    model: LoadedModel,
    data: Calibration,
    *,
    propagate: Literal["compressed", "dense"],
    batch_size: int | None = None,
    observe: Callable[[nn.Module], Mapping[str, Observer]] | None = None,
) -> Iterator[BlockStep]:
    """Yield the blocks of ``model`` in order, each with its calibration inputs.

    The consumer may replace anything inside ``step.block``, or the block itself in the model. When it asks
    for the next step, the inputs advance.

    Args:
        model: its blocks form a chain, each applied to the output of the one before.
        data: token ids [sequences, tokens] or images [images, channels, height, width].
        propagate: ``"compressed"`` advances through the block as the consumer left it, so that later blocks
            see the errors of earlier ones; ``"dense"`` through the block as it was before the consumer
            touched it.
        batch_size: sequences or images at a time; by default about 512 tokens, or 32 images.
        observe: makes the observers of a pass through the untouched block that precedes the step, given the
            block. With ``"dense"`` that is the pass that advances the inputs, so observing costs nothing
            more.

    Raises:
        NotApplicableError: no calibration inputs, or blocks that the model does not call one after another.
    """
    if not len(data):
        raise NotApplicableError(
            "block-by-block calibration needs inputs, and there are none",
            "The method must list 'calibration' in its needs, and the task must offer calibration data.",
        )
    names = model.adapter.block_names(model.module)
    inputs, arguments = capture_blocks(model, batches_of(data.inputs, batch_size))
    for index, name in enumerate(names):
        step = BlockStep(index, name, model.module.get_submodule(name), inputs, arguments[index])
        last = index == len(names) - 1
        outputs: list[Tensor] | None = None
        if observe is not None or (propagate == "dense" and not last):
            outputs = step.forward(observe(step.block) if observe is not None else None)
        if propagate == "compressed":
            outputs = None
        step.outputs = outputs
        yield step
        if not last:
            step.block = model.module.get_submodule(name)
            inputs = step.forward() if outputs is None else outputs
            # The consumer holds its step until it has the next one, for which these need not stay.
            step.inputs, step.outputs, outputs = [], None, None


class _Captured(Exception):
    """Leaves the model's forward pass once the last block was reached."""


def capture_blocks(
    model: LoadedModel, batches: list[Tensor]
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """Return the hidden states that enter the first block, and the other arguments of every block, per batch.

    The model runs with every block standing in for the identity, which costs no more than its embedding.
    Equal tensors of different batches (masks, position embeddings) are kept once.
    """
    dry = model.clone().module
    names = model.adapter.block_names(dry)
    blocks = [dry.get_submodule(name) for name in names]
    device = next((p.device for p in dry.parameters()), torch.device("cpu"))
    options = {"use_cache": False} if "use_cache" in inspect.signature(dry.forward).parameters else {}
    inputs: list[Tensor] = []
    arguments: list[list[dict[str, Any]]] = [[] for _ in blocks]
    called: list[int] = []
    state: dict[str, Any] = {}
    interned: dict[int, tuple[Any, Any]] = {}

    def intern(value: Any, known: Any) -> Any:
        # The value is kept beside its stand-in, so that its id stays its own while the batch lasts.
        return interned.setdefault(id(value), (value, _same(value, known)))[1]

    def stand_in(index: int, parameters: list[str], run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = {**dict(zip(parameters, args, strict=False)), **kwargs}
            hidden = bound.pop(parameters[0])
            if index == 0:
                state["hidden"] = hidden
                inputs.append(hidden)
                if len(inputs) == 1:
                    state["tuple"] = isinstance(run(*args, **kwargs), tuple)
            known = arguments[index][-1] if arguments[index] else {}
            arguments[index].append({key: intern(value, known.get(key)) for key, value in bound.items()})
            if hidden is not state["hidden"]:
                raise _Captured
            called.append(index)
            if index == len(blocks) - 1:
                raise _Captured
            return (hidden,) if state["tuple"] else hidden

        return forward

    for index, block in enumerate(blocks):
        parameters = [
            name
            for name, parameter in inspect.signature(block.forward).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        block.forward = stand_in(index, parameters, block.forward)
    try:
        for batch in batches:
            called.clear()
            interned.clear()
            with torch.no_grad(), suppress(_Captured):
                dry(batch.to(device), **options)
            if called != list(range(len(blocks))):
                raise NotApplicableError(
                    f"{model.name} does not apply its {len(blocks)} blocks one after another to the same "
                    f"tensor (blocks that follow the rule, in order of their calls: {called})"
                )
    finally:
        # A stand-in and its block refer to each other: parted, they and the inputs go as soon as they can.
        for block in blocks:
            del block.forward
    return inputs, arguments


def batches_of(inputs: Tensor, batch_size: int | None) -> list[Tensor]:
    if batch_size is None:
        tokens = inputs.ndim == 2 and not inputs.is_floating_point()
        batch_size = max(1, _BATCH_TOKENS // inputs.shape[1]) if tokens else _BATCH_IMAGES
    return list(inputs.split(batch_size))


def _same(value: Any, known: Any) -> Any:
    """Return ``known`` in place of an equal ``value``, so that repeated tensors are kept once."""
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        alike = value is known or (value.shape == known.shape and torch.equal(value, known))
        return known if alike else value
    if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
        return tuple(_same(part, other) for part, other in zip(value, known, strict=True))
    return value


def _observe(submodule: nn.Module, observer: Observer, leading: torch.Size) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.ndim == 2 and len(leading) == 2 and x.shape[0] == leading.numel():
            x = x.view(*leading, x.shape[-1])
        observer(x)

    return submodule.register_forward_pre_hook(hook, with_kwargs=True)


def hidden_of(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden
