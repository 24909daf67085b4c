"""RTN: round to nearest, the zero line of every quantization paper.

Each weight becomes the nearest level of a uniform grid that the extremes of its group fix; layers are
independent of each other and no data is needed. With ``b`` bits, scale ``s`` and zero point ``z``::

    W_q = s * (clamp(round(W / s) + z, 0, 2^b - 1) - z)

``convention`` chooses how ``s`` and ``z`` follow from the extremes: papers differ, see
:mod:`methodbench.torchkit.quantizers`. Activations may be rounded as well, by a grid per token found at run
time.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import ActivationQuantizer, quantize
from methodbench_quant.llm.layers import finished, open_copy, replace_linear, weight_of


@hyperparameters
class RTN:
    """Rounds the weights of every Linear in the blocks; embeddings, head and norms stay as they are."""

    bits: Annotated[Literal[2, 3, 4, 8], Field(description="weight bits")] = 4
    group_size: Annotated[
        int, Field(ge=-1, description="input columns that share a scale; -1 for one per output channel")
    ] = -1
    convention: Annotated[
        Literal["awq_asym", "gptq", "absmax", "omni"],
        Field(description="how a grid follows from the extremes"),
    ] = "awq_asym"
    symmetric: Annotated[bool, Field(description="grid without zero point")] = False
    a_bits: Annotated[int, Field(ge=2, le=16, description="activation bits; 16 leaves them alone")] = 16
    a_granularity: Annotated[
        Literal["token", "tensor"], Field(description="what shares an activation grid, found at run time")
    ] = "token"
    a_convention: Annotated[
        Literal["absmax", "omni"], Field(description="grid of activations: symmetric absmax, asymmetric omni")
    ] = "absmax"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        if self.convention == "absmax" and not self.symmetric:
            raise ValueError("the convention absmax is symmetric only: set symmetric to true")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers; ``data`` is not looked at."""
        model = open_copy(model)
        for name, layer in model.adapter.targets(model.module).items():
            quantized = quantize(
                weight_of(layer),
                self.bits,
                group_size=self.group_size,
                convention=self.convention,
                symmetric=self.symmetric,
                name=name,
            )
            replace_linear(model.module, name, quantized, input_quantizer=self._input_quantizer())
        simulated = {"activations": f"{self.a_bits} bits, simulated"} if self.a_bits < 16 else {}
        return finished(model, simulated)

    def _input_quantizer(self) -> ActivationQuantizer | None:
        if self.a_bits == 16:
            return None
        return ActivationQuantizer(
            self.a_bits,
            granularity=self.a_granularity,
            convention=self.a_convention,
            symmetric=self.a_convention == "absmax",
        )


def check_group_size(group_size: int) -> None:
    """Raise ValueError for 0, the one value in range that means nothing."""
    if group_size == 0:
        raise ValueError("group_size is the number of columns that share a scale, or -1; it cannot be 0")
