"""RTN: round to nearest, the zero line of every quantization paper.

Each weight becomes the nearest level of a uniform grid that the extremes of its group fix; layers are
independent of each other and no data is needed. With ``b`` bits, scale ``s`` and zero point ``z``::

    W_q = s * (clamp(round(W / s) + z, 0, 2^b - 1) - z)

``convention`` chooses how ``s`` and ``z`` follow from the extremes: papers differ, see
:mod:`methodbench.torchkit.quantizers`. Activations, keys and values may be rounded as well, by grids found at
run time.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import (
    Along,
    Quantized,
    find_grid_by_mse,
    groups_of,
    on_grid,
    quantize,
    require_finite,
)
from methodbench_quant.llm.layers import finished, open_copy, replace_linear, weight_of
from methodbench_quant.llm.settings import (
    ActivationSettings,
    Bits,
    GroupSize,
    check_convention,
    check_group_size,
)


@hyperparameters
class RTN(ActivationSettings):
    """Rounds the weights of every Linear in the blocks; embeddings, head and norms stay as they are."""

    bits: Bits = 4
    group_size: GroupSize = -1
    convention: Annotated[
        Literal["awq_asym", "gptq", "absmax", "omni"],
        Field(description="how a grid follows from the extremes"),
    ] = "awq_asym"
    symmetric: Annotated[bool, Field(description="grid without zero point")] = False
    along: Annotated[
        Along,
        Field(
            description="what a group runs along: input columns of an output channel, output rows of an "
            "input channel, or the whole tensor"
        ),
    ] = "input"
    mse: Annotated[bool, Field(description="search the clipping of every grid")] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        check_convention(self.convention, self.symmetric)
        if self.along == "tensor" and self.group_size != -1:
            raise ValueError("along = tensor leaves no group_size to choose: set it to -1")
        if self.mse and self.along != "input":
            raise ValueError("mse searches the clipping of groups along input columns only")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers; ``data`` is not looked at.

        Raises:
            NotApplicableError: a layer's width is no multiple of ``group_size``; a layer is quantized already.
            DivergedError: a weight holds NaN or infinity.
        """
        model = open_copy(model)
        for name in list(model.adapter.targets(model.module)):
            weight = weight_of(model.module.get_submodule(name))
            replace_linear(model.module, name, self.quantize(weight, name))
        return finished(model, self.quantize_activations(model))

    def quantize(self, weight: Tensor, name: str = "the weight") -> Quantized:
        """Return ``weight``, fp32 [out, in], rounded by these settings."""
        if self.mse:
            require_finite(weight, name)
            grouped = groups_of(weight, self.group_size, name)
            grid = find_grid_by_mse(grouped, self.bits, self.convention, symmetric=self.symmetric)
            return on_grid(grouped, grid, self.bits, name)
        return quantize(
            weight,
            self.bits,
            group_size=self.group_size,
            convention=self.convention,
            symmetric=self.symmetric,
            along=self.along,
            name=name,
        )
