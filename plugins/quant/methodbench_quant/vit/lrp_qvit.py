"""LRP-QViT: more bits for layers of more relevance, and clipped channels (arXiv 2401.11243); a reading of its abstract.

The score ``c_l`` of a layer is the relevance that reaches its input from the predicted class, in absolute values,
averaged over images (see :mod:`methodbench_quant.vit.relevance`). Every layer of a block starts at the fewest bits;
the one whose next step gains most for what it costs is raised, while the weights of all layers stay within the target::

    c_l (2^(-2b) - 2^(-2b')) / (n_l (b' - b)),    sum n_l b_l <= target sum n_l

Weight and input of a layer share its bits, operands of attention's products have the target's. Then RepQ-ViT follows,
with one addition: each end of a channel's range behind a LayerNorm lies within ``kappa`` robust deviations
(1.4826 times the median distance from the median) of the median over the channels.

The authors' code and the paper's equations could not be had: the rule that allocates bits and the clipping are this
package's reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized
from methodbench_quant.vit.relevance import relevance
from methodbench_quant.vit.repq_vit import (
    LogSqrt2,
    encoded,
    fold_channels,
    range_grid,
    require_foldable,
    search_range,
    search_uniform,
)
from methodbench_quant.vit.sites import Draft, Site, Uniform, calibration_images

#: Makes the median distance from the median a standard deviation, for normal values.
_MAD = 1.4826


@hyperparameters
class LRPQViT:
    """Quantizes weights and activations of every Linear, convolution and attention product, each layer to its bits."""

    target_bits: Annotated[
        float, Field(ge=2, le=8, description="average bits of the blocks' weights, at most")
    ] = 4.0
    candidates: Annotated[
        tuple[int, ...], Field(min_length=1, description="bits that a layer may have, in rising order")
    ] = (3, 4, 5, 6, 7, 8)
    product_bits: Annotated[
        int, Field(ge=2, le=8, description="bits of the operands of attention's products, simulated")
    ] = 4
    edge_bits: Annotated[
        int, Field(ge=2, le=8, description="bits of layers outside of the blocks, and of their inputs")
    ] = 8
    scores: Annotated[
        Literal["relevance", "equal", "inverted"], Field(description="what bits follow; others are controls")
    ] = "relevance"
    granularity: Annotated[
        Literal["layer", "block"], Field(description="whether the layers of a block share their bits")
    ] = "layer"
    score_images: Annotated[int, Field(ge=1, le=4096, description="images for the scores")] = 64
    kappa: Annotated[
        float,
        Field(gt=0, description="robust deviations that a channel's range may lie off; inf: no clipping"),
    ] = 6.0
    percentiles: Annotated[
        tuple[float, ...],
        Field(min_length=1, description="upper ends of the ranges that are tried, in order"),
    ] = (0.999, 0.9999, 0.99999)
    calibration_images: Annotated[int, Field(ge=1, le=4096, description="images in the one batch")] = 32

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0.5 < p <= 1 for p in self.percentiles):
            raise ValueError("percentiles are shares above 0.5 and up to 1, such as 0.999")
        if list(self.candidates) != sorted(set(self.candidates)) or not set(self.candidates) <= {
            *range(2, 9)
        }:
            raise ValueError("candidates are rising bits from 2 to 8, such as [2, 3, 4, 5, 6]")
        if self.candidates[0] > self.target_bits:
            raise ValueError("target_bits must not lie below the least of candidates")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized; its weights are packed where all widths allow.

        Raises:
            NotApplicableError: no calibration images, or not a pre-norm vision transformer.
            DivergedError: an activation or a weight for which no finite scale exists.
        """
        images = calibration_images(model, data, self.calibration_images, ctx)
        with ctx.phase("relevance"):
            bits = self.allocate(model, calibration_images(model, data, self.score_images, ctx))

        def quantize_weight(weight: Tensor, name: str) -> Quantized:
            width = bits.get(name, self.edge_bits)
            grid = search_uniform(weight, width, self.percentiles, f"a row of the weight of {name}")
            return encoded(weight, grid, width)

        def fit_activation(x: Tensor, site: Site) -> nn.Module:
            if site.kind == "softmax":
                return LogSqrt2.searched(x, self.product_bits, self.percentiles, str(site))
            operand = site.kind in ("query", "key", "value")
            width = self.product_bits if operand else bits.get(site.name, self.edge_bits)
            per_channel = site.kind == "normed"
            grouped = x.flatten(0, -2).T if per_channel else x.flatten()
            low, high = search_range(grouped, width, self.percentiles, str(site))
            if per_channel:
                low, high = clipped(low, self.kappa), clipped(high, self.kappa)
            grid = range_grid(low, high, width)
            assert grid.zero is not None
            return Uniform(grid.scale.squeeze(-1), grid.zero.squeeze(-1), width)

        draft = Draft(model, quantize_weight, fit_activation)
        require_foldable(draft)
        with ctx.phase("calibration"):
            draft.calibrate(images)
        with ctx.phase("reparameterization"):
            fold_channels(draft, model, draft.requantize)
        return draft.finish({"activations": "as the weights, simulated", "bits": bits})

    def allocate(self, model: LoadedModel, images: Tensor) -> dict[str, int]:
        """Return the bits of every layer of the blocks of ``model``, by dotted name."""
        sizes = {
            name: layer.get_parameter("weight").numel()
            for name, layer in model.adapter.targets(model.module).items()
        }
        scores = dict.fromkeys(sizes, 1.0)
        if self.scores != "equal":
            found = relevance(model, images).layers
            scores = {name: float(found[name].mean()) for name in sizes}
        if self.scores == "inverted":
            scores = {name: 1 / score for name, score in scores.items()}
        groups = [[name] for name in sizes]
        if self.granularity == "block":
            prefixes = model.adapter.block_names(model.module)
            groups = [[name for name in sizes if name.startswith(f"{prefix}.")] for prefix in prefixes]
        widths = allocate_bits(
            [sum(scores[name] for name in group) for group in groups],
            [sum(sizes[name] for name in group) for group in groups],
            self.candidates,
            self.target_bits,
        )
        return {name: width for group, width in zip(groups, widths, strict=True) for name in group}


def allocate_bits(
    scores: Sequence[float], sizes: Sequence[int], candidates: Sequence[int], target: float
) -> list[int]:
    """Return the bits of every layer, their average over all weights at most ``target``.

    Args:
        scores: what each layer contributes, above 0.
        sizes: its weights.
        candidates: bits in rising order; the first of them is at most ``target``.
    """
    budget = target * sum(sizes) - candidates[0] * sum(sizes)
    chosen = [0] * len(scores)
    while True:
        best, most = None, 0.0
        for layer, (score, size) in enumerate(zip(scores, sizes, strict=True)):
            if chosen[layer] + 1 == len(candidates):
                continue
            now, then = candidates[chosen[layer]], candidates[chosen[layer] + 1]
            gain = score * (2.0 ** (-2 * now) - 2.0 ** (-2 * then)) / (size * (then - now))
            if size * (then - now) <= budget and gain > most:
                best, most = layer, gain
        if best is None:
            return [candidates[index] for index in chosen]
        budget -= sizes[best] * (candidates[chosen[best] + 1] - candidates[chosen[best]])
        chosen[best] += 1


def clipped(bounds: Tensor, kappa: float) -> Tensor:
    """Return one end of the channels' ranges [C, 1], limited to ``kappa`` robust deviations off their median."""
    if kappa == float("inf"):
        return bounds
    middle = bounds.median()
    deviation = _MAD * (bounds - middle).abs().median()
    return bounds.clamp(middle - kappa * deviation, middle + kappa * deviation)
