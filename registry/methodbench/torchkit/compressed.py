"""Linear layers whose pruned weights are stored without their zeros, and lose nothing else.

With ``d`` bits in a value (16 for bfloat16), sparsity ``s``, and bytes measured by
:mod:`methodbench.torchkit.size`, a weight takes

=============  =======================================  ===========================  ======================
format         values                                   places                       bits per weight
=============  =======================================  ===========================  ======================
``bitmask``    those that are not zero, row after row   one bit for every weight     ``d (1 - s) + 1``
``nm``         M - N of every M consecutive inputs      ``b = ceil(log2 M)`` bits    ``(M - N)(d + b) / M``
                                                        for every value
=============  =======================================  ===========================  ======================

At 50 % in bfloat16 both take 9 bits (``nm`` at 2:4), in float32 17; at 4:8 ``nm`` takes 9.5. The bitmask pays while
``s > 1 / d``. Where a row begins among the values follows from the bits before it, so it is not stored.

Only ``+0.0`` is left out: ``-0.0`` and NaN are values, and the dense weight comes back bit for bit. The product is that
of the restored weight, with the same result as the dense layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import LoadedModel, set_submodule
from methodbench.torchkit.packed import PackedLayer, pack, pack_linear, packed_layers, packed_length, unpack
from methodbench.torchkit.size import bits_per_weight

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

WeightFormat = Literal["dense", "bitmask", "nm"]


@dataclass(frozen=True, slots=True)
class Masked:
    """A weight [out, in] with zeros anywhere."""

    weight: Tensor


@dataclass(frozen=True, slots=True)
class MaskedGroups:
    """A weight [out, in] with at least ``zeros`` zeros in every ``group`` consecutive inputs of a row."""

    weight: Tensor
    zeros: int
    group: int


def is_value(weight: Tensor) -> Tensor:
    """Return True where ``weight`` is anything but ``+0.0``."""
    return (weight != 0) | weight.signbit()


class CompressedLayer(PackedLayer):
    """What both formats share: buffer ``values`` in the dtype of the weight, converted with the module."""

    exact: ClassVar[tuple[str, ...]] = ()
    done = "compressed"

    values: Tensor

    def restore(self) -> Tensor:
        """Return the dense weight [out, in] in the dtype of ``values``, bit for bit the one that was stored."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        return self.restore().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = self.values.dtype
        return self


class BitmaskLinear(CompressedLayer):
    """Values that are not zero, and a bit for every weight.

    Buffers: ``values`` [kept], row after row; ``mask`` uint8 [ceil(out * in / 8)], in the order of
    :func:`methodbench.torchkit.packed.pack`.
    """

    format = "bitmask"
    stores = Masked

    mask: Tensor

    def __init__(
        self, in_features: int, out_features: int, kept: int, *, bias: bool = False, dtype: str = "float32"
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.register_buffer("values", torch.zeros(kept, dtype=self.dtype))
        self.register_buffer(
            "mask", torch.zeros(packed_length(out_features * in_features, 1), dtype=torch.uint8)
        )

    @classmethod
    def from_quantized(
        cls, quantized: Masked, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Store a pruned weight; ``dtype`` is that of the weight unless given, ``bias`` [out] is kept as it is."""
        weight = quantized.weight.to(dtype or quantized.weight.dtype)
        kept = is_value(weight)
        values = weight[kept]
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, values.numel(), bias=bias is not None, dtype=_name(weight.dtype)
        )
        layer.values = values
        layer.mask = pack(kept.flatten(), 1)
        layer._set_bias(bias)
        return layer

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "kept": self.values.numel()}

    @property
    def summary(self) -> str:
        share = self.values.numel() / max(1, self.in_features * self.out_features)
        return f"pruned, {share:.0%} of the weights behind a bitmask"

    def restore(self) -> Tensor:
        count = self.out_features * self.in_features
        weight = self.values.new_zeros(count)
        weight.masked_scatter_(unpack(self.mask, 1, count).bool(), self.values)
        return weight.view(self.out_features, self.in_features)


class NMLinear(CompressedLayer):
    """``group - zeros`` values of every ``group`` consecutive inputs, and the place of each in its group.

    Buffers: ``values`` [out, in / group, group - zeros], in the order of the inputs; ``places`` uint8, packed
    integers below ``group`` in the order of the values. A group with more zeros than it must have fills up with some
    of them.
    """

    format = "nm"
    stores = MaskedGroups

    places: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        zeros: int,
        group: int,
        *,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        _check_nm(in_features, zeros, group)
        self.zeros = zeros
        self.group = group
        shape = (out_features, in_features // group, group - zeros)
        length = packed_length(out_features * in_features // group * (group - zeros), self.place_bits)
        self.register_buffer("values", torch.zeros(shape, dtype=self.dtype))
        self.register_buffer("places", torch.zeros(length, dtype=torch.uint8))
        self._structured: StructuredWeight | None = None

    @classmethod
    def from_quantized(
        cls, quantized: MaskedGroups, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Store a pruned weight; ``dtype`` is that of the weight unless given, ``bias`` [out] is kept as it is.

        Raises:
            NotApplicableError: the inputs do not divide into groups, or a group holds too many values.
        """
        weight, zeros, group = quantized.weight, quantized.zeros, quantized.group
        weight = weight.to(dtype or weight.dtype)
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, zeros, group, bias=bias is not None, dtype=_name(weight.dtype))
        groups = weight.reshape(out_features, -1, group)
        kept = is_value(groups)
        over = (kept.sum(-1) > group - zeros).nonzero()
        if len(over):
            row, index = over[0].tolist()
            raise NotApplicableError(
                f"the weight is not {zeros}:{group}: {len(over)} groups keep more than {group - zeros} of {group} "
                f"inputs (the first: row {row}, inputs {index * group} to {(index + 1) * group - 1})",
                "Store it as a bitmask, or prune it in that pattern.",
            )
        # Values come first, zeros that fill up next, each in the order of the inputs; then all by input.
        places = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices[..., : group - zeros]
        places = places.sort(dim=-1).values
        layer.values = _bits(groups).gather(-1, places).view(weight.dtype)
        layer.places = pack(places.flatten(), layer.place_bits)
        layer._set_bias(bias)
        return layer

    @property
    def place_bits(self) -> int:
        """Bits of a place: ``ceil(log2(group))``."""
        return (self.group - 1).bit_length()

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "zeros": self.zeros, "group": self.group}

    @property
    def summary(self) -> str:
        return f"pruned {self.zeros}:{self.group}"

    def restore(self) -> Tensor:
        places = unpack(self.places, self.place_bits, self.values.numel()).view_as(self.values)
        bits = _bits(self.values)
        weight = bits.new_zeros(*bits.shape[:2], self.group).scatter_(-1, places.long(), bits)
        return weight.view(self.values.dtype).view(self.out_features, self.in_features)

    def multiply(self, x: Tensor) -> Tensor:
        if self._structured is None or x.dtype != self.dtype:
            return super().multiply(x)
        return self._structured.multiply(x, self.bias)

    def structured(self) -> StructuredWeight:
        """Return the weight in the form of the tensor cores; see :attr:`fits_tensor_cores`."""
        return StructuredWeight(self.dequantize())

    @property
    def fits_tensor_cores(self) -> bool:
        """Whether a GPU's product with 2:4 sparse weights takes this layer where it lies."""
        return (
            self.values.is_cuda
            and torch.backends.cusparselt.is_available()
            and self.dtype in (torch.float16, torch.bfloat16)
            and (self.zeros, self.group) == (2, 4)
            and self.out_features % 32 == 0
            and self.in_features % 64 == 0
        )


class StructuredWeight:
    """A 2:4 weight in the form of cuSPARSELt, whose products run on the tensor cores: 9 bits per weight at 16 bits.

    The library has several algorithms for a product, and its own choice is often slower than the dense product, so the
    fastest is searched for, once for every shape. A search cannot be captured in a CUDA graph: call once before.

    Args:
        weight: dense [out, in] on CUDA, in 16 bits.
    """

    _algorithms: ClassVar[dict[tuple[Any, ...], int]] = {}
    #: Rows are filled up to a multiple of this.
    ROWS = 16

    def __init__(self, weight: Tensor) -> None:
        self.packed = torch._cslt_compress(weight)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias`` for ``x`` [..., in]."""
        flat = x.reshape(-1, x.shape[-1])
        rows = len(flat)
        if not rows:
            return x.new_empty(*x.shape[:-1], self.packed.shape[0])
        flat = F.pad(flat, (0, 0, 0, -rows % self.ROWS))
        key = (self.packed.device, self.packed.dtype, *self.packed.shape, *flat.shape)
        if key not in self._algorithms:
            self._algorithms[key] = torch._cslt_sparse_mm_search(self.packed, flat.t())
        y = torch._cslt_sparse_mm(self.packed, flat.t(), bias=bias, alg_id=self._algorithms[key])
        return y.t()[:rows].unflatten(0, x.shape[:-1])


@contextmanager
def semi_structured(module: nn.Module) -> Iterator[list[str]]:
    """Let the 2:4 layers of ``module`` multiply on the tensor cores of CUDA (:class:`StructuredWeight`).

    The kernels round differently from the dense product, so results agree to the precision of the dtype only, and a
    comparison of quality leaves them out. Their own form of the weight (9 bits per weight at 16 bits) is held in memory
    beside the stored one until the end.

    Yields:
        The names of the layers that do; empty without CUDA, in float32, and in other patterns.
    """
    found = {
        name: layer
        for name, layer in packed_layers(module).items()
        if isinstance(layer, NMLinear) and layer.fits_tensor_cores
    }
    try:
        for layer in found.values():
            layer._structured = layer.structured()
        yield list(found)
    finally:
        for layer in found.values():
            layer._structured = None


def store_pruned(
    model: LoadedModel, weights: WeightFormat, pattern: tuple[int, int] | None = None
) -> LoadedModel:
    """Put the pruned layers of the blocks of ``model`` in the format ``weights``, in place, and return it.

    Args:
        model: a clone, pruned.
        weights: ``dense`` leaves everything as it is.
        pattern: (zeros, group) of ``nm``.

    Raises:
        NotApplicableError: a layer is no Linear, or is not in the pattern; names the layer.
    """
    if weights == "dense":
        return model
    stored: dict[int, PackedLayer] = {}
    for name, layer in model.adapter.targets(model.module).items():
        if not isinstance(layer, nn.Linear):
            raise NotApplicableError(
                f"layer {name} is a {type(layer).__name__}, and only the weights of Linears are stored compressed",
                "Keep weights=dense for this model.",
            )
        if id(layer) not in stored:
            weight = layer.weight.detach()
            masked: Any = Masked(weight)
            if weights == "nm":
                if pattern is None:
                    raise ValueError("weights nm needs a pattern")
                masked = MaskedGroups(weight, *pattern)
            try:
                stored[id(layer)] = pack_linear(layer, masked)
            except NotApplicableError as error:
                raise NotApplicableError(f"layer {name}: {error.message}", error.hint) from error
        set_submodule(model.module, name, stored[id(layer)])
    model.storage = "real"
    model.accounted_bits = bits_per_weight(model)
    return model


def _check_nm(columns: int, zeros: int, group: int) -> None:
    if not 0 < zeros < group <= 256:
        raise NotApplicableError(
            f"{zeros}:{group} is no pattern that can be stored: 0 < zeros < group <= 256"
        )
    if columns % group:
        raise NotApplicableError(
            f"a layer of {columns} inputs does not divide into groups of {group} ({zeros}:{group})",
            "Choose a group size that divides the layer's width, or store it as a bitmask.",
        )


def _bits(values: Tensor) -> Tensor:
    """Return ``values`` as integers of their width: gathering 16-bit numbers may change which NaN they are."""
    return values.view(_INTEGERS[values.element_size()])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
