"""Linear layers whose weights really lie in memory as packed integers.

Codes of 2, 3, 4 or 8 bits are packed without a gap: plane by plane, so that packing and unpacking are a few
shifts over contiguous memory. A layer keeps its codes, one scale per group (fp16), zero points packed at the
same width, and the bias; :meth:`PackedLinear.dequantize` gives the weight back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.errors import MethodbenchError, NotApplicableError
from methodbench.torchkit.quantizers import Quantized

#: Widths that codes can be packed at.
WIDTHS = (2, 3, 4, 8)

ZeroStorage = Literal["none", "packed", "int16"]


class PackedConfig(TypedDict):
    """Arguments of :class:`PackedLinear`, as JSON values: with a state dict, all that a layer is."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    low: int
    zero: ZeroStorage
    bias: bool
    permuted: bool
    scale_dtype: str
    dtype: str


def packed_length(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take, in whole words (3 bytes at 3 bits)."""
    per_word, word = (8, 3) if bits == 3 else (8 // bits, 1)
    return -(-count // per_word) * word


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    The codes are cut into planes of equal length (two at 4 bits, four at 2 bits, eight at 3 bits), and byte
    ``i`` of the result combines entry ``i`` of the planes.

    Args:
        codes: integers [count] from 0 to ``2**bits - 1``.
        bits: one of :data:`WIDTHS`.

    Returns:
        uint8 [:func:`packed_length`].

    Raises:
        ValueError: another width, or a code outside the range.
    """
    _check_width(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes of {bits} bits must lie between 0 and {2**bits - 1}")
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.clone()
    planes = 8 if bits == 3 else 8 // bits
    length = -(-codes.numel() // planes)
    p = F.pad(codes, (0, length * planes - codes.numel())).view(planes, length)
    if bits == 4:
        return p[0] | (p[1] << 4)
    if bits == 2:
        return p[0] | (p[1] << 2) | (p[2] << 4) | (p[3] << 6)
    # Three bytes hold two whole codes each; the last two codes fill the bits that are left over.
    first = p[0] | (p[1] << 3) | ((p[6] & 3) << 6)
    second = p[2] | (p[3] << 3) | ((p[7] & 3) << 6)
    third = p[4] | (p[5] << 3) | ((p[6] >> 2) << 6) | ((p[7] >> 2) << 7)
    return torch.cat([first, second, third])


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes in ``packed`` (uint8, from :func:`pack`) as uint8 [count]."""
    _check_width(bits)
    if bits == 8:
        return packed[:count]
    if bits == 3:
        words = packed.view(3, -1)
        codes = torch.empty(8, words.shape[1], dtype=torch.uint8, device=packed.device)
        for byte in range(3):
            torch.bitwise_and(words[byte], 7, out=codes[2 * byte])
            torch.bitwise_and(words[byte] >> 3, 7, out=codes[2 * byte + 1])
        torch.bitwise_or(words[0] >> 6, (words[2] >> 4) & 4, out=codes[6])
        torch.bitwise_or(words[1] >> 6, (words[2] >> 5) & 4, out=codes[7])
    else:
        planes, mask = 8 // bits, 2**bits - 1
        codes = torch.empty(planes, packed.numel(), dtype=torch.uint8, device=packed.device)
        torch.bitwise_and(packed, mask, out=codes[0])
        for plane in range(1, planes):
            torch.bitwise_right_shift(packed, bits * plane, out=codes[plane])
            if plane < planes - 1:
                codes[plane].bitwise_and_(mask)
    return codes.view(-1)[:count]


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits cannot be packed; widths: {', '.join(map(str, WIDTHS))}")


class PackedLinear(nn.Module):
    """``x @ W.T + bias`` with ``W = (code - zero) * scale`` unpacked at every call.

    Buffers: ``codes`` uint8 [packed bytes], ``scale`` fp16 or fp32 [out, groups], ``zero`` uint8 [packed
    bytes] or int16 [out, groups], ``perm`` int16 or int32 [in] (column ``j`` of the codes is input column
    ``perm[j]``). ``input_quantizer``, when set, is applied to the input.

    An instance made from :attr:`config` is empty until a state dict is loaded.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    perm: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        *,
        low: int = 0,
        zero: ZeroStorage = "packed",
        bias: bool = False,
        permuted: bool = False,
        scale_dtype: str = "float16",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        _check_width(bits)
        if in_features % group_size:
            raise NotApplicableError(
                f"a layer of {in_features} inputs cannot be packed in groups of {group_size}",
                "Choose a group size that divides the layer's width, or -1 for one group per output channel.",
            )
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.low = low
        self.zero_storage: ZeroStorage = zero
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.input_quantizer: nn.Module | None = None
        groups = in_features // group_size
        count = in_features * out_features
        self.register_buffer("codes", torch.zeros(packed_length(count, bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(out_features, groups, dtype=getattr(torch, scale_dtype)))
        if zero == "packed":
            bytes_ = packed_length(out_features * groups, bits)
            self.register_buffer("zero", torch.zeros(bytes_, dtype=torch.uint8))
        elif zero == "int16":
            self.register_buffer("zero", torch.zeros(out_features, groups, dtype=torch.int16))
        else:
            self.register_buffer("zero", None)
        index = torch.int16 if in_features < 2**15 else torch.int32
        self.register_buffer("perm", torch.zeros(in_features, dtype=index) if permuted else None)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype), False) if bias else None
        self._dense: Tensor | None = None

    @classmethod
    def from_quantized(
        cls,
        quantized: Quantized,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        perm: Tensor | None = None,
    ) -> PackedLinear:
        """Pack a quantized weight.

        Scales are kept in fp16, or in fp32 where fp16 would lose more than its rounding (overflow,
        subnormals).

        Args:
            quantized: codes [out, in] of 2, 3, 4 or 8 bits.
            bias: [out]; kept as it is.
            dtype: of the weight that :meth:`dequantize` returns.
            perm: integers [in]; the input column of each column of the codes; None where they agree.
        """
        out_features, in_features = quantized.codes.shape
        zero = quantized.zero
        storage: ZeroStorage = "none"
        if zero is not None:
            on_grid = bool((zero >= 0).all()) and bool((zero < 2**quantized.bits).all())
            storage = "packed" if on_grid else "int16"
        layer = cls(
            in_features,
            out_features,
            quantized.bits,
            quantized.group_size,
            low=quantized.low,
            zero=storage,
            bias=bias is not None,
            permuted=perm is not None,
            scale_dtype="float16" if _fits_half(quantized.scale) else "float32",
            dtype=str(dtype).removeprefix("torch."),
        )
        layer.codes = pack((quantized.codes - quantized.low).flatten(), quantized.bits)
        layer.scale = quantized.scale.to(layer.scale.dtype)
        if zero is not None:
            layer.zero = pack(zero.flatten(), quantized.bits) if storage == "packed" else zero.to(torch.int16)
        if perm is not None and layer.perm is not None:
            layer.perm = perm.to(layer.perm.dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def config(self) -> PackedConfig:
        """What :class:`PackedLinear` must be called with before this layer's state dict can be loaded."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group_size": self.group_size,
            "low": self.low,
            "zero": self.zero_storage,
            "bias": self.bias is not None,
            "permuted": self.perm is not None,
            "scale_dtype": str(self.scale.dtype).removeprefix("torch."),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], unpacked for the caller."""
        return self._dense if self._dense is not None else self.dequantize()

    def integers(self) -> Tensor:
        """Return the codes as they were packed, int16 [out, in], in the order of the stored columns."""
        codes = unpack(self.codes, self.bits, self.out_features * self.in_features)
        return (codes.to(torch.int16) + self.low).view(self.out_features, self.in_features)

    def zero_points(self) -> Tensor | None:
        """Return the zero points, int16 [out, groups], or None for a symmetric grid."""
        if self.zero is None or self.zero_storage == "int16":
            return self.zero
        return unpack(self.zero, self.bits, self.scale.numel()).to(torch.int16).view_as(self.scale)

    def dequantize(self) -> Tensor:
        """Return the weight [out, in] in ``dtype``, computed in fp32."""
        codes = unpack(self.codes, self.bits, self.out_features * self.in_features)
        # Differences of codes of up to 4 bits fit int8, which costs a quarter of the memory traffic of fp32.
        narrow = torch.int8 if self.bits <= 4 and self.zero_storage != "int16" else torch.int16
        zero = self.zero_points()
        offset = torch.full_like(self.scale, -self.low) if zero is None else zero
        steps = codes.to(narrow).view(self.out_features, -1, self.group_size) - offset.to(narrow).unsqueeze(
            -1
        )
        weight = steps.float().mul_(self.scale.float().unsqueeze(-1)).flatten(1)
        if self.perm is not None:
            weight = weight.index_select(1, torch.argsort(self.perm.int()))
        return weight.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias`` for ``x`` [..., in]."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def materialize(self) -> None:
        """Keep the dense weight in memory, outside of the state dict, until :meth:`release`."""
        self._dense = self.dequantize()

    def release(self) -> None:
        """Drop the dense weight."""
        self._dense = None

    @property
    def materialized(self) -> bool:
        """Whether the dense weight is kept."""
        return self._dense is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        half = self.scale.dtype
        super()._apply(fn, recurse)
        # `module.half()` converts floating buffers; scales keep the width that was chosen for them.
        self.scale = self.scale.to(half)
        if self._dense is not None:
            self._dense = fn(self._dense)
        return self

    def extra_repr(self) -> str:
        symmetric = ", symmetric" if self.zero is None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}{symmetric}"
        )


def _fits_half(scale: Tensor) -> bool:
    """Whether fp16 keeps every scale to its own precision of 2^-11 (twice that is allowed for)."""
    back = scale.half().float()
    return bool(torch.isfinite(back).all()) and bool(((back - scale).abs() <= scale.abs() * 2.0**-10).all())


def pack_linear(
    linear: nn.Linear,
    quantized: Quantized,
    *,
    perm: Tensor | None = None,
    input_quantizer: nn.Module | None = None,
) -> PackedLinear:
    """Return the packed replacement of ``linear``: the weight ``quantized``, its own bias, dtype and mode."""
    bias = None if linear.bias is None else linear.bias.detach()
    layer = PackedLinear.from_quantized(quantized, bias=bias, dtype=linear.weight.dtype, perm=perm)
    layer.input_quantizer = input_quantizer
    return layer.train(linear.training)


def dense_linear(module: nn.Module, name: str) -> nn.Linear:
    """Return ``module``, checked to be a Linear that has not been compressed.

    Raises:
        NotApplicableError: ``module`` is packed already, or is no Linear; names the layer.
    """
    if isinstance(module, PackedLinear):
        raise NotApplicableError(
            f"layer {name} is quantized already ({module.bits} bits)", "Start from the dense model."
        )
    if not isinstance(module, nn.Linear):
        raise NotApplicableError(f"layer {name} is a {type(module).__name__}, not a Linear")
    return module


@contextmanager
def materialized(module: nn.Module) -> Iterator[nn.Module]:
    """Hold dense weights in every packed layer of ``module`` for the time of an evaluation.

    The layers compute from the very weights that they would unpack at every call, so outputs are the same bit
    for bit; the state dict does not change. May be nested.
    """
    held = [m for m in module.modules() if isinstance(m, PackedLinear) and not m.materialized]
    try:
        for layer in held:
            layer.materialize()
        yield module
    finally:
        for layer in held:
            layer.release()


def rebuild(module: nn.Module, configs: dict[str, Any]) -> nn.Module:
    """Put empty packed layers in place of the Linears named in ``configs``, ready for a state dict.

    Args:
        configs: dotted name to :attr:`PackedLinear.config`; see :func:`packed_configs`.

    Raises:
        MethodbenchError: ``module`` has no submodule of that name.
    """
    for name, config in configs.items():
        parent, _, leaf = name.rpartition(".")
        try:
            setattr(module.get_submodule(parent), leaf, PackedLinear(**config))
        except AttributeError as error:
            raise MethodbenchError(
                f"the module has no layer {name}, which was packed when it was saved"
            ) from error
    return module


def packed_configs(module: nn.Module) -> dict[str, PackedConfig]:
    """Return the configuration of every packed layer of ``module`` by dotted name."""
    return {name: m.config for name, m in module.named_modules() if isinstance(m, PackedLinear)}
