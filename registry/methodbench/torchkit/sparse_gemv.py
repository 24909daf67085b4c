"""Matrix-vector products that read only the columns of active inputs: decoding with sparse activations, on a CPU.

For a single token, ``y = W x`` is bound by reading W. Where most of x is zero, the columns of the others suffice. The
weight is stored by columns, in blocks of outputs ``[blocks, in, out / blocks]``, so that the part of a column in a
block is contiguous; a weighted sum of rows of such a table is :func:`torch.nn.functional.embedding_bag`, which
gathers, scales and adds without a copy, one block to a thread. Blocks keep the sums in cache.

Gathering costs more per weight than streaming. Whether it pays depends on machine, shape, dtype and sparsity, so
:func:`choose` measures at load: dense product and gathering in turn, on the weights of all layers of a shape one
after the other and with a new mask each time, since one weight or mask over and over would sit in cache and flatter
what reads less. :func:`accelerate` replaces what gains; batches, prompts and layers that gain nothing stay dense.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.torchkit.activation_sparsity import Site, SparseInput
from methodbench.torchkit.model import LoadedModel, set_submodule

#: Widths of the blocks of outputs that are tried, where they divide the output.
BLOCK_WIDTHS = (512, 1024, 2048)
#: A gain below this is not worth another layout.
WORTHWHILE = 1.05
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a measurement found best for weights of one shape at one sparsity."""

    block: int
    """Outputs in a block; 0 for the dense product."""
    gain: float
    """Seconds of the dense product over those of the best way to gather."""


def column_blocks(weight: Tensor, block: int) -> Tensor:
    """Return ``weight`` [out, in] by columns in blocks of outputs, contiguous [out / block, in, block].

    Raises:
        ValueError: ``block`` does not divide the outputs.
    """
    out, width = weight.shape
    if block < 1 or out % block:
        raise ValueError(f"blocks of {block} do not divide {out} outputs")
    return weight.detach().view(out // block, block, width).transpose(1, 2).contiguous()


def gather_gemv(blocks: Tensor, x: Tensor, active: Tensor) -> Tensor:
    """Return ``W (x active)`` [out] for a weight in :func:`column_blocks`, reading active columns alone.

    Args:
        x: [in], of the dtype of the weight: float32 or bfloat16.
        active: boolean [in].
    """
    count, width, block = blocks.shape
    index = active.nonzero().flatten()
    if not len(index):
        return x.new_zeros(count * block)
    values = x[index].expand(count, -1).contiguous()
    rows = index + width * torch.arange(count, device=index.device)[:, None]
    table = blocks.view(count * width, block)
    return F.embedding_bag(rows, table, per_sample_weights=values, mode="sum").flatten()


class GatherLinear(nn.Module):
    """A sparse Linear whose products with a single token read the columns of active inputs alone.

    Holds the weight once, as ``blocks`` [out / block, in, block]. Several tokens at a time take the dense product.
    """

    blocks: Tensor
    bias: nn.Parameter | None

    def __init__(self, sparse: SparseInput, block: int) -> None:
        super().__init__()
        self.in_features, self.out_features = sparse.in_features, sparse.out_features
        self.register_buffer("blocks", column_blocks(sparse.weight, block))
        self.register_parameter("bias", sparse.bias)
        self.rule = sparse.rule
        self.site: Site = sparse.site
        self.train(sparse.training)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], put together anew at every call."""
        return self.blocks.transpose(1, 2).reshape(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``W (mask input) + b`` for ``input`` [..., in]."""
        if input.numel() == self.in_features and not self.site.split(input)[1]:
            active = self.rule(input)
            self.site.count(active.view(1, 1, -1), 1)
            out = gather_gemv(self.blocks, input.flatten(), active.flatten()).view(*input.shape[:-1], -1)
        else:
            masked = self.site.apply(input, self.rule)
            out = torch.cat([masked @ block for block in self.blocks], dim=-1)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        count, width, block = self.blocks.shape
        return f"in_features={width}, out_features={count * block}, block={block}"


@torch.no_grad()
def choose(weights: Sequence[Tensor], sparsity: float, *, rounds: int = 5, seed: int = 0) -> Choice:
    """Return the fastest way to multiply weights of one shape and dtype with inputs of a sparsity.

    Args:
        weights: [out, in] each; they are gone through one after the other, so several of them, as many as the model
            has, give the honest figure.
        rounds: passes over the weights for each way; medians are compared.
    """
    out, width = weights[0].shape
    if weights[0].dtype not in _DTYPES or not sparsity:
        return Choice(0, 1.0)
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(width, generator=draw).to(weights[0].dtype) for _ in weights]

    def masks() -> list[Tensor]:
        return [torch.rand(width, generator=draw) >= sparsity for _ in weights]

    ways: dict[int, Callable[[list[Tensor]], object]] = {
        0: lambda active: [F.linear(x * m, w) for x, m, w in zip(inputs, active, weights, strict=True)]
    }
    for block in dict.fromkeys((*(b for b in BLOCK_WIDTHS if out % b == 0), out)):
        tables = [column_blocks(weight, block) for weight in weights]
        ways[block] = lambda active, tables=tables: [  # type: ignore[misc]
            gather_gemv(table, x, m) for table, x, m in zip(tables, inputs, active, strict=True)
        ]
    seconds: dict[int, list[float]] = defaultdict(list)
    for round_ in range(rounds + 1):
        for block, run in ways.items():
            active = masks()
            start = time.perf_counter()
            run(active)
            if round_:
                seconds[block].append(time.perf_counter() - start)
    medians = {block: statistics.median(values) for block, values in seconds.items()}
    best = min((block for block in medians if block), key=medians.__getitem__)
    gain = medians[0] / medians[best]
    return Choice(best if gain >= WORTHWHILE else 0, gain)


def accelerate(model: LoadedModel, sparsity: float, *, rounds: int = 5) -> dict[str, Any]:
    """Replace the sparse Linears of ``model`` that gain by it with :class:`GatherLinear`, in place.

    Args:
        model: has :class:`SparseInput` layers, on a CPU.
        sparsity: what inputs are expected to have.

    Returns:
        Facts: the gain found for each shape, and how many layers were replaced.
    """
    groups: dict[tuple[Any, ...], list[tuple[str, SparseInput]]] = defaultdict(list)
    for name, module in model.module.named_modules():
        if isinstance(module, SparseInput) and module.weight.device.type == "cpu":
            groups[(*module.weight.shape, module.weight.dtype)].append((name, module))
    gains: dict[str, float] = {}
    replaced = 0
    for (out, width, dtype), layers in groups.items():
        choice = choose([layer.weight for _, layer in layers], sparsity, rounds=rounds)
        gains[f"{out}x{width} {str(dtype).removeprefix('torch.')}"] = round(choice.gain, 3)
        for name, layer in layers if choice.block else ():
            set_submodule(model.module, name, GatherLinear(layer, choice.block))
            replaced += 1
    return {"gather_gain": gains, "gather_layers": replaced}
