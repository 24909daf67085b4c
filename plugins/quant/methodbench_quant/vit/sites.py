"""Where the quantizers of a vision transformer or a convolutional network sit, and how they get there.

Every Linear and every convolution of the model has a quantized weight and a quantizer in front of it, and so
has every operand of the two matrix products of attention. A method says what a weight becomes and which
quantizer fits the first activation that a site sees (:class:`Draft`); the rest is the same for all of them::

    draft = Draft(model, quantize_weight, fit_activation)
    draft.calibrate(images)
    draft.finish(facts)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule, set_weight
from methodbench.torchkit.packed import WIDTHS, PackedLayer, PackedLinear, dense_linear, pack_linear
from methodbench.torchkit.quantizers import Quantized, UniformGrid
from methodbench.torchkit.size import bits_per_weight
from methodbench.torchkit.vit_attention import use_explicit_attention

#: What a site's activation is: the input of the first convolution, the output of a LayerNorm that only one Linear
#: reads, the input of any other layer, an operand of q @ k^T, or an operand of softmax(...) @ v.
SiteKind = Literal["image", "normed", "linear", "query", "key", "softmax", "value"]


@dataclass(frozen=True, slots=True)
class Site:
    """One activation: its kind, and the dotted name of the layer or product that reads it."""

    kind: SiteKind
    name: str

    def __str__(self) -> str:
        return f"the {self.kind} activation of {self.name}"


QuantizeWeight = Callable[[Tensor, str], Quantized]
"""Weight [rows, n] and the layer's name -> codes with one grid per row."""

FitActivation = Callable[[Tensor, Site], nn.Module]
"""First activation at a site, in float32, and the site -> quantizer for this and every later activation."""


class Uniform(nn.Module):
    """``(clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero) * scale``, computed in float32.

    Args:
        scale: float32, [] for one grid per tensor, [C] for one per channel of the last axis.
        zero: of the same shape; not necessarily integers, see
            :func:`methodbench_quant.vit.repq_vit.reparameterize`.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., C] on the grid, in its dtype; gradients pass where the code is not clamped."""
        grid = UniformGrid(self.scale.float(), self.zero.float(), 0, 2**self.bits - 1)
        learning = torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad)
        return (grid.pass_through if learning else grid.snap)(x.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class FirstInput(nn.Module):
    """Fits a quantizer to the first tensor that it sees and applies it to this and every later one."""

    def __init__(self, fit: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.fit = fit
        self.quantizer: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.quantizer is None:
            self.quantizer = self.fit(x)
        return cast(Tensor, self.quantizer(x))


class SimulatedLinear(nn.Linear):
    """A Linear with rounded weights in floating point and a quantizer in front."""

    input_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` [..., in]."""
        return super().forward(self.input_quantizer(x))


class SimulatedConv2d(nn.Conv2d):
    """A convolution with rounded weights in floating point and a quantizer in front.

    Attributes:
        same: pad as TensorFlow does, by what the size of the input asks for, more behind than in front.
    """

    input_quantizer: nn.Module
    same: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` [B, C, H, W]."""
        return self.convolved(self.input_quantizer(x), self.weight, self.bias)

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer makes of ``x`` [B, C, H, W], as it is, with the given weight and bias."""
        return self._conv_forward(_padded_same(x, self) if self.same else x, weight, bias)


class PackedConv2d(nn.Module):
    """A convolution whose kernels lie in memory as the rows of a :class:`PackedLinear`."""

    def __init__(self, conv: nn.Conv2d, kernels: PackedLinear, input_quantizer: nn.Module) -> None:
        super().__init__()
        self.kernels = kernels
        self.bias = conv.bias
        self.input_quantizer = input_quantizer
        self.kernel_shape = conv.weight.shape
        self.kernel_size = conv.kernel_size
        self.same = getattr(conv, "same", False)
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation
        self.groups = conv.groups

    @property
    def weight(self) -> Tensor:
        """The dense kernels [out, in / groups, height, width]."""
        return self.kernels.weight.view(self.kernel_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` [B, C, H, W]."""
        x = self.input_quantizer(x)
        if self.same:
            x = _padded_same(x, self)
        weight = self.weight.to(x.dtype)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedMatMul(nn.Module):
    """``a @ b`` with a quantizer in front of either operand."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of ``a`` [..., n, d] and ``b`` [..., d, m]."""
        return cast(Tensor, self.left(a) @ self.right(b))


class Draft:
    """A model with rounded weights in floating point and quantizers that wait for their first activation.

    Attributes:
        model: a clone of the dense model; its module is changed in place.
        normed: name of each Linear that alone reads a LayerNorm, in a block or between stages -> name of the norm.
        layers: names of the layers that are quantized.
        sites: what stands in front of each quantizer, by the quantizer's dotted name.
        weights: the quantized weight of every layer by name; kernels of convolutions are flattened to rows.

    Args:
        model: the dense model; left alone.
        quantize_weight: see :data:`QuantizeWeight`.
        fit_activation: see :data:`FitActivation`; None for a model whose activations stay as they are.
        layers: which layers to quantize, given their names and themselves; by default every Linear and every
            convolution.
        attention: whether the operands of attention's products have quantizers.
        rounded: whether weights are rounded at once; else :meth:`round_weights` does it.

    Raises:
        NotApplicableError: compressed already; layers or attention of a kind that has no quantized form.
    """

    def __init__(
        self,
        model: LoadedModel,
        quantize_weight: QuantizeWeight,
        fit_activation: FitActivation | None,
        *,
        layers: Callable[[str, nn.Module], bool] = lambda _name, _layer: True,
        attention: bool = True,
        rounded: bool = True,
    ) -> None:
        if model.storage != "dense":
            raise NotApplicableError(f"{model.name} is compressed already", "Start from the dense model.")
        self.model = model.clone()
        self.weights: dict[str, Quantized] = {}
        self._quantize_weight = quantize_weight
        self.normed = _normed_layers(self.model)
        if self.model.adapter.layout is not None and attention:
            attentions = use_explicit_attention(self.model.module, self.model.adapter)
        else:
            attentions = {}
        self.layers: list[str] = []
        self.sites: dict[str, Site] = {}
        image = next((n for n, m in self.model.module.named_modules() if isinstance(m, nn.Conv2d)), "")
        for name, layer in list(self.model.module.named_modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear) and layers(name, layer):
                self._open(name, layer)
                kind: SiteKind = "normed" if name in self.normed else "image" if name == image else "linear"
                self.layers.append(name)
                self.sites[f"{name}.input_quantizer"] = Site(kind, name)
        if rounded:
            self.round_weights()
        for name, attention_module in attentions.items():
            first, second = f"{name}.matmul1", f"{name}.matmul2"
            attention_module.matmul1 = QuantizedMatMul(nn.Identity(), nn.Identity())
            attention_module.matmul2 = QuantizedMatMul(nn.Identity(), nn.Identity())
            self.sites |= {f"{first}.left": Site("query", first), f"{first}.right": Site("key", first)}
            self.sites |= {
                f"{second}.left": Site("softmax", second),
                f"{second}.right": Site("value", second),
            }
        if fit_activation is not None:
            self.refit(fit_activation)

    def round_weights(self) -> None:
        """Quantize the weight of every layer, as it is at this moment."""
        for name in self.layers:
            layer = self.model.module.get_submodule(name)
            self.requantize(name, cast(Tensor, layer.weight).detach().float().flatten(1))

    def refit(self, fit_activation: FitActivation) -> None:
        """Let every site wait for its activation of the next :meth:`calibrate`."""

        def waiting(site: Site) -> FirstInput:
            return FirstInput(lambda x: fit_activation(x.float(), site))

        for path, site in self.sites.items():
            set_submodule(self.model.module, path, waiting(site))

    def calibrate(self, images: Tensor) -> None:
        """Fit the quantizer of every site in one forward pass, each to what the ones before it let through.

        Args:
            images: float [images, channels, height, width], all in one batch.

        Raises:
            NotApplicableError: a site that no activation reaches, or a block that is not pre-norm.
            DivergedError: the method finds no quantizer for an activation.
        """
        with torch.no_grad(), _reading_their_norms(self.model.module, self.normed):
            self.model.module(images)
        for name, site in list(self.model.module.named_modules()):
            if isinstance(site, FirstInput):
                if site.quantizer is None:
                    raise NotApplicableError(
                        f"no activation reaches {name} of {self.model.name}, so that it has no scale",
                        "Layers that a model holds but never calls cannot be quantized.",
                    )
                set_submodule(self.model.module, name, site.quantizer)

    def requantize(self, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantize ``weight`` [rows, n] and put it into the layer called ``name``, with ``bias`` [rows]."""
        self.put(name, self._quantize_weight(weight, name), bias)

    def put(self, name: str, quantized: Quantized, bias: Tensor | None = None) -> None:
        """Put a quantized weight, and a ``bias`` [rows] where given, into the layer called ``name``."""
        self.weights[name] = quantized
        self.set_float(name, quantized.dequantize(), bias)

    def set_float(self, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Put a weight [rows, n], and a ``bias`` [rows] where given, as they are into the layer called ``name``."""
        layer = self.model.module.get_submodule(name)
        set_weight(layer, weight.view_as(cast(Tensor, layer.weight)))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(cast(Tensor, layer.weight)), requires_grad=False)

    def finish(self, facts: dict[str, Any]) -> LoadedModel:
        """Return the model with packed weights, or rounded ones in floating point where no packing exists."""
        if all(quantized.bits in WIDTHS for quantized in self.weights.values()):
            for name, quantized in self.weights.items():
                set_submodule(self.model.module, name, self._packed(name, quantized))
            self.model.storage = "real"
            self.model.accounted_bits = bits_per_weight(self.model)
        else:
            self.model.storage = "simulated"
            self.model.accounted_bits = self._accounted_bits()
        self.model.facts.update({"layers": len(self.weights), **facts})
        return self.model

    def _open(self, name: str, layer: nn.Conv2d | nn.Linear) -> None:
        """Put a layer with a rounded weight and an unfitted quantizer in the place of a dense one."""
        simulated: SimulatedConv2d | SimulatedLinear
        # timm's convolution with TensorFlow's padding, which needs no import of timm here.
        same = type(layer).__name__ == "Conv2dSame"
        if type(layer) is nn.Linear:
            simulated = SimulatedLinear(layer.in_features, layer.out_features, device="meta")
        elif isinstance(layer, nn.Conv2d) and (
            same or (type(layer) is nn.Conv2d and layer.padding_mode == "zeros")
        ):
            simulated = SimulatedConv2d(
                layer.in_channels,
                layer.out_channels,
                cast(tuple[int, int], layer.kernel_size),
                cast(tuple[int, int], layer.stride),
                cast(tuple[int, int] | str, layer.padding),
                cast(tuple[int, int], layer.dilation),
                layer.groups,
                device="meta",
            )
            simulated.same = same
        else:
            raise NotApplicableError(f"layer {name} is a {type(layer).__name__}, which has no quantized form")
        simulated.weight, simulated.bias = layer.weight, layer.bias
        simulated.input_quantizer = nn.Identity()
        set_submodule(self.model.module, name, simulated.train(layer.training))

    def _packed(self, name: str, quantized: Quantized) -> nn.Module:
        layer = self.model.module.get_submodule(name)
        zero = quantized.zero
        if zero is not None and bool((zero.abs() >= 2**15).any()):
            raise DivergedError(f"{name} has an almost constant row, whose zero point needs over 16 bits")
        packed: nn.Module
        kernels: PackedLayer
        if isinstance(layer, SimulatedConv2d):
            kernels = PackedLinear.from_quantized(quantized, dtype=layer.weight.dtype)
            packed = PackedConv2d(layer, kernels, layer.input_quantizer).train(layer.training)
        else:
            linear = dense_linear(layer, name)
            packed = kernels = pack_linear(
                linear, quantized, input_quantizer=linear.get_submodule("input_quantizer")
            )
        # The activations' scales were searched behind the exact weights: half-precision scales would move
        # activations over rounding boundaries all the way down.
        kernels.scale = quantized.scale
        return packed

    def _accounted_bits(self) -> float:
        """Codes, an fp32 scale per row, a zero point as wide as a code, or of 16 bits where off the grid."""
        total, count = 0, 0
        for name in self.model.adapter.targets(self.model.module):
            quantized = self.weights[name]
            rows, zero, bits = quantized.codes.shape[0], quantized.zero, quantized.bits
            zero_bits = 0
            if zero is not None:
                zero_bits = bits if bool(((zero >= 0) & (zero < 2**bits)).all()) else 16
            total += bits * quantized.codes.numel() + rows * (32 + zero_bits)
            count += quantized.codes.numel()
        return total / count


def calibration_images(model: LoadedModel, data: Calibration, count: int, ctx: Context) -> Tensor:
    """Return the first ``count`` images of ``data``, or all of them, with a remark, where it has fewer.

    They lie on the device of ``model``.

    Raises:
        NotApplicableError: there are none.
    """
    if not len(data):
        raise NotApplicableError(
            "static activation quantization needs calibration images, and there are none",
            "Evaluate on a task that offers calibration images.",
        )
    if len(data) < count:
        ctx.warn(f"calibrated on {len(data)} images; the method asks for {count}")
    return data.inputs[:count].to(model.device)


def _padded_same(x: Tensor, conv: Any) -> Tensor:
    """Pad ``x`` [B, C, H, W] with zeros so that the output has ``ceil(size / stride)`` rows and columns."""
    pads: list[int] = []
    for axis in (1, 0):
        size, kernel, stride = x.shape[2 + axis], conv.kernel_size[axis], conv.stride[axis]
        missing = max((-(-size // stride) - 1) * stride + (kernel - 1) * conv.dilation[axis] + 1 - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)


def _normed_layers(model: LoadedModel) -> dict[str, str]:
    adapter, module = model.adapter, model.module
    found = {}
    for block_name, block in zip(adapter.block_names(module), adapter.blocks(module), strict=True):
        for group in adapter.scale_groups(block):
            if isinstance(block.get_submodule(group.previous), nn.LayerNorm) and len(group.linears) == 1:
                found[f"{block_name}.{group.linears[0]}"] = f"{block_name}.{group.previous}"
    found |= {linear: norm for norm, linear in adapter.merging_norms}
    return found


@contextmanager
def _reading_their_norms(module: nn.Module, normed: dict[str, str]) -> Iterator[None]:
    """Check, as the layers run, that each Linear of ``normed`` gets the tokens that its LayerNorm returned."""
    outputs: dict[str, Tensor] = {}

    def remember(norm: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs[norm] = output

        return hook

    def compare(layer: str, norm: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            written = outputs.get(norm)
            if written is None or not (args[0] is written or _same_tokens(args[0], written)):
                raise NotApplicableError(
                    f"{layer} does not read the output of {norm}: no pre-norm block, or padded windows"
                )

        return hook

    with ExitStack() as hooks:
        for layer, norm in normed.items():
            reader, writer = module.get_submodule(layer), module.get_submodule(norm)
            hooks.callback(writer.register_forward_hook(remember(norm)).remove)
            hooks.callback(reader.register_forward_pre_hook(compare(layer, norm)).remove)
        yield


def _same_tokens(x: Tensor, y: Tensor) -> bool:
    """Return whether ``x`` [..., C] and ``y`` [..., C] hold the same values per channel, in whatever order: windows
    are cut out of a picture of tokens without a change, unless they are padded."""
    if x.numel() != y.numel() or x.shape[-1] != y.shape[-1]:
        return False
    return torch.equal(x.flatten(0, -2).sort(0).values, y.flatten(0, -2).sort(0).values)
