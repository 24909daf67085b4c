"""Linear layers whose weights really lie in memory as packed integers.

Codes of 1 to 8 bits are packed without a gap: plane by plane, so that packing and unpacking are a few shifts
over contiguous memory. A :class:`PackedLayer` keeps codes, what its format needs to decode them, and the bias;
:meth:`PackedLayer.dequantize` gives the weight back. :class:`PackedLinear` holds integers with one scale per
group (fp16) and zero points packed at the same width, :class:`PackedFloat` floating-point codes.

A further format is a subclass that names the type of quantized weight it ``stores``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.errors import MethodbenchError, NotApplicableError
from methodbench.torchkit.floats import FloatFormat, FloatQuantized
from methodbench.torchkit.quantizers import Quantized

#: Widths that codes can be packed at.
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)

#: Widths that are packed as a low and a high part, by the width of the low part.
_LOW_PART = {5: 4, 6: 4, 7: 4}

ZeroStorage = Literal["none", "packed", "int16"]

#: Storage formats by name; filled by the subclasses of :class:`PackedLayer`.
FORMATS: dict[str, type[PackedLayer]] = {}


def packed_length(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take, in whole words (3 bytes at 3 bits)."""
    if bits in _LOW_PART:
        low = _LOW_PART[bits]
        return packed_length(count, low) + packed_length(count, bits - low)
    per_word, word = (8, 3) if bits == 3 else (8 // bits, 1)
    return -(-count // per_word) * word


def pack(codes: Tensor, bits: int, *, low: int = 0) -> Tensor:
    """Pack codes into bytes.

    The codes are cut into planes of equal length (two at 4 bits, four at 2 bits, eight at 3 and 1 bits), and
    byte ``i`` of the result combines entry ``i`` of the planes. Codes of 5, 6 and 7 bits are packed as their
    low 4 bits followed by the rest.

    Args:
        codes: integers [count] from ``low`` to ``low + 2**bits - 1``.
        bits: one of :data:`WIDTHS`.
        low: the code that is stored as 0.

    Returns:
        uint8 [:func:`packed_length`].

    Raises:
        ValueError: another width, or a code outside the range.
    """
    _check_width(bits)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) >= low + 2**bits):
        raise ValueError(f"codes of {bits} bits must lie between {low} and {low + 2**bits - 1}")
    # Bytes wrap around, so that the lowest code becomes 0 without a wider copy.
    codes = codes.to(torch.uint8, copy=True).add_(-low % 256)
    if bits == 8:
        return codes
    if bits in _LOW_PART:
        low = _LOW_PART[bits]
        return torch.cat([pack(codes & (2**low - 1), low), pack(codes >> low, bits - low)])
    planes = 8 if bits == 3 else 8 // bits
    length = -(-codes.numel() // planes)
    p = F.pad(codes, (0, length * planes - codes.numel())).view(planes, length)
    if bits == 4:
        return p[0] | (p[1] << 4)
    if bits == 2:
        return p[0] | (p[1] << 2) | (p[2] << 4) | (p[3] << 6)
    if bits == 1:
        byte = p[0].clone()
        for plane in range(1, 8):
            byte |= p[plane] << plane
        return byte
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
    if bits in _LOW_PART:
        low = _LOW_PART[bits]
        parts = packed.split([packed_length(count, low), packed_length(count, bits - low)])
        return unpack(parts[0], low, count) | (unpack(parts[1], bits - low, count) << low)
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


class PackedLayer(nn.Module):
    """``x @ W.T + bias`` with ``W`` [out, in] unpacked at every call: what all storage formats share.

    ``input_quantizer`` and ``output_quantizer``, when set, are applied to input and output. An instance made
    from :attr:`config` is empty until a state dict is loaded.
    """

    format: ClassVar[str]
    """Names the format in :attr:`config`."""
    stores: ClassVar[type]
    """The type of quantized weight that :meth:`from_quantized` takes."""

    exact: ClassVar[tuple[str, ...]] = ("scale",)
    """Floating buffers whose width was chosen for them: converting the module leaves it."""

    scale: Tensor

    done: ClassVar[str] = "quantized"
    """What happened to the weight, for messages."""

    def __init_subclass__(cls) -> None:
        # What formats share may be a class without a format.
        if "format" in vars(cls):
            FORMATS[cls.format] = cls

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: str) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.input_quantizer: nn.Module | None = None
        self.output_quantizer: nn.Module | None = None
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype), False) if bias else None
        self._dense: Tensor | None = None
        self.kernel: Callable[[Tensor], Tensor] | None = None
        """What multiplies a single token inside :func:`decoding`."""
        self.unrounded: Tensor | None = None
        """The weight that was rounded, inside :func:`keeping_unrounded`: what a correction of its error aims at."""

    @classmethod
    def from_quantized(
        cls, quantized: Any, *, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Pack a quantized weight of the type :attr:`stores`.

        Args:
            bias: [out]; kept as it is.
            dtype: of the weight that :meth:`dequantize` returns.
        """
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """JSON values: the format, and what its class is called with before a state dict can be loaded."""
        return {
            "format": self.format,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def summary(self) -> str:
        """The precision, for messages."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """Return the weight [out, in] in ``dtype``, computed in fp32."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], unpacked for the caller."""
        return self._dense if self._dense is not None else self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias`` for ``x`` [..., in]."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        kernel = self.kernel if x.dtype == self.dtype and x.numel() == self.in_features else None
        y = self.multiply(x) if kernel is None else kernel(x)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias`` from the unpacked weight, without the layer's quantizers."""
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name in self.exact}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            # The way through a narrower type would cost digits, so the values are those from before.
            moved = self.get_buffer(name)
            setattr(self, name, moved.to(buffer.dtype) if buffer.is_meta else buffer.to(moved.device))
        if self._dense is not None:
            self._dense = fn(self._dense)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.summary}"
        )

    def _set_bias(self, bias: Tensor | None) -> None:
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)


class PackedLinear(PackedLayer):
    """Integer codes: ``W = (code - zero) * scale``.

    Buffers: ``codes`` uint8 [packed bytes], ``scale`` fp16 or fp32 [rows, groups], ``zero`` uint8 [packed
    bytes] or int16 [rows, groups], ``perm`` int16 or int32 [in] (column ``j`` of the codes is input column
    ``perm[j]``). ``transposed`` layers keep the codes of the transposed weight, so that groups run along the
    outputs. ``rows`` is 1 where the whole weight shares one scale.
    """

    format = "integer"
    stores: ClassVar[type] = Quantized

    codes: Tensor
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
        transposed: bool = False,
        single: bool = False,
        scale_dtype: str = "float16",
        dtype: str = "float32",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        _check_width(bits)
        rows, columns = (in_features, out_features) if transposed else (out_features, in_features)
        _check_groups(columns, group_size)
        self.bits = bits
        self.group_size = group_size
        self.low = low
        self.zero_storage: ZeroStorage = zero
        self.transposed = transposed
        grids = (1, 1) if single else (rows, columns // group_size)
        self.register_buffer("codes", torch.zeros(packed_length(rows * columns, bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(grids, dtype=getattr(torch, scale_dtype)))
        if zero == "packed":
            bytes_ = packed_length(grids[0] * grids[1], bits)
            self.register_buffer("zero", torch.zeros(bytes_, dtype=torch.uint8))
        elif zero == "int16":
            self.register_buffer("zero", torch.zeros(grids, dtype=torch.int16))
        else:
            self.register_buffer("zero", None)
        index = torch.int16 if in_features < 2**15 else torch.int32
        self.register_buffer("perm", torch.zeros(in_features, dtype=index) if permuted else None)

    @classmethod
    def from_quantized(
        cls,
        quantized: Quantized,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        perm: Tensor | None = None,
    ) -> Self:
        """Pack a quantized weight.

        Scales are kept in fp16, or in fp32 where fp16 would lose more than its rounding (overflow,
        subnormals).

        Args:
            quantized: codes of 1 to 8 bits.
            bias: [out]; kept as it is.
            dtype: of the weight that :meth:`dequantize` returns.
            perm: integers [in]; the input column of each column of the codes; None where they agree. Not
                with transposed codes.
        """
        rows, columns = quantized.codes.shape
        zero = quantized.zero
        storage: ZeroStorage = "none"
        if zero is not None:
            on_grid = bool((zero >= 0).all()) and bool((zero < 2**quantized.bits).all())
            storage = "packed" if on_grid else "int16"
        layer = cls(
            *((rows, columns) if quantized.transposed else (columns, rows)),
            quantized.bits,
            quantized.group_size,
            low=quantized.low,
            zero=storage,
            bias=bias is not None,
            permuted=perm is not None,
            transposed=quantized.transposed,
            single=quantized.scale.numel() == 1 and rows > 1,
            scale_dtype=_scale_dtype(quantized.scale),
            dtype=str(dtype).removeprefix("torch."),
        )
        layer.codes = pack(quantized.codes.flatten(), quantized.bits, low=quantized.low)
        layer.scale = quantized.scale.to(layer.scale.dtype)
        if zero is not None:
            layer.zero = pack(zero.flatten(), quantized.bits) if storage == "packed" else zero.to(torch.int16)
        if perm is not None and layer.perm is not None:
            layer.perm = perm.to(layer.perm.dtype)
        layer._set_bias(bias)
        return layer

    @property
    def config(self) -> dict[str, Any]:
        return {
            **super().config,
            "bits": self.bits,
            "group_size": self.group_size,
            "low": self.low,
            "zero": self.zero_storage,
            "permuted": self.perm is not None,
            "transposed": self.transposed,
            "single": self.scale.numel() == 1 and self._rows > 1,
            "scale_dtype": str(self.scale.dtype).removeprefix("torch."),
        }

    @property
    def summary(self) -> str:
        return f"{self.bits} bits, groups of {self.group_size}{', symmetric' if self.zero is None else ''}"

    @property
    def _rows(self) -> int:
        return self.in_features if self.transposed else self.out_features

    def integers(self) -> Tensor:
        """Return the codes as they were packed, int16 [out, in] ([in, out] if transposed), in the order of
        the stored columns."""
        codes = unpack(self.codes, self.bits, self.out_features * self.in_features)
        return (codes.to(torch.int16) + self.low).view(self._rows, -1)

    def zero_points(self) -> Tensor | None:
        """Return the zero points, int16 of the shape of ``scale``, or None for a symmetric grid."""
        if self.zero is None or self.zero_storage == "int16":
            return self.zero
        return unpack(self.zero, self.bits, self.scale.numel()).to(torch.int16).view_as(self.scale)

    def dequantize(self) -> Tensor:
        codes = unpack(self.codes, self.bits, self.out_features * self.in_features)
        # Differences of codes of up to 4 bits fit int8, which costs a quarter of the memory traffic of fp32.
        narrow = torch.int8 if self.bits <= 4 and self.zero_storage != "int16" else torch.int16
        zero = self.zero_points()
        offset = torch.full_like(self.scale, -self.low) if zero is None else zero
        steps = codes.to(narrow).view(self._rows, -1, self.group_size) - offset.to(narrow).unsqueeze(-1)
        weight = steps.float().mul_(self.scale.float().unsqueeze(-1)).flatten(1)
        if self.transposed:
            weight = weight.T.contiguous()
        if self.perm is not None:
            weight = weight.index_select(1, torch.argsort(self.perm.int()))
        return weight.to(self.dtype)


class PackedFloat(PackedLayer):
    """Floating-point codes of 2 to 8 bits: ``W = level(code) * scale``.

    A stored code has its sign in the highest bit and the exponent and mantissa fields below it, as hardware
    formats have. Buffers: ``codes`` uint8 [packed bytes], ``scale`` fp16 or fp32 [out, groups], or [1, 1]
    where the whole weight shares one.
    """

    format = "float"
    stores = FloatQuantized

    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        number: str,
        group_size: int,
        *,
        bias: bool = False,
        single: bool = False,
        scale_dtype: str = "float16",
        dtype: str = "float32",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        _check_groups(in_features, group_size)
        self.number = FloatFormat.parse(number)
        self.group_size = group_size
        grids = (1, 1) if single else (out_features, in_features // group_size)
        length = packed_length(in_features * out_features, self.number.bits)
        self.register_buffer("codes", torch.zeros(length, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(grids, dtype=getattr(torch, scale_dtype)))

    @classmethod
    def from_quantized(
        cls, quantized: FloatQuantized, *, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Pack a quantized weight; scales as in :meth:`PackedLinear.from_quantized`.

        Args:
            bias: [out]; kept as it is.
            dtype: of the weight that :meth:`dequantize` returns.
        """
        out_features, in_features = quantized.codes.shape
        layer = cls(
            in_features,
            out_features,
            quantized.format.name,
            quantized.group_size,
            bias=bias is not None,
            single=quantized.scale.numel() == 1 and out_features > 1,
            scale_dtype=_scale_dtype(quantized.scale),
            dtype=str(dtype).removeprefix("torch."),
        )
        sign = (quantized.codes < 0).to(torch.int16) << (quantized.format.bits - 1)
        layer.codes = pack((quantized.codes.abs() + sign).flatten(), quantized.format.bits)
        layer.scale = quantized.scale.to(layer.scale.dtype)
        layer._set_bias(bias)
        return layer

    @property
    def config(self) -> dict[str, Any]:
        return {
            **super().config,
            "number": self.number.name,
            "group_size": self.group_size,
            "single": self.scale.numel() == 1 and self.out_features > 1,
            "scale_dtype": str(self.scale.dtype).removeprefix("torch."),
        }

    @property
    def summary(self) -> str:
        return f"{self.number.name}, groups of {self.group_size}"

    def integers(self) -> Tensor:
        """Return the signed codes, int16 [out, in]; see :class:`methodbench.torchkit.floats.FloatGrid`."""
        codes = unpack(self.codes, self.number.bits, self.out_features * self.in_features).to(torch.int16)
        magnitude = codes & self.number.highest
        return torch.where(codes > self.number.highest, -magnitude, magnitude).view(self.out_features, -1)

    def dequantize(self) -> Tensor:
        codes = unpack(self.codes, self.number.bits, self.out_features * self.in_features)
        levels = self.number.levels().float().to(codes.device)
        values = torch.cat([levels, -levels])[codes.int()].view(self.out_features, -1, self.group_size)
        return values.mul_(self.scale.float().unsqueeze(-1)).flatten(1).to(self.dtype)


def _check_groups(width: int, group_size: int) -> None:
    if width % group_size:
        raise NotApplicableError(
            f"a layer of {width} inputs cannot be packed in groups of {group_size}",
            "Choose a group size that divides the layer's width, or -1 for one group along the whole axis.",
        )


def _scale_dtype(scale: Tensor) -> str:
    return "float16" if _fits_half(scale) else "float32"


def _fits_half(scale: Tensor) -> bool:
    """Whether fp16 keeps every scale to its own precision of 2^-11 (twice that is allowed for)."""
    back = scale.half().float()
    return bool(torch.isfinite(back).all()) and bool(((back - scale).abs() <= scale.abs() * 2.0**-10).all())


def pack_linear(
    linear: nn.Linear, quantized: Any, *, input_quantizer: nn.Module | None = None, **options: Any
) -> PackedLayer:
    """Return the packed replacement of ``linear``: the weight ``quantized``, its own bias, dtype and mode.

    Args:
        quantized: a weight of a type that one of :data:`FORMATS` stores.
        input_quantizer: by default that of ``linear``, where it has one.
        options: passed to its :meth:`PackedLayer.from_quantized`.
    """
    bias = None if linear.bias is None else linear.bias.detach()
    kind: Any = next(kind for kind in FORMATS.values() if isinstance(quantized, kind.stores))
    layer: PackedLayer = kind.from_quantized(quantized, bias=bias, dtype=linear.weight.dtype, **options)
    layer.input_quantizer = input_quantizer or getattr(linear, "input_quantizer", None)
    if _keeping_unrounded.get():
        layer.unrounded = linear.weight.detach()
    return layer.train(linear.training)


_keeping_unrounded: ContextVar[bool] = ContextVar("keeping_unrounded", default=False)


@contextmanager
def keeping_unrounded() -> Iterator[None]:
    """Let :func:`pack_linear` leave the weight that was rounded, scaled and clipped as it was, with its layer."""
    token = _keeping_unrounded.set(True)
    try:
        yield
    finally:
        _keeping_unrounded.reset(token)


def dense_linear(module: nn.Module, name: str) -> nn.Linear:
    """Return ``module``, checked to be a Linear that has not been compressed.

    Raises:
        NotApplicableError: ``module`` is packed already, or is no Linear; names the layer.
    """
    if isinstance(module, PackedLayer):
        raise NotApplicableError(
            f"layer {name} is {module.done} already ({module.summary})", "Start from the dense model."
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
    held = [layer for layer in packed_layers(module).values() if not layer.materialized]
    try:
        for layer in held:
            layer.materialize()
        yield module
    finally:
        for layer in held:
            layer.release()


@contextmanager
def decoding(module: nn.Module) -> Iterator[dict[str, str]]:
    """Let the packed layers of ``module`` multiply single tokens by the kernels that are fastest here.

    Which these are is measured on entry, on the device and in the dtype that the layers are in. Inputs of more than
    one row are multiplied as ever. Kernels round differently from each other, so results repeat to the precision of
    the dtype only: a comparison of quality uses :func:`materialized`.

    Yields:
        What each layer uses, by dotted name; layers that unpack their weights are left out.
    """
    from methodbench.torchkit.kernels.packed import choose

    layers = packed_layers(module)
    kernels = choose(layers)
    try:
        for name, kernel in kernels.items():
            layers[name].kernel = kernel
        yield {name: kernel.name for name, kernel in kernels.items()}
    finally:
        for name in kernels:
            layers[name].kernel = None


def rebuild(module: nn.Module, configs: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Put empty packed layers in place of the Linears named in ``configs``, ready for a state dict.

    Args:
        configs: dotted name to :attr:`PackedLayer.config`; see :func:`packed_configs`.

    Raises:
        MethodbenchError: ``module`` has no submodule of that name, or a format is not known.
    """
    # A format is known once its module is imported.
    from methodbench.torchkit import binary_coded, compressed, power_map  # noqa: F401

    for name, config in configs.items():
        parent, _, leaf = name.rpartition(".")
        arguments = dict(config)
        kind = FORMATS.get(arguments.pop("format"))
        if kind is None:
            raise MethodbenchError(
                f"layer {name} is stored as {config['format']}; known formats: {', '.join(FORMATS)}"
            )
        try:
            setattr(module.get_submodule(parent), leaf, kind(**arguments))
        except AttributeError as error:
            raise MethodbenchError(
                f"the module has no layer {name}, which was packed when it was saved"
            ) from error
    return module


def packed_configs(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the configuration of every packed layer of ``module`` by dotted name."""
    return {name: layer.config for name, layer in packed_layers(module).items()}


def packed_layers(module: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of ``module`` by dotted name; parts of a packed layer are none."""
    found: dict[str, PackedLayer] = {}
    outer = None
    for name, layer in module.named_modules():
        # A layer's parts follow it directly.
        if isinstance(layer, PackedLayer) and (outer is None or not name.startswith(outer)):
            found[name], outer = layer, f"{name}." if name else ""
    return found
