"""Integer arithmetic of a quantized vision model: what a device without floating point would compute.

A simulated layer multiplies rounded floating-point numbers. With one grid per activation tensor and one per row of the
weight, both with integer zero points, the same output is an integer product with one multiplier per row::

    y_r = s_x s_r sum_i (q_i - z_x) (c_ri - z_r) + b_r        q, c: codes

:func:`use_integers` puts layers and attention products that accumulate in int32 in the place of simulated ones; that
both agree up to the rounding of float sums is the proof that the simulation is of something that can be deployed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.torchkit.model import LoadedModel, set_submodule
from methodbench.torchkit.packed import PackedLinear
from methodbench_quant.vit.sites import PackedConv2d, QuantizedMatMul, Uniform

#: What an accumulator of 32 bits holds.
_LIMIT = 2**31 - 1


class NoIntegerForm(Exception):
    """Why a layer has no exact integer form."""


def use_integers(model: LoadedModel) -> tuple[LoadedModel, dict[str, str]]:
    """Return a clone of a quantized model whose layers and products accumulate in int32 where they can.

    Returns:
        The clone, and for every quantized layer or product that stays in floating point, by name, why.
    """
    exact = model.clone()
    left: dict[str, str] = {}
    for name, part in list(exact.module.named_modules()):
        try:
            if isinstance(part, PackedConv2d):
                set_submodule(exact.module, name, IntegerConv2d(part))
            elif isinstance(part, PackedLinear) and isinstance(part.input_quantizer, nn.Module):
                set_submodule(exact.module, name, IntegerLinear(part))
            elif isinstance(part, QuantizedMatMul):
                set_submodule(exact.module, name, IntegerMatMul(part))
        except NoIntegerForm as reason:
            left[name] = str(reason)
    return exact, left


class IntegerInput(nn.Module):
    """Maps activations to centred codes ``q - z``, int32, of one grid per tensor."""

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: nn.Module | None, what: str) -> None:
        super().__init__()
        if not isinstance(quantizer, Uniform):
            raise NoIntegerForm(f"{what} is not on a uniform grid ({type(quantizer).__name__})")
        if quantizer.scale.numel() != 1:
            raise NoIntegerForm(f"{what} has a grid per channel")
        if bool(quantizer.zero != quantizer.zero.round()):
            raise NoIntegerForm(f"{what} has a zero point that is no integer ({float(quantizer.zero):.3f})")
        self.register_buffer("scale", quantizer.scale.float())
        self.register_buffer("zero", quantizer.zero.float())
        self.levels = 2**quantizer.bits

    @property
    def largest(self) -> int:
        """The largest magnitude of a centred code."""
        zero = int(self.zero)
        return max(abs(zero), abs(self.levels - 1 - zero))

    def forward(self, x: Tensor) -> Tensor:
        """Return the centred codes of ``x``, of its shape."""
        codes = ((x.float() / self.scale).round() + self.zero).clamp(0, self.levels - 1)
        return (codes - self.zero).to(torch.int32)


class IntegerLinear(nn.Module):
    """A Linear whose products are summed in int32."""

    weight: Tensor
    multiplier: Tensor
    bias: Tensor | None

    def __init__(self, layer: PackedLinear, quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.input = IntegerInput(layer.input_quantizer if quantizer is None else quantizer, "its input")
        if layer.scale.shape[-1] != 1 or layer.transposed or layer.perm is not None:
            raise NoIntegerForm("its weight has more than one grid per row")
        zero = layer.zero_points()
        weight = layer.integers().int() - (0 if zero is None else zero.int())
        check_range(weight, self.input.largest)
        self.register_buffer("weight", weight)
        self.register_buffer("multiplier", (layer.scale.float() * self.input.scale).flatten())
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` [..., in]."""
        y = (self.input(x) @ self.weight.T).float() * self.multiplier
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class IntegerConv2d(nn.Module):
    """A convolution whose products are summed in int32; what is padded is zero, as in floating point."""

    def __init__(self, conv: PackedConv2d) -> None:
        super().__init__()
        if conv.same:
            raise NoIntegerForm("it pads by the size of its input")
        self.flat = IntegerLinear(conv.kernels, conv.input_quantizer)
        self.bias = conv.bias
        self.kernel_shape = conv.kernel_shape
        self.geometry: dict[str, Any] = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` [B, C, H, W]."""
        kernels = self.flat.weight.view(self.kernel_shape)
        total = F.conv2d(self.flat.input(x), kernels, None, **self.geometry)
        y = total.float() * self.flat.multiplier[:, None, None]
        return (y if self.bias is None else y + self.bias[:, None, None]).to(x.dtype)


class IntegerMatMul(nn.Module):
    """A product of two quantized operands, summed in int32."""

    def __init__(self, product: QuantizedMatMul) -> None:
        super().__init__()
        self.left = IntegerInput(product.left, "its left operand")
        self.right = IntegerInput(product.right, "its right operand")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of ``a`` [..., n, d] and ``b`` [..., d, m].

        Raises:
            OverflowError: d products may leave the range of the accumulator.
        """
        if a.shape[-1] * self.left.largest * self.right.largest > _LIMIT:
            raise OverflowError(f"{a.shape[-1]} products of codes do not fit 32 bits")
        total = self.left(a) @ self.right(b)
        return cast(Tensor, total.float() * (self.left.scale * self.right.scale)).to(a.dtype)


def check_range(weight: Tensor, largest: int) -> None:
    """Raise NoIntegerForm where a row of ``weight`` [rows, n], int32, times codes up to ``largest`` may overflow."""
    most = int(weight.abs().long().sum(1).max()) * largest
    if most > _LIMIT:
        raise NoIntegerForm(f"its sums may reach {most}, which 32 bits do not hold")
