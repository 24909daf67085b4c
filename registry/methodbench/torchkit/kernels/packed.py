"""Which kernel multiplies one token with a packed layer fastest, found by measurement.

Candidates are torch's int4 and int8 products, where they take the format and the precision, and the Triton kernel of
:mod:`methodbench.torchkit.kernels.packed_gemv` in several shapes; for weights pruned 2:4 the tensor cores' product and
the kernel of :mod:`methodbench.torchkit.kernels.nm_gemv`. Unpacking the weight and multiplying is what they
have to beat. Layers of one shape and format are measured together, in turn, so that weights come from memory and not
from a cache. Kernels round differently: results agree to the precision of their dtype, not bit by bit.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from methodbench.torchkit.compressed import NMLinear
from methodbench.torchkit.kernels import graph_of, runs_triton
from methodbench.torchkit.packed import PackedLayer, PackedLinear
from methodbench.torchkit.size import tensor_bytes

#: Bytes of packed weights after which a cache has forgotten the first of them, and the most layers measured for it.
_ROUND_BYTES, _ROUND_LAYERS = 128 << 20, 32
#: Seconds that a candidate is measured for, and the rounds of it that are worth a median.
_SECONDS, _ROUNDS = 0.02, 5

#: Group sizes of torch's int4 product.
_INT4_GROUPS = (256, 128, 64, 32)


class Kernel(Protocol):
    """The product of one row with a packed layer."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias`` [..., out] for ``x`` [..., in] of the layer's dtype, with a single row."""
        ...


#: How to make the kernel of a layer whose format it takes.
Make = Callable[[Any], Kernel]


class Int4Product:
    """torch's product with 4-bit integers, which keeps a copy of the codes in an order of its own.

    Scales and offsets are kept in the layer's dtype.
    """

    name = "torch int4"

    def __init__(self, layer: PackedLinear) -> None:
        device = layer.codes.device
        codes = layer.integers() - layer.low
        zero = layer.zero_points()
        offset = torch.full_like(layer.scale, -layer.low) if zero is None else zero
        self.group = next(size for size in _INT4_GROUPS if layer.group_size % size == 0)
        # The product takes 8 off every code. Narrower codes are centred on it first, so that offsets stay small.
        middle = 2 ** (layer.bits - 1)
        codes = codes + (8 - middle)
        scale = layer.scale.float()
        both = torch.stack([scale, (middle - offset.float()) * scale], -1)
        both = both.repeat_interleave(layer.group_size // self.group, 1)
        self.scales = both.transpose(0, 1).to(layer.dtype).contiguous()
        self.perm = None if layer.perm is None else layer.perm.int()
        self.bias = layer.bias
        self.width = layer.in_features
        if device.type == "cuda":
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self.codes = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
            self.product = torch.ops.aten._weight_int4pack_mm
        else:
            self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            self.product = torch.ops.aten._weight_int4pack_mm_for_cpu

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, self.width)
        if self.perm is not None:
            flat = flat.index_select(1, self.perm)
        y: Tensor = self.product(flat, self.codes, self.group, self.scales)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    @staticmethod
    def fits(layer: PackedLinear) -> bool:
        """Whether torch has the product for this layer: in bfloat16 and for the widths that its tiles divide."""
        tiles = {"cuda": (8, 128), "cpu": (16, 2)}.get(layer.codes.device.type)
        return (
            tiles is not None
            and layer.bits <= 4
            and layer.dtype is torch.bfloat16
            and not layer.transposed
            and layer.scale.shape[0] == layer.out_features
            and any(layer.group_size % size == 0 for size in _INT4_GROUPS)
            and layer.out_features % tiles[0] == 0
            and layer.in_features % tiles[1] == 0
        )


class Int8Product:
    """torch's product with symmetric 8-bit integers and one scale per output; zero points add a multiple of the
    row's sum."""

    name = "torch int8"

    def __init__(self, layer: PackedLinear) -> None:
        codes = layer.integers() - layer.low
        zero = layer.zero_points()
        offset = torch.full_like(layer.scale, -layer.low) if zero is None else zero
        self.codes = (codes - 128).to(torch.int8)
        self.scale = layer.scale.flatten().to(layer.dtype)
        shift = (128 - offset.float()).flatten() * layer.scale.float().flatten()
        self.shift = shift.to(layer.dtype) if bool(shift.any()) else None
        self.perm = None if layer.perm is None else layer.perm.int()
        self.bias = layer.bias
        self.width = layer.in_features

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, self.width)
        if self.perm is not None:
            flat = flat.index_select(1, self.perm)
        y = torch._weight_int8pack_mm(flat, self.codes, self.scale)
        if self.shift is not None:
            y = torch.addcmul(y, flat.sum(-1, keepdim=True), self.shift)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    @staticmethod
    def fits(layer: PackedLinear) -> bool:
        """Whether torch has a fast product for this layer: in bfloat16 on a CPU, one scale per output."""
        return (
            layer.bits == 8
            and layer.codes.device.type == "cpu"
            and layer.dtype is torch.bfloat16
            and not layer.transposed
            and layer.scale.shape == (layer.out_features, 1)
            and layer.in_features % 16 == 0
            and layer.out_features % 16 == 0
        )


class StructuredProduct:
    """The tensor cores' product with a weight pruned 2:4, which keeps a copy of it in their own order."""

    name = "tensor cores 2:4"

    def __init__(self, layer: NMLinear) -> None:
        self.weight = layer.structured()
        self.bias = layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight.multiply(x, self.bias)


def candidates(layer: PackedLayer) -> Iterator[Make]:
    """Yield how to make each kernel that takes the format of ``layer`` on its device."""
    if isinstance(layer, NMLinear):
        if layer.fits_tensor_cores:
            yield StructuredProduct
        if runs_triton(layer.values.device):
            from methodbench.torchkit.kernels import nm_gemv

            if nm_gemv.fits(layer):
                for cut in nm_gemv.SHAPES:
                    yield functools.partial(nm_gemv.NMGEMV, shape=cut)
        return
    # A subclass decodes its codes in a way of its own.
    if type(layer) is not PackedLinear:
        return
    for kind in (Int4Product, Int8Product):
        if kind.fits(layer):
            yield kind
    if runs_triton(layer.codes.device):
        from methodbench.torchkit.kernels import packed_gemv

        if packed_gemv.fits(layer):
            for shape in packed_gemv.SHAPES:
                yield functools.partial(packed_gemv.PackedGEMV, shape=shape)


def choose(layers: Mapping[str, PackedLayer]) -> dict[str, Kernel]:
    """Return the fastest kernel of every layer for which one is faster than unpacking and multiplying.

    Args:
        layers: by name, each on the device and in the dtype that it will be used in.
    """
    alike: dict[str, dict[str, PackedLayer]] = {}
    for name, layer in layers.items():
        kind = {**layer.config, "device": str(next(layer.buffers()).device)}
        alike.setdefault(json.dumps(kind, sort_keys=True), {})[name] = layer
    found: dict[str, Kernel] = {}
    for group in alike.values():
        make = _fastest(list(group.values()))
        if make is not None:
            found |= {name: make(layer) for name, layer in group.items()}
    return found


@torch.no_grad()
def _fastest(layers: Sequence[PackedLayer]) -> Make | None:
    first = layers[0]
    makes = list(candidates(first))
    if not makes:
        return None
    measured = layers[: max(1, min(_ROUND_LAYERS, _ROUND_BYTES // tensor_bytes(first) + 1))]
    x = torch.randn(1, first.in_features, dtype=first.dtype, device=next(first.buffers()).device)
    least, best = _seconds([layer.multiply for layer in measured], x), None
    for make in makes:
        seconds = _seconds([make(layer) for layer in measured], x)
        if seconds < least:
            least, best = seconds, make
    return best


def _seconds(products: Sequence[Callable[[Tensor], Any]], x: Tensor) -> float:
    """Return the median seconds of a round through ``products``, each called with ``x``; on CUDA without launches."""

    def step() -> None:
        for product in products:
            product(x)

    if x.is_cuda:
        graph = graph_of(step, warm_up=1)
        run, wait = graph.replay, _wait_for_gpu
    else:
        run, wait = step, _wait_for_nothing
        run()
    times: list[float] = []
    spent = 0.0
    while spent < _SECONDS or len(times) < _ROUNDS:
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
        spent += times[-1]
    return statistics.median(times)


def _wait_for_gpu() -> None:
    torch.cuda.synchronize()


def _wait_for_nothing() -> None:
    """A CPU has done its work when a call returns."""
