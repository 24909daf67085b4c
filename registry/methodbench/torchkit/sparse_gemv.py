"""Products for single tokens that read the weights of active inputs or neurons only: decoding with sparse activations.

For a single token, ``y = W x`` is bound by reading W. Where most of x is zero, the columns of the others suffice; where
neurons are known to be zeroed, so do the rows of the others. On a CPU there are two ways to read columns:

gather
    The weight lies by columns, in blocks of outputs ``[blocks, in, out / blocks]``, so that the part of a column in a
    block is contiguous; a weighted sum of rows of such a table is :func:`torch.nn.functional.embedding_bag`, one
    block to a thread.
stream
    The weight lies transposed, and compiled code reads eight active columns side by side
    (:mod:`methodbench.torchkit.kernels.native`), where there is a compiler. Rows are read by compiled code alone.

On CUDA the weight lies transposed for the Triton kernel of :mod:`methodbench.torchkit.kernels.sparse_gemv`.

Whether any of it pays depends on machine, shape, dtype and sparsity, so :func:`choose` measures at load: dense product
and the others in turn, on the weights of all layers of a shape one after the other and with a new mask each time,
since one weight or mask over and over would sit in cache and flatter what reads less. :func:`execute` replaces the
layers that gain; batches, prompts and layers that gain nothing stay dense.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.torchkit.activation_sparsity import (
    Site,
    SparseActivation,
    SparseInput,
    Threshold,
    feed_forwards,
)
from methodbench.torchkit.kernels import graph_of, runs_triton
from methodbench.torchkit.kernels.native import native
from methodbench.torchkit.model import LoadedModel, set_submodule

#: Widths of the blocks of outputs that are tried, where they divide the output.
BLOCK_WIDTHS = (512, 1024, 2048)
#: A gain below this is not worth another layout.
WORTHWHILE = 1.05
_DTYPES = (torch.float32, torch.bfloat16)

Execution = Annotated[
    Literal["masked", "sparse"],
    Field(
        description="masked: zeros in dense products, nothing is faster; sparse: products of single tokens read the "
        "weights of what stays, in layers where that was measured to be faster"
    ),
]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a measurement found best for weights of one shape at one sparsity."""

    block: int
    """Outputs in a block; 0 for the dense product."""
    gain: float
    """Seconds of the dense product over those of the best other way."""
    streamed: bool = False
    """Whether compiled code streams columns or rows, ``block`` being all outputs."""


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
    """A Linear whose products with a single token read the columns of active inputs alone.

    Holds the weight once, as ``blocks`` [out / block, in, block]. Several tokens at a time take the dense product.

    Args:
        linear: a :class:`SparseInput`, whose rule says which inputs are active, or any other Linear, where those are
            that are not zero.
        streamed: compiled code streams whole columns; takes a single block.
    """

    blocks: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, block: int, *, streamed: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("blocks", column_blocks(linear.weight, block))
        self.register_parameter("bias", linear.bias)
        sparse = linear if isinstance(linear, SparseInput) else None
        self.rule: nn.Module | None = sparse.rule if sparse else None
        self.site: Site | None = sparse.site if sparse else None
        self.product = _product(streamed)
        self.streamed = streamed
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], put together anew at every call."""
        return self.blocks.transpose(1, 2).reshape(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``W (mask input) + b`` for ``input`` [..., in]."""
        site, rule = self.site, self.rule
        # A single token is touched under every policy.
        if input.numel() == self.in_features:
            if site is None or rule is None:
                active = input != 0
            else:
                active = rule(input)
                site.count(active.view(1, 1, -1), 1)
            out = self.product(self.blocks, input.flatten(), active.flatten()).view(*input.shape[:-1], -1)
        else:
            masked = input if site is None or rule is None else site.apply(input, rule)
            parts = [masked @ block for block in self.blocks]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        count, width, block = self.blocks.shape
        return f"in_features={width}, out_features={count * block}, block={block}, streamed={self.streamed}"


class RowLinear(nn.Linear):
    """A Linear that computes the outputs of a single token alone that active neurons need; the others are zero.

    It shares the parameters of ``linear``. ``neurons`` says which neurons are active; where it says nothing, and for
    several tokens, the product is dense.
    """

    def __init__(self, linear: nn.Linear, neurons: ActiveNeurons) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.neurons = neurons
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``W input + b`` for ``input`` [..., in], zeros where a neuron is not active."""
        active, code = self.neurons.take(), native()
        if active is None or code is None or input.numel() != self.in_features:
            return super().forward(input)
        out = code.rows(self.weight, input.flatten(), active).view(*input.shape[:-1], -1)
        return out if self.bias is None else out + self.bias * active


class ActiveNeurons:
    """Hands the mask of a single token from an activation function to the projection that it is multiplied with."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def put(self, mask: Tensor | None) -> None:
        """Leave the mask [neurons] of a single token, or None for several."""
        self._mask = mask

    def take(self) -> Tensor | None:
        """Return the mask once: a projection that runs before its activation function finds none."""
        mask, self._mask = self._mask, None
        return mask


class TellingActivation(nn.Module):
    """A sparse activation function that tells which neurons of a single token are active."""

    def __init__(self, sparse: SparseActivation, neurons: ActiveNeurons) -> None:
        super().__init__()
        self.activation = sparse.activation
        self.rule = sparse.rule
        self.site = sparse.site
        self.neurons = neurons
        self.train(sparse.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``mask activation(input)``."""
        out = self.activation(input)
        if input.numel() != input.shape[-1]:
            self.neurons.put(None)
            return self.site.apply(out, self.rule)
        mask = self.rule(out)
        self.site.count(mask.view(1, 1, -1), 1)
        self.neurons.put(mask.flatten())
        return out.masked_fill(~mask, 0)


class KernelLinear(nn.Linear):
    """A sparse Linear on CUDA whose products with a single token are those of the Triton kernel.

    Holds the weight once, transposed: ``table`` [in, out]. Several tokens at a time take the dense product.
    """

    def __init__(self, linear: nn.Linear, shape: Any) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous().T, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        sparse = linear if isinstance(linear, SparseInput) else None
        self.rule: nn.Module | None = sparse.rule if sparse else None
        self.site: Site | None = sparse.site if sparse else None
        self.shape = shape
        self._product: Any = None
        self.train(linear.training)

    @property
    def product(self) -> Any:
        """The kernel on this layer's weight, which may have moved or been copied since the last call."""
        from methodbench.torchkit.kernels.sparse_gemv import SparseGEMV

        table = self.weight.detach().T
        if self._product is None or self._product.transposed.data_ptr() != table.data_ptr():
            rule = self.rule if isinstance(self.rule, Threshold) else None
            limits = {} if rule is None else {"threshold": rule.threshold, "scale": rule.scale}
            self._product = SparseGEMV(table, self.shape, self.bias, **limits)
        return self._product

    def forward(self, input: Tensor) -> Tensor:
        """Return ``W (mask input) + b`` for ``input`` [..., in]."""
        site, rule = self.site, self.rule
        single = input.numel() == self.in_features and runs_triton(input.device)
        if single and isinstance(rule, Threshold) and site is not None:
            # The kernel compares by itself. Only a count needs the mask.
            if site.counting:
                site.count(rule(input).view(1, 1, -1), 1)
        elif site is not None and rule is not None:
            input = site.apply(input, rule)
        if single:
            out: Tensor = self.product(input)
            return out
        return super().forward(input)


def _product(streamed: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not streamed:
        return lambda blocks, x, active: gather_gemv(blocks, x, active)
    code = native()
    if code is None:
        raise ValueError("columns are streamed by compiled code, and nothing here compiles it")
    return lambda blocks, x, active: code.columns(blocks[0], x, active)


@torch.no_grad()
def choose(
    weights: Sequence[Tensor],
    sparsity: float,
    *,
    rounds: int = 5,
    seed: int = 0,
    by: Literal["columns", "rows"] = "columns",
) -> Choice:
    """Return the fastest way to multiply weights of one shape and dtype with inputs of a sparsity, on a CPU.

    Args:
        weights: [out, in] each; they are gone through one after the other, so several of them, as many as the model
            has, give the honest figure.
        rounds: passes over the weights for each way; the fastest of each are compared, since what else the machine
            does only adds.
        by: what is sparse: the inputs, so that columns are read, or the outputs.
    """
    out, width = weights[0].shape
    if weights[0].dtype not in _DTYPES or not sparsity:
        return Choice(0, 1.0)
    code = native()
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(width, generator=draw).to(weights[0].dtype) for _ in weights]

    def masks() -> list[Tensor]:
        return [torch.rand(width if by == "columns" else out, generator=draw) >= sparsity for _ in weights]

    Way = tuple[int, bool]
    ways: dict[Way, Callable[[list[Tensor]], object]] = {}
    if by == "rows":
        ways[0, False] = lambda active: [F.linear(x, w) for x, w in zip(inputs, weights, strict=True)]
        if code is not None and all(weight.is_contiguous() for weight in weights):
            ways[out, True] = lambda active: [
                code.rows(w, x, m) for w, x, m in zip(weights, inputs, active, strict=True)
            ]
    else:
        ways[0, False] = lambda active: [
            F.linear(x * m, w) for x, m, w in zip(inputs, active, weights, strict=True)
        ]
        whole = [column_blocks(weight, out) for weight in weights]
        for block in dict.fromkeys((*(b for b in BLOCK_WIDTHS if out % b == 0), out)):
            tables = whole if block == out else [column_blocks(weight, block) for weight in weights]
            ways[block, False] = lambda active, tables=tables: [  # type: ignore[misc]
                gather_gemv(table, x, m) for table, x, m in zip(tables, inputs, active, strict=True)
            ]
        if code is not None:
            ways[out, True] = lambda active: [
                code.columns(table[0], x, m) for table, x, m in zip(whole, inputs, active, strict=True)
            ]
    seconds: dict[Way, list[float]] = defaultdict(list)
    for round_ in range(rounds + 1):
        for way, run in ways.items():
            active = masks()
            start = time.perf_counter()
            run(active)
            if round_:
                seconds[way].append(time.perf_counter() - start)
    return _fastest({way: min(values) for way, values in seconds.items()})


def _fastest(least: dict[tuple[int, bool], float]) -> Choice:
    others = [way for way in least if way[0]]
    if not others:
        return Choice(0, 1.0)
    block, streamed = best = min(others, key=least.__getitem__)
    gain = least[0, False] / least[best]
    return Choice(block, gain, streamed) if gain >= WORTHWHILE else Choice(0, gain)


@torch.no_grad()
def choose_launch(weights: Sequence[Tensor], sparsity: float, rounds: int = 5) -> tuple[Any, float]:
    """Return the fastest launch of the Triton kernel for weights of one shape on CUDA (None for dense), and its gain.

    Args:
        weights: [out, in] each, gone through one after the other.
        sparsity: of the inputs; every weight has a mask of its own.
    """
    from methodbench.torchkit.kernels.sparse_gemv import SHAPES, SparseGEMV

    width, device = weights[0].shape[1], weights[0].device
    if not sparsity:
        return None, 1.0
    inputs = [
        torch.randn(1, width, device=device).to(w) * (torch.rand(1, width, device=device) >= sparsity)
        for w in weights
    ]
    tables = [weight.T.contiguous() for weight in weights]

    def seconds(products: Sequence[Callable[[Tensor], Tensor]]) -> float:
        def run() -> None:
            for product, x in zip(products, inputs, strict=True):
                product(x)

        graph, taken = graph_of(run), []
        for _ in range(rounds + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    dense = seconds([functools.partial(F.linear, weight=weight) for weight in weights])
    timed = {shape: seconds([SparseGEMV(table, shape) for table in tables]) for shape in SHAPES}
    best = min(timed, key=timed.__getitem__)
    gain = dense / timed[best]
    return (best if gain >= WORTHWHILE else None), gain


def execute(model: LoadedModel, execution: str, sparsity: float, *, rounds: int = 5) -> None:
    """Let ``model`` decode by products that read less, in place, where ``execution`` is ``sparse``.

    Its facts say what came of it: ``execution`` in words, ``execution_gain`` for each kind of layer. Storage becomes
    real where at least one layer reads less: nothing is imitated then. Where none does, or for ``masked``, it stays
    as it is.

    Args:
        model: has masked inputs or neurons (:mod:`methodbench.torchkit.activation_sparsity`).
        sparsity: what inputs or neurons are expected to have.
        rounds: see :func:`choose`.
    """
    if execution == "sparse":
        model.facts |= accelerate(model, sparsity, rounds=rounds)


def accelerate(model: LoadedModel, sparsity: float, *, rounds: int = 5) -> dict[str, Any]:
    """Replace the layers of ``model`` that gain by reading less, in place.

    Layers with masked inputs, and down projections behind masked neurons, read columns; up projections beside masked
    neurons read rows.

    Args:
        sparsity: what inputs or neurons are expected to have.

    Returns:
        Facts: ``execution``, how many layers are sparse and dense and why, and ``execution_gain`` by kind of layer.
    """
    up: dict[str, str] = {}
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    layers: dict[str, nn.Linear] = {}
    for name, module in model.module.named_modules():
        if isinstance(module, SparseInput):
            layers[name] = module
            groups["columns", *_described(module)].append(name)
    if any(isinstance(module, SparseActivation) for module in model.module.modules()):
        for network in feed_forwards(model):
            if not isinstance(model.module.get_submodule(network.activation), SparseActivation):
                continue
            for name, by in ((network.down, "columns"), (network.up, "rows")):
                module = model.module.get_submodule(name) if name else None
                if isinstance(module, nn.Linear) and name not in layers:
                    layers[name] = module
                    groups[by, *_described(module)].append(name)
                    if by == "rows":
                        up[name] = network.activation
    gains: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for (by, *what), names in groups.items():
        weights = [layers[name].weight for name in names]
        kind = " ".join((by, *what))
        if weights[0].is_cuda:
            launch, gain = (None, 1.0) if by == "rows" else _launch(weights, sparsity, rounds)
            replaced = launch is not None
            for name in names if replaced else ():
                set_submodule(model.module, name, KernelLinear(layers[name], launch))
        else:
            choice = choose(weights, sparsity, rounds=rounds, by=by)
            gain, replaced = choice.gain, bool(choice.block)
            for name in names if replaced else ():
                if by == "rows":
                    _read_rows(model, up[name], name)
                else:
                    linear = GatherLinear(layers[name], choice.block, streamed=choice.streamed)
                    set_submodule(model.module, name, linear)
        gains[kind] = round(gain, 3)
        counts["sparse" if replaced else "dense"] += len(names)
    slow = [f"{kind} gains {gain:.2f}" for kind, gain in gains.items() if gain < WORTHWHILE]
    told = f"sparse: {counts['sparse']} layers, dense: {counts['dense']}"
    if slow:
        told += f" because at a sparsity of {sparsity:.2f} " + ", ".join(slow)
    if counts["sparse"]:
        model.storage = "real"
    return {
        "execution": told,
        "execution_gain": gains,
        "execution_layers": counts["sparse"],
        "execution_compiled": model.device.type == "cpu" and native() is not None,
    }


def _described(linear: nn.Linear) -> tuple[str, str]:
    shape = f"{linear.out_features}x{linear.in_features}"
    return shape, str(linear.weight.dtype).removeprefix("torch.")


def _launch(weights: Sequence[Tensor], sparsity: float, rounds: int) -> tuple[Any, float]:
    return choose_launch(weights, sparsity, rounds) if runs_triton(weights[0].device) else (None, 1.0)


def _read_rows(model: LoadedModel, activation: str, up: str) -> None:
    neurons = ActiveNeurons()
    sparse, linear = model.module.get_submodule(activation), model.module.get_submodule(up)
    assert isinstance(sparse, SparseActivation)
    assert isinstance(linear, nn.Linear)
    set_submodule(model.module, activation, TellingActivation(sparse, neurons))
    set_submodule(model.module, up, RowLinear(linear, neurons))
