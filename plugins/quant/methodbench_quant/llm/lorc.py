"""LoRC: low-rank compensation of quantization errors (ZeroQuant-V2, Yao et al., AAAI 2024).

Whatever quantizer made ``W^`` of a weight ``W`` [n, d], the error that is left is replaced by its best approximation
of rank ``m``, kept as two thin matrices beside the quantized weight::

    E = W - W^ = U S V^T,   A = U_m S_m^(1/2)  [n, m],   B = S_m^(1/2) V_m^T  [m, d],   y = x (W^ + A B)^T

The square root splits the singular values evenly, so that both factors can be rounded to 8 bits. No data is needed
beyond what the base quantizer asks for. Fine-grained quantization (FGQ) is a group size for weights
(``group_size``) and for activations (``a_group_size``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import unfuse_experts
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench.torchkit.packed import FORMATS, PackedLayer, PackedLinear
from methodbench.torchkit.quantizers import quantize
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.layers import finished, weight_of
from methodbench_quant.llm.rtn import RTN
from methodbench_quant.llm.settings import ActivationSettings, Bits, GroupSize, check_group_size


@hyperparameters
class LoRC(ActivationSettings):
    """Quantizes every Linear in the blocks with a base method and adds the low-rank part of what it lost."""

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: Annotated[bool, Field(description="grid without zero point")] = False
    base: Annotated[Literal["rtn", "gptq"], Field(description="the quantizer that is compensated")] = "rtn"
    convention: Annotated[
        Literal["awq_asym", "gptq"],
        Field(description="how a grid of rtn follows from the extremes; gptq has its own"),
    ] = "awq_asym"
    rank: Annotated[int, Field(ge=0, description="singular values kept; 0 for the base method alone")] = 8
    factor_bits: Annotated[Literal[8, 16], Field(description="bits of the two factors")] = 16

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers that carry low-rank factors.

        Behind another quantizer of a chain, what that has rounded is compensated and the base method is not used.

        Args:
            data: calibration inputs, which only the base ``gptq`` looks at.

        Raises:
            NotApplicableError: a layer's width is no multiple of ``group_size``; no calibration inputs for gptq.
            DivergedError: weights or calibration activations are not finite.
        """
        result, unrounded = self._rounded(model, data, ctx)
        before = after = 0.0
        for name, layer in result.adapter.targets(result.module).items():
            assert isinstance(layer, PackedLayer)
            error = unrounded[name] - layer.dequantize().float()
            left, right = low_rank(error, self.rank)
            before += float(error.square().sum())
            if left.shape[1]:
                compensated = LowRankLayer.from_quantized(Compensated(layer, left, right, self.factor_bits))
                set_submodule(result.module, name, compensated.train(layer.training))
                error = error - compensated.product()
            after += float(error.square().sum())
        facts = {"error_before": before, "error_after": after, **self.quantize_activations(result)}
        return finished(result, facts)

    def _rounded(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> tuple[LoadedModel, dict[str, Tensor]]:
        """Return the quantized model, and the fp32 weights [out, in] that it was rounded from, by layer."""
        layers = model.adapter.targets(model.module)
        kept = {name: getattr(layer, "unrounded", None) for name, layer in layers.items()}
        if layers and all(isinstance(weight, Tensor) for weight in kept.values()):
            return model.clone(), {
                name: weight.float() for name, weight in kept.items() if weight is not None
            }
        dense = model.clone()
        unfuse_experts(dense.module)
        weights = {name: weight_of(layer) for name, layer in dense.adapter.targets(dense.module).items()}
        return self._base().compress(model, data, ctx), weights

    def _base(self) -> RTN | GPTQ:
        if self.base == "gptq":
            return GPTQ(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        return RTN(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            convention=self.convention,
        )


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``A`` [n, m] and ``B`` [m, d] whose product is the best approximation of ``error`` of that rank.

    Args:
        error: fp32 or fp64 [n, d].
        rank: ``m``, taken as ``min(n, d)`` where it exceeds that.
    """
    m = min(rank, *error.shape)
    if not m:
        return error.new_zeros(error.shape[0], 0), error.new_zeros(0, error.shape[1])
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    root = s[:m].sqrt()
    return u[:, :m] * root, root[:, None] * vt[:m]


@dataclass(frozen=True, slots=True)
class Compensated:
    """A packed layer and the factors ``left`` [n, m] and ``right`` [m, d] that are added to its weight."""

    base: PackedLayer
    left: Tensor
    right: Tensor
    factor_bits: int


class LowRankLayer(PackedLayer):
    """A packed layer plus two factors: ``W = W_base + left @ right``.

    Submodule ``base``; buffers ``left`` fp16 [out, rank] and ``right`` fp16 [rank, in], or 8-bit packed layers of
    these shapes, one scale per row.
    """

    format = "low-rank"
    stores = Compensated
    exact = ("left", "right")

    left: Any
    right: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        base: Mapping[str, Any],
        rank: int,
        *,
        factors: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        """``base`` and ``factors`` are configurations of packed layers; without ``factors`` they are fp16."""
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.base = _empty(base)
        self.rank = rank
        self.packed = factors is not None
        shapes = {"left": (out_features, rank), "right": (rank, in_features)}
        for name, config in zip(shapes, factors or (None, None), strict=True):
            if config is None:
                self.register_buffer(name, torch.zeros(shapes[name], dtype=torch.float16))
            else:
                self.add_module(name, _empty(config))

    @classmethod
    def from_quantized(
        cls, quantized: Compensated, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Take over the packed layer: its bias (unless ``bias`` is given), dtype and quantizers."""
        base = quantized.base
        bias = base.bias if bias is None else bias
        parts: list[Any] = [quantized.left.half().contiguous(), quantized.right.half().contiguous()]
        if quantized.factor_bits == 8:
            parts = [
                PackedLinear.from_quantized(quantize(part, 8, convention="absmax", symmetric=True))
                for part in (quantized.left, quantized.right)
            ]
        layer = cls(
            base.in_features,
            base.out_features,
            {**base.config, "bias": False},
            quantized.left.shape[1],
            factors=(parts[0].config, parts[1].config) if quantized.factor_bits == 8 else None,
            bias=bias is not None,
            dtype=str(dtype or base.dtype).removeprefix("torch."),
        )
        layer.base.to(quantized.left.device).load_state_dict(
            {k: v for k, v in base.state_dict().items() if k != "bias"}
        )
        layer.left, layer.right = parts
        layer.input_quantizer, layer.output_quantizer = base.input_quantizer, base.output_quantizer
        layer._set_bias(bias)
        return layer

    @property
    def config(self) -> dict[str, Any]:
        factors = (self.left.config, self.right.config) if self.packed else None
        return {**super().config, "base": self.base.config, "rank": self.rank, "factors": factors}

    @property
    def summary(self) -> str:
        return f"{self.base.summary}, rank {self.rank} beside it"

    def product(self) -> Tensor:
        """Return ``A B`` as the factors are stored, fp32 [out, in]."""
        left, right = (
            part.dequantize() if isinstance(part, PackedLayer) else part for part in (self.left, self.right)
        )
        return left.float() @ right.float()

    def dequantize(self) -> Tensor:
        return (self.base.dequantize().float() + self.product()).to(self.dtype)


def _empty(config: Mapping[str, Any]) -> PackedLayer:
    arguments = dict(config)
    kind = FORMATS[arguments.pop("format")]
    return kind(**arguments)
