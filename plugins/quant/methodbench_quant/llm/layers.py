"""What every weight quantizer does before and after its own algorithm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import unfuse_experts
from methodbench.torchkit.model import LoadedModel, set_submodule
from methodbench.torchkit.packed import PackedLayer, dense_linear, pack_linear
from methodbench.torchkit.size import bits_per_weight


def open_copy(model: LoadedModel) -> LoadedModel:
    """Return a clone of ``model`` with experts as Linears of their own, every target checked to be dense.

    Raises:
        NotApplicableError: the blocks hold no Linear, or a layer that is quantized already.
    """
    copy = model.clone()
    unfuse_experts(copy.module)
    targets = copy.adapter.targets(copy.module)
    if not targets:
        raise NotApplicableError(f"{model.name} has no Linear in its blocks to quantize")
    for name, layer in targets.items():
        dense_linear(layer, name)
    return copy


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a Linear, fp32 [out, in], detached; shared with the layer where that is fp32."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().float()


def replace_linear(block: nn.Module, name: str, quantized: Any, **options: Any) -> PackedLayer:
    """Put the packed form of ``quantized`` in the place of the Linear called ``name`` in ``block``.

    Args:
        quantized: a weight of a type that a packed layer stores.
        options: passed to :func:`methodbench.torchkit.packed.pack_linear`.
    """
    packed = pack_linear(dense_linear(block.get_submodule(name), name), quantized, **options)
    set_submodule(block, name, packed)
    return packed


def finished(model: LoadedModel, facts: dict[str, Any]) -> LoadedModel:
    """Return ``model`` with its storage declared real, its bits per weight measured, and ``facts`` noted."""
    model.storage = "real"
    model.accounted_bits = bits_per_weight(model)
    model.facts.update({"layers": len(model.adapter.targets(model.module)), **facts})
    return model
