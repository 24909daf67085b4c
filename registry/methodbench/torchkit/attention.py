"""The place between the rotary embedding and the attention product: transforms of queries, keys and values.

Models of the transformers library hand queries, keys and values, rotated, [batch, heads, tokens, head size], to a
function that their configuration names. :func:`transform_operands` gives every attention of the blocks modules
that see them there: quantizers of a key-value cache, rotations that must follow the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import LoadedModel

Operand = Literal["query", "key", "value"]

_NAME = "methodbench_transformed"


class OperandTransforms(nn.Module):
    """The transforms of one attention module; an operand without one passes as it is."""

    def __init__(self, transforms: Mapping[Operand, nn.Module]) -> None:
        super().__init__()
        self.transforms = nn.ModuleDict({str(name): module for name, module in transforms.items()})

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the transformed operands, [batch, heads, tokens, head size] each."""

        def of(name: Operand, x: Tensor) -> Tensor:
            return self.transforms[name](x) if name in self.transforms else x

        return of("query", query), of("key", key), of("value", value)


def transform_operands(model: LoadedModel, make: Callable[[str], Mapping[Operand, nn.Module]]) -> None:
    """Give every attention of the blocks transforms of its operands, in place.

    Keys and values are transformed where attention reads them. With a cache that is every stored token at every
    step, from the values that the cache keeps: for a transform that treats tokens one by one the result is that
    of a cache which holds them transformed.

    Args:
        model: a decoder whose attention is chosen by name, as in the transformers library. Transforms that are
            there already run first.
        make: makes the transforms of one attention module from its full dotted name; modules that map
            [batch, heads, tokens, head size] to the same shape.

    Raises:
        NotApplicableError: the blocks' attention is not known, or does not take its function by name.
    """
    adapter, module = model.adapter, model.module
    names = (
        []
        if adapter.layout is None
        else [f"{block}.{adapter.layout.attention}" for block in adapter.block_names(module)]
    )
    config = getattr(module, "config", None)
    if not names or getattr(config, "_attn_implementation", None) not in ("sdpa", _NAME):
        raise NotApplicableError(
            f"{model.name} offers no place between the rotary embedding and attention",
            "Keys and values can be transformed in decoders of the transformers library that attend by "
            "scaled_dot_product_attention.",
        )
    for name in names:
        attention = module.get_submodule(name)
        added = OperandTransforms(make(name))
        before = getattr(attention, "operand_transforms", None)
        attention.operand_transforms = nn.ModuleList([*(before or ()), added])
    assert config is not None
    config._attn_implementation = _NAME
    _check_reached(model, names)


def _check_reached(model: LoadedModel, names: list[str]) -> None:
    """Run two tokens and check that every attention applied its transforms."""
    reached: set[str] = set()
    hooks = [
        list(model.module.get_submodule(f"{name}.operand_transforms").children())[-1].register_forward_hook(
            lambda *_, name=name: reached.add(name)
        )
        for name in names
    ]
    device = model.device
    try:
        with torch.no_grad():
            model.module(torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [name for name in names if name not in reached]
    if missed:
        raise NotApplicableError(f"{missed[0]} of {model.name} does not take its attention function by name")


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    for transforms in getattr(module, "operand_transforms", ()):
        query, key, value = transforms(query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, sdpa_mask)
