"""Hyperparameters that quantizers of language models share: weights' bits and groups, activations, cache."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from methodbench.params import hyperparameters
from methodbench.torchkit.activations import ActivationQuantizer, quantize_cache, quantize_inputs
from methodbench.torchkit.model import LoadedModel

Bits = Annotated[int, Field(ge=2, le=8, description="weight bits")]
GroupSize = Annotated[
    int, Field(ge=-1, description="input columns that share a scale; -1 for one per output channel")
]


@hyperparameters
class ActivationSettings:
    """Rounding of the inputs of all layers, and of keys and values, at run time.

    A method that quantizes weights takes these fields by inheritance, so that W4A8, W4A4 and KV4 are settings
    of every such method.
    """

    a_bits: Annotated[int, Field(ge=2, le=16, description="activation bits; 16 leaves them alone")] = 16
    a_granularity: Annotated[
        Literal["token", "tensor"], Field(description="what shares an activation grid, found at run time")
    ] = "token"
    a_group_size: Annotated[
        int, Field(ge=-1, description="features of a token that share an activation grid; -1 for all")
    ] = -1
    a_convention: Annotated[
        Literal["absmax", "omni", "awq_asym"],
        Field(description="grid of activations: symmetric absmax, asymmetric omni or awq_asym"),
    ] = "absmax"
    kv_bits: Annotated[
        int, Field(ge=2, le=16, description="bits of keys (after the rotary embedding) and values; 16: off")
    ] = 16
    kv_convention: Annotated[
        Literal["absmax", "omni", "awq_asym"],
        Field(description="grid of keys and values, one per token and head"),
    ] = "omni"

    def quantize_activations(self, model: LoadedModel) -> dict[str, Any]:
        """Put the quantizers that the settings ask for into ``model``, and return what a record should say.

        Raises:
            NotApplicableError: the features of a layer are no multiple of ``a_group_size``; ``kv_bits`` on a
                model without a place for it.
        """
        facts = {}
        if self.a_bits < 16:
            quantize_inputs(model, lambda _: self.input_quantizer())
            facts["activations"] = f"{self.a_bits} bits, simulated"
        if self.kv_bits < 16:
            quantize_cache(model, self._cache_quantizer)
            facts["keys and values"] = f"{self.kv_bits} bits, simulated"
        return facts

    def input_quantizer(self) -> ActivationQuantizer:
        """Return a quantizer of the inputs of one layer."""
        return ActivationQuantizer(
            self.a_bits,
            granularity=self.a_granularity,
            group_size=self.a_group_size,
            convention=self.a_convention,
            symmetric=self.a_convention == "absmax",
        )

    def _cache_quantizer(self) -> ActivationQuantizer:
        return ActivationQuantizer(
            self.kv_bits, convention=self.kv_convention, symmetric=self.kv_convention == "absmax"
        )


def check_group_size(group_size: int, name: str = "group_size") -> None:
    """Raise ValueError for 0, the one value in range that means nothing."""
    if group_size == 0:
        raise ValueError(f"{name} is the number of columns that share a scale, or -1; it cannot be 0")


def check_convention(convention: str, symmetric: bool) -> None:
    """Raise ValueError for the convention that has no asymmetric grid, asked for one."""
    if convention == "absmax" and not symmetric:
        raise ValueError("the convention absmax is symmetric only: set symmetric to true")
