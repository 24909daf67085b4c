"""Percentile quantization of vision transformers: RepQ-ViT's search for scales, and nothing else of it.

Every weight row and every activation tensor, attention probabilities included, has the uniform grid between two
percentiles that has the least squared error, see :func:`methodbench_quant.vit.repq_vit.search_uniform`. What RepQ-ViT
gains beyond this comes from its reparameterization and its logarithmic levels.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.vit.repq_vit import RepQViT


@hyperparameters
class PercentileViT:
    """Quantizes weights and activations of every Linear, convolution and attention product."""

    w_bits: Annotated[int, Field(ge=2, le=8, description="weight bits; packed at 2, 3, 4 and 8")] = 8
    a_bits: Annotated[int, Field(ge=2, le=8, description="activation bits, simulated")] = 8
    image_bits: Annotated[
        int, Field(ge=2, le=8, description="bits of the input of the first convolution")
    ] = 8
    percentiles: Annotated[
        tuple[float, ...],
        Field(min_length=1, description="upper ends of the ranges that are tried, in order"),
    ] = (0.999, 0.9999, 0.99999)
    calibration_images: Annotated[int, Field(ge=1, le=4096, description="images in the one batch")] = 32

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._method()
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` quantized, its weights packed where their width allows.

        Raises:
            NotApplicableError: no calibration images, or not a vision transformer of plain attention.
            DivergedError: an activation or a weight that is constant between its percentiles, or not finite.
        """
        return self._method().compress(model, data, ctx)

    def _method(self) -> RepQViT:
        return RepQViT(
            w_bits=self.w_bits,
            a_bits=self.a_bits,
            image_bits=self.image_bits,
            percentiles=self.percentiles,
            reparameterize=False,
            softmax="uniform",
            calibration_images=self.calibration_images,
        )
