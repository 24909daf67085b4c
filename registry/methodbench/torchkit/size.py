"""What a model's tensors occupy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from methodbench.torchkit.adapters import Adapter
    from methodbench.torchkit.model import LoadedModel


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of ``module``; memory that tensors share counts once.

    Views count the part that they show. Tensors without memory (on the meta device) count nothing.
    """
    return _bytes([*module.parameters(), *module.buffers()])


def weights(adapter: Adapter, module: nn.Module) -> int:
    """Return how many weights the layers of the blocks have, biases left out; a shared layer counts once."""
    layers = {id(layer): layer for layer in adapter.targets(module).values()}
    return sum(_weight_count(layer) for layer in layers.values())


def bits_per_weight(model: LoadedModel) -> float:
    """Return measured bits per weight over the layers of the blocks.

    Everything that a layer stores for its weights counts, scales, zero points and permutations included;
    its bias does not. 32.0 for a dense float32 model.

    Raises:
        ValueError: the blocks have no layers.
    """
    count = weights(model.adapter, model.module)
    if not count:
        raise ValueError(f"{model.name} has no layers in its blocks")
    stored = [
        tensor
        for layer in model.adapter.targets(model.module).values()
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
        if name.rpartition(".")[2] != "bias"
    ]
    return 8 * _bytes(stored) / count


def _weight_count(layer: Any) -> int:
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features) * int(layer.out_features)
    return int(layer.weight.numel())


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of the union of the tensors' memory, in bytes."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            continue
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans[str(tensor.device)].append((start, start + (steps + 1) * tensor.element_size()))
    total = 0
    for ranges in spans.values():
        end = 0
        for start, stop in sorted(ranges):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
    return total


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the tensors in an optimizer's state, lists and dictionaries of them included."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            for item in value.values():
                yield from tensors(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from tensors(item)

    return _bytes(list(tensors(optimizer.state)))
