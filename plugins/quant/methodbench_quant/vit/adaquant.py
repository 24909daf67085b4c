"""AdaQuant on convolutional networks: layers fitted alone, batch norms put back and measured again, biases tuned.

Every layer learns from what enters and leaves it in the dense network, whose batch norms are folded. Where a ReLU reads
a layer, outputs are compared behind it. Para-normalization puts a batch norm behind each layer that had one, with the
statistics that the float network has there by its own parameters, lets the quantized network's statistics take their
place, and folds it again::

    w = sqrt(gamma^2 + eps),    mean = beta,    var = gamma^2      the identity on float statistics
    scale <- scale w / sqrt(var + eps),    bias <- (bias - mean) w / sqrt(var + eps) + beta

Images have no labels here: loss increases and the tuning of biases are measured on the divergence from the dense
network's predictions, which the authors' code has as an option.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.batchnorm import batchnorms_behind, fold_batchnorms
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule, set_weight
from methodbench.torchkit.quantizers import Quantized, require_finite
from methodbench.torchkit.tracing import traced
from methodbench_quant.learned_ranges import (
    Fitted,
    QuantizedLinear,
    adaquant,
    round_bias,
)
from methodbench_quant.vit.sites import Draft, SimulatedConv2d, Uniform, calibration_images
from methodbench_quant.vit.units import captured, units

if TYPE_CHECKING:
    from methodbench_quant.llm.adaquant import AdaQuant

#: Calibration images, images of a pass of para-normalization, and its momentum (the authors' numbers).
_IMAGES, _NORM_BATCH, _MOMENTUM = 1000, 200, 0.1


def quantize_network(settings: AdaQuant, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
    """Return a convolutional network quantized, its weights packed where their width allows.

    Raises:
        NotApplicableError: no calibration images, or layers that are not called once each.
        ParameterError: no choice of precisions meets the size.
        DivergedError: weights or activations that are not finite.
    """
    images = calibration_images(model, data, _IMAGES, ctx)
    norms = batchnorms_behind(model, images[:1])
    dense = fold_batchnorms(model, images[:1])
    draft = Draft(dense, _unused, None, attention=False, rounded=False)
    order = [unit.name for unit in units(draft.model, draft.layers, "layer", images[:1])]
    edges = {order[0], order[-1]}
    inner = [name for name in order if name not in edges]
    bits: dict[str, int] = {**dict.fromkeys(inner, settings.bits), **dict.fromkeys(edges, settings.edge_bits)}
    facts: dict[str, object] = {}
    if settings.size is not None:
        with ctx.phase("allocation"):
            chosen, facts = _allocate(settings, dense, inner, images)
        bits |= chosen
    generator = torch.Generator().manual_seed(ctx.seed)
    behind = relus_behind(dense.module, order, images[:1])
    fits: list[Fitted] = []
    with ctx.phase("fitting"):
        for name in order:
            a_bits = settings.a_bits if name not in edges or settings.a_bits == 16 else settings.edge_bits
            layer = _opened(draft.model.module.get_submodule(name), bits[name], a_bits, name)
            x, target = captured(dense.module, name, images)
            if settings.sequential:
                x, _ = captured(draft.model.module, name, images)
            if not bool(torch.isfinite(target).all()):
                raise DivergedError(f"calibration activations that leave {name} are not finite")
            layer.measure(x.split(settings.batch))
            fits.append(
                adaquant(
                    layer,
                    x,
                    target,
                    iterations=settings.iterations,
                    batch=settings.batch,
                    lr_w=settings.lr_w,
                    lr_b=settings.lr_b,
                    lr_qin=settings.lr_qin,
                    lr_qw=settings.lr_qw,
                    generator=generator,
                    behind=torch.relu if name in behind else _unchanged,
                )
            )
            _put(draft, name, layer)
    if settings.bn_passes:
        with ctx.phase("para-normalization"):
            para_normalize(draft, norms, images, settings.bn_passes)
    if settings.bias_steps:
        with ctx.phase("bias tuning"):
            tune_biases(
                draft.model, dense, order[:-1], images, settings.bias_steps, settings.bias_lr, settings.batch
            )
    for fitted, name in zip(fits, order, strict=True):
        bias = draft.model.module.get_submodule(name).bias
        if bias is not None:
            bias = round_bias(cast(Tensor, bias).detach(), fitted.layer.bias_bits)
            draft.put(name, draft.weights[name], bias)
    facts |= {"mse_before": _mean(fit.before for fit in fits), "mse_after": _mean(fit.after for fit in fits)}
    if settings.a_bits < 16:
        facts["activations"] = f"{settings.a_bits} bits, static, simulated"
    return draft.finish(facts)


class QuantizedConv2d(QuantizedLinear):
    """A convolution whose kernels are the rows of the weight, with everything that can be learned."""

    def __init__(self, conv: SimulatedConv2d, bits: int, a_bits: int) -> None:
        super().__init__(conv.weight.detach().float().flatten(1), conv.bias, bits, a_bits)
        self.conv = [conv]
        """Hidden from the parameters: what says how the kernels are applied."""

    def apply_to(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of ``x`` [B, C, H, W] with the kernels in ``weight`` [rows, n]."""
        return self.conv[0].convolved(x, weight.view(self.conv[0].weight.shape), bias)


def relus_behind(module: nn.Module, layers: Sequence[str], images: Tensor) -> set[str]:
    """Return those of ``layers`` whose output a ReLU module reads.

    Args:
        images: [B, C, H, W] for a forward pass.
    """
    found = traced(
        module,
        images,
        writers=lambda name, _: name in layers,
        readers=lambda _, part: isinstance(part, nn.ReLU | nn.ReLU6),
    )
    return {layer for _, layer in found.pairs}


def para_normalize(draft: Draft, norms: dict[str, nn.BatchNorm2d], images: Tensor, passes: int) -> None:
    """Measure the statistics behind each layer that had a batch norm again, and fold them, in place.

    Args:
        draft: quantized.
        norms: the batch norm that each convolution had, by the convolution's name.
        images: [B, C, H, W].
        passes: over ``images``.
    """
    put_back = {name: _identity_norm(norm) for name, norm in norms.items() if name in draft.weights}
    with ExitStack() as hooks, torch.no_grad():
        for name, norm in put_back.items():
            layer = draft.model.module.get_submodule(name)
            hooks.callback(layer.register_forward_hook(lambda _m, _a, out, norm=norm: norm(out)).remove)
        for _ in range(passes):
            for batch in images.split(_NORM_BATCH):
                draft.model.module(batch)
    for name, norm in put_back.items():
        fold_norm(draft, name, norm)


def fold_norm(draft: Draft, name: str, norm: nn.BatchNorm2d) -> None:
    """Fold a batch norm behind a quantized layer into its scales and its bias, in place; its gain is positive."""
    layer = draft.model.module.get_submodule(name)
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    factor = (variance + norm.eps).rsqrt() * norm.weight.detach()
    bias = torch.zeros_like(mean) if layer.bias is None else cast(Tensor, layer.bias).detach()
    quantized = draft.weights[name]
    scaled = Quantized(
        quantized.codes, quantized.scale * factor[:, None], quantized.zero, quantized.low, quantized.bits
    )
    draft.put(name, scaled, (bias - mean) * factor + norm.bias.detach())


def _identity_norm(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Return a norm in training that is the identity on outputs with mean beta and variance gamma^2."""
    found = nn.BatchNorm2d(norm.num_features, eps=norm.eps, momentum=_MOMENTUM)
    gamma = torch.ones(norm.num_features) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros(norm.num_features) if norm.bias is None else norm.bias.detach()
    cast(Tensor, found.running_mean).copy_(beta)
    cast(Tensor, found.running_var).copy_(gamma.square())
    with torch.no_grad():
        found.weight.copy_((gamma.square() + norm.eps).sqrt())
        found.bias.copy_(beta)
    return found.train()


def tune_biases(
    model: LoadedModel,
    dense: LoadedModel,
    layers: Sequence[str],
    images: Tensor,
    steps: int,
    lr: float,
    batch: int,
) -> None:
    """Tune the biases of some layers, in place, towards the dense network's predictions, by plain SGD.

    Args:
        layers: whose biases are tuned; those without one are left out.
        images: [B, C, H, W]; batches of them are taken in order, again and again.

    Raises:
        DivergedError: a loss that is not finite.
    """
    held = [model.module.get_submodule(name) for name in layers]
    biases = [layer.bias.requires_grad_() for layer in held if isinstance(layer.bias, nn.Parameter)]
    if not biases:
        raise NotApplicableError(f"{model.name} has no biases to tune")
    optimizer = torch.optim.SGD(biases, lr=lr)
    batches = images.split(batch)
    with torch.no_grad():
        wanted = [dense.module(part).float().log_softmax(-1) for part in batches]
    for step in range(steps):
        part = step % len(batches)
        given = model.module(batches[part]).float().log_softmax(-1)
        loss = F.kl_div(given, wanted[part], log_target=True, reduction="batchmean")
        if not bool(torch.isfinite(loss)):
            raise DivergedError(f"the loss of bias tuning is not finite after {step} steps", "Lower bias_lr.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for bias in biases:
        bias.requires_grad_(False)


def _allocate(
    settings: AdaQuant, dense: LoadedModel, layers: Sequence[str], images: Tensor
) -> tuple[dict[str, int], dict[str, object]]:
    """Return the precision of every layer, and facts for the record."""
    work = dense.clone()
    base = max(settings.precisions)
    originals = {
        name: cast(Tensor, dense.module.get_submodule(name).weight).detach().float() for name in layers
    }

    def put(name: str, bits: int) -> None:
        weight = originals[name]
        rounded = QuantizedLinear(weight.flatten(1), None, bits, 16).quantized().dequantize()
        set_weight(work.module.get_submodule(name), rounded.view_as(weight))

    def loss() -> float:
        with torch.no_grad():
            given = work.module(images).float().log_softmax(-1)
            return float(F.kl_div(given, wanted, log_target=True, reduction="batchmean"))

    with torch.no_grad():
        wanted = dense.module(images).float().log_softmax(-1)
    for name in layers:
        put(name, base)
    least = loss()
    increases = np.zeros((len(layers), len(settings.precisions)))
    for i, name in enumerate(layers):
        for j, precision in enumerate(settings.precisions):
            if precision != base:
                put(name, precision)
                increases[i, j] = loss() - least
        put(name, base)
    return settings.spend([[name] for name in layers], increases, [originals[n].numel() for n in layers])


def _opened(layer: nn.Module, bits: int, a_bits: int, name: str) -> QuantizedLinear:
    """Return a layer to fit."""
    weight = cast(Tensor, layer.weight).detach().float()
    require_finite(weight, name)
    if isinstance(layer, SimulatedConv2d):
        return QuantizedConv2d(layer, bits, a_bits)
    return QuantizedLinear(weight, cast("Tensor | None", layer.bias), bits, a_bits)


def _put(draft: Draft, name: str, layer: QuantizedLinear) -> None:
    with torch.no_grad():
        bias = layer.quantized_bias()
    draft.put(name, layer.quantized(), None if bias is None else bias.detach())
    if layer.input_range is not None:
        grid = layer.input_range.grid()
        assert grid.zero is not None
        quantizer = Uniform(
            grid.scale.detach().squeeze(), grid.zero.detach().squeeze(), layer.input_range.bits
        )
        set_submodule(draft.model.module, f"{name}.input_quantizer", quantizer)


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


def _unchanged(out: Tensor) -> Tensor:
    return out


def _unused(weight: Tensor, name: str) -> Quantized:
    raise AssertionError(f"{name} is put as it was learned")
