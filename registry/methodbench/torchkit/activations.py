"""Quantization of what flows through a model at run time: inputs of layers, and keys and values of attention.

Quantizers are modules that map a tensor to a tensor of the same shape. :func:`quantize_inputs` puts them in front
of the layers of the blocks, packed or dense, and :func:`quantize_cache` at the place where keys and values enter
attention, after the rotary embedding, where a key-value cache keeps them. What they give is rounded but stored
in the model's own precision.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.torchkit.attention import transform_operands
from methodbench.torchkit.floats import FloatFormat, FloatGrid, fake_quantize_float
from methodbench.torchkit.model import LoadedModel, set_submodule
from methodbench.torchkit.packed import PackedLayer, dense_linear
from methodbench.torchkit.quantizers import Convention, Granularity, UniformGrid, fake_quantize


class ActivationQuantizer(nn.Module):
    """Rounds to integer grids found at run time; holds no tensors."""

    def __init__(
        self,
        bits: int,
        *,
        granularity: Granularity = "token",
        group_size: int = -1,
        convention: Convention = "absmax",
        symmetric: bool = True,
        clip: float = 1.0,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.granularity: Granularity = granularity
        self.group_size = group_size
        self.convention: Convention = convention
        self.symmetric = symmetric
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """Return :func:`~methodbench.torchkit.quantizers.fake_quantize` of ``x`` [..., features]."""
        return fake_quantize(
            x,
            self.bits,
            granularity=self.granularity,
            group_size=self.group_size,
            convention=self.convention,
            symmetric=self.symmetric,
            clip=(self.clip, self.clip),
        )

    def extra_repr(self) -> str:
        group = "" if self.group_size == -1 else f", group_size={self.group_size}"
        return f"bits={self.bits}, granularity={self.granularity}{group}, convention={self.convention}"


class FloatActivationQuantizer(nn.Module):
    """Rounds to floating-point grids found at run time; holds no tensors."""

    def __init__(
        self, format: FloatFormat, *, granularity: Granularity = "token", group_size: int = -1
    ) -> None:
        super().__init__()
        self.format = format
        self.granularity: Granularity = granularity
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Return :func:`~methodbench.torchkit.floats.fake_quantize_float` of ``x`` [..., features]."""
        return fake_quantize_float(x, self.format, granularity=self.granularity, group_size=self.group_size)

    def extra_repr(self) -> str:
        return f"{self.format.name}, granularity={self.granularity}"


class StaticQuantizer(nn.Module):
    """Rounds to a grid that calibration fixed, for all features together or for each.

    Buffers: ``scale`` and, for asymmetric integer grids, ``zero``, [] or [features].
    """

    scale: Tensor
    zero: Tensor | None

    def __init__(self, grid: UniformGrid | FloatGrid) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero if isinstance(grid, UniformGrid) else None)
        self.format = grid.format if isinstance(grid, FloatGrid) else None
        self.extra_level = grid.extra_level if isinstance(grid, FloatGrid) else False
        self.range = (grid.low, grid.high) if isinstance(grid, UniformGrid) else (0, 0)

    @property
    def grid(self) -> UniformGrid | FloatGrid:
        """The grid with the tensors that the module holds at this moment."""
        if self.format is not None:
            return FloatGrid(self.scale, self.format, self.extra_level)
        return UniformGrid(self.scale, self.zero, *self.range)

    def forward(self, x: Tensor) -> Tensor:
        """Return the levels of ``x`` [..., features], in its dtype."""
        return self.grid.snap(x).to(x.dtype)

    def extra_repr(self) -> str:
        levels = self.format.name if self.format is not None else f"codes {self.range[0]}..{self.range[1]}"
        return f"{levels}, scales={self.scale.numel()}"


class QuantizedInputLinear(nn.Linear):
    """A dense Linear, its parameters shared with ``linear``, whose input is quantized."""

    def __init__(self, linear: nn.Linear, input_quantizer: nn.Module) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quantizer = input_quantizer
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``Q(input) @ W.T + bias``."""
        return F.linear(self.input_quantizer(input), self.weight, self.bias)


def quantize_inputs(model: LoadedModel, make: Callable[[str], nn.Module | None]) -> None:
    """Put a quantizer in front of every layer of the blocks, in place.

    Args:
        model: its layers are packed, or dense Linears.
        make: makes the quantizer of a layer from its full dotted name; None leaves the layer as it is.

    Raises:
        NotApplicableError: a layer is neither packed nor a Linear; names it.
    """
    for name, layer in model.adapter.targets(model.module).items():
        quantizer = make(name)
        if quantizer is None:
            continue
        if isinstance(layer, PackedLayer | QuantizedInputLinear):
            layer.input_quantizer = quantizer
        else:
            linear = dense_linear(layer, name)
            set_submodule(model.module, name, QuantizedInputLinear(linear, quantizer))


def quantize_cache(model: LoadedModel, make: Callable[[], nn.Module]) -> None:
    """Quantize the keys (after the rotary embedding) and values of every attention, in place.

    Quantizers see [batch, key-value heads, tokens, head size]; per token they have one grid for each head.

    Args:
        make: makes one quantizer; called once for the keys and once for the values of every block.

    Raises:
        NotApplicableError: see :func:`~methodbench.torchkit.attention.transform_operands`.
    """
    transform_operands(model, lambda _: {"key": make(), "value": make()})
