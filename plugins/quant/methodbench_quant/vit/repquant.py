"""RepQuant: RepQ-ViT with learned bounds per channel and reconstructed weights (arXiv 2402.05628); a reading of its
abstract.

Behind a LayerNorm, channel ``c`` keeps a share of its lowest and of its highest value, each learned by itself::

    lo'_c = sigmoid(a_c) min(lo_c, 0),    hi'_c = sigmoid(b_c) max(hi_c, 0)
    s_c = (hi'_c - lo'_c) / (2^b - 1),    z_c = round(-lo'_c / s_c)
    minimize  mean over tokens of |W Q(x) - W x|^2   over a and b

and the scales are folded as in RepQ-ViT. Then the weight of every Linear, in the order of the forward pass, answers for
the error of its quantized inputs ``X^``: it moves to the least-squares fit of the float outputs ``Y``, and its columns
are rounded one after another, each error spread over the columns that follow (as in GPTQ)::

    W* = Y^T X^ (X^^T X^ + lambda I)^-1,    H = X^^T X^ + lambda I

The authors' code and the paper's equations could not be had: the parametrization of the bounds and the form of the
reconstruction are this package's reading. ``clip_steps=0`` and ``recon="none"`` give RepQ-ViT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.torchkit.compensation import compensate, inverse_factor
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized, round_ste
from methodbench_quant.vit.adaround import harden, learn_rounding
from methodbench_quant.vit.repq_vit import (
    LogSqrt2,
    PercentileSettings,
    fold_channels,
    require_foldable,
    search_uniform,
)
from methodbench_quant.vit.sites import Draft, Site, Uniform, calibration_images
from methodbench_quant.vit.units import captured, units

#: Columns whose updates GPTQ applies together, and tokens of a step of AdaRound.
_BLOCK = 128


@hyperparameters
class RepQuant(PercentileSettings):
    """Quantizes weights and activations of every Linear, convolution and attention product."""

    clip_steps: Annotated[
        int, Field(ge=0, le=100_000, description="steps that learn the bounds of channels; 0: percentiles")
    ] = 200
    clip_lr: Annotated[float, Field(gt=0, le=1, description="of Adam, for the bounds")] = 5e-2
    clip_init: Annotated[float, Field(description="a and b at the start; the share is their sigmoid")] = 4.0
    recon: Annotated[
        Literal["gptq", "adaround", "none"], Field(description="how weights are reconstructed after folding")
    ] = "gptq"
    damp: Annotated[float, Field(gt=0, le=1, description="lambda, as a share of the mean diagonal")] = 0.01
    recon_steps: Annotated[int, Field(ge=1, le=100_000, description="steps per layer of adaround")] = 2000
    recon_lr: Annotated[float, Field(gt=0, le=1, description="learning rate of adaround")] = 1e-2

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized, its weights packed where their width allows.

        Raises:
            NotApplicableError: no calibration images, or not a pre-norm vision transformer.
            DivergedError: an activation or a weight for which no finite scale exists.
        """
        images = calibration_images(model, data, self.calibration_images, ctx)
        losses: dict[str, tuple[float, float]] = {}
        dense = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, nn.Linear)}

        def fit_activation(x: Tensor, site: Site) -> nn.Module:
            if site.kind == "softmax":
                return LogSqrt2.searched(x, self.a_bits, self.percentiles, str(site))
            grid = self.fit_uniform(x, site, per_channel=site.kind == "normed")
            if site.kind != "normed" or not self.clip_steps:
                return grid
            weight = dense[site.name].weight.detach().float()
            learned, first, last = learn_bounds(
                x, weight, grid, steps=self.clip_steps, lr=self.clip_lr, start=self.clip_init
            )
            losses[site.name] = first, last
            return learned

        draft = Draft(model, self.quantize_weight, fit_activation)
        require_foldable(draft)
        with ctx.phase("clipping"):
            draft.calibrate(images)
        folded: dict[str, tuple[Tensor, Tensor]] = {}
        with ctx.phase("reparameterization"):

            def put(name: str, weight: Tensor, bias: Tensor) -> None:
                folded[name] = weight, bias
                draft.requantize(name, weight, bias)

            fold_channels(draft, model, put, round_zero=self.round_zero)
        if self.recon != "none":
            with ctx.phase("reconstruction"):
                self._reconstruct(draft, model, images, folded, ctx)
        facts: dict[str, object] = {"activations": f"{self.a_bits} bits, simulated"}
        if losses:
            facts["clip_loss_first"] = sum(first for first, _ in losses.values())
            facts["clip_loss_last"] = sum(last for _, last in losses.values())
        return draft.finish(facts)

    def _reconstruct(
        self,
        draft: Draft,
        dense: LoadedModel,
        images: Tensor,
        folded: Mapping[str, tuple[Tensor, Tensor]],
        ctx: Context,
    ) -> None:
        """Replace the weight of every Linear of ``draft``, in the order of the forward pass."""
        generator = torch.Generator().manual_seed(ctx.seed)
        for unit in units(draft.model, draft.layers, "layer", images[:1]):
            layer = draft.model.module.get_submodule(unit.name)
            reference = dense.module.get_submodule(unit.name)
            if not isinstance(reference, nn.Linear):
                continue
            weight, bias = folded.get(unit.name, (reference.weight.detach().float(), reference.bias))
            x, _ = captured(draft.model.module, unit.name, images)
            _, y = captured(dense.module, unit.name, images)
            with torch.no_grad():
                x = cast(Tensor, layer.get_submodule("input_quantizer")(x)).float().flatten(0, -2)
            target = y.float().flatten(0, -2) - (0 if bias is None else bias.float())
            if self.recon == "gptq":
                rounded = least_squares(
                    x, target, bits=self.w_bits, percentiles=self.percentiles, damp=self.damp, name=unit.name
                )
            else:
                rounded = self._learned(weight, x, target, unit.name, generator)
            draft.put(unit.name, rounded)

    def _learned(
        self, weight: Tensor, x: Tensor, target: Tensor, name: str, generator: torch.Generator
    ) -> Quantized:
        grid = search_uniform(weight, self.w_bits, self.percentiles, f"a row of the weight of {name}")
        learned = learn_rounding(
            lambda weights, batch: F.linear(batch, weights[""]),
            {"": weight},
            {"": grid},
            x,
            target,
            iterations=self.recon_steps,
            batch=_BLOCK,
            lr=self.recon_lr,
            generator=generator,
            name=name,
        )
        return harden(weight, grid, learned.offsets[""])


def learn_bounds(
    x: Tensor, weight: Tensor, grid: Uniform, *, steps: int, lr: float, start: float
) -> tuple[Uniform, float, float]:
    """Learn a share of the lowest and of the highest value of every channel, and return the best grid met.

    Args:
        x: float32 [..., C], the outputs of a LayerNorm.
        weight: float32 [out, C], of the Linear behind it.
        grid: one grid per channel, which is returned where no step is better.
        steps: of Adam, on all of ``x`` at once.
        lr: its learning rate.
        start: both parameters of every channel at the start.

    Returns:
        The grid, the pair loss ``mean |W Q(x) - W x|^2`` of ``grid``, and that of the grid that is returned.
    """
    x = x.flatten(0, -2)
    # |W e|^2 = e^T (W^T W) e: the product with the smaller matrix.
    gram = weight.T @ weight
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    parameters = torch.full((2, x.shape[1]), start, device=x.device)

    def loss(quantized: Tensor) -> Tensor:
        error = quantized - x
        return ((error @ gram) * error).sum(-1).mean()

    def bounded(shares: Tensor) -> tuple[Tensor, Tensor]:
        kept_low, kept_high = torch.sigmoid(shares)
        scale = (kept_high * high - kept_low * low) / (2**grid.bits - 1)
        return scale, round_ste(-kept_low * low / scale)

    first = least = float(loss(grid(x)))
    best = grid
    with torch.enable_grad():
        parameters.requires_grad_()
        optimizer = torch.optim.Adam([parameters], lr=lr)
        for _ in range(steps):
            scale, zero = bounded(parameters)
            codes = (round_ste(x / scale) + zero).clamp(0, 2**grid.bits - 1)
            error = loss((codes - zero) * scale)
            if float(error.detach()) < least:
                least = float(error.detach())
                best = Uniform(scale.detach().clone(), zero.detach().clone(), grid.bits)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    return best, first, least


def least_squares(
    x: Tensor,
    target: Tensor,
    *,
    bits: int,
    percentiles: tuple[float, ...],
    damp: float = 0.01,
    name: str = "the layer",
) -> Quantized:
    """Return the weight that gives ``target`` from ``x``, rounded column by column.

    Args:
        x: float32 [tokens, in], quantized.
        target: float32 [tokens, out], without the bias.
        bits: of the weight.
        percentiles: of the grid of every row.
        damp: ``lambda`` as a share of the mean diagonal of ``X^T X``.

    Raises:
        DivergedError: inputs or outputs that are not finite, or a row without a finite scale.
    """
    if not bool(torch.isfinite(target).all()):
        raise DivergedError(f"calibration outputs of {name} hold NaN or infinity")
    hessian = x.T @ x
    upper, damping = inverse_factor(hessian, damp, name)
    ridge = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), device=x.device)
    weight = torch.linalg.solve(ridge, x.T @ target).T
    grid = search_uniform(weight, bits, percentiles, f"a row of the weight of {name}")
    columns = weight.T.contiguous()
    codes = torch.empty_like(columns)
    levels = grid.columnwise()

    def rounded(j: int, ahead: Tensor) -> Tensor:
        codes[j] = levels.encode(ahead[0])
        return levels.decode(codes[j])

    compensate(columns, upper, _BLOCK, rounded)
    return Quantized(codes.T.to(torch.int16).contiguous(), grid.scale, grid.zero, 0, bits)
