"""QuaRot: outlier-free 4-bit inference in rotated LLMs (Ashkboos et al., NeurIPS 2024).

Few channels of the residual stream carry large activations and spoil every grid that spans a token. A random
orthogonal ``Q`` spreads them over all channels, and since norms without gain commute with it, it is absorbed
into the weights and the function stays. Two more Hadamard matrices run online, on the input of ``down`` and
across the heads that enter ``o``; keys and queries get one per head after the rotary embedding, where the cache
quantizes keys. With weights [out, in], gains folded in, ``H_n`` a Hadamard matrix over ``sqrt(n)``::

    E <- E Q     W_head <- W_head Q     W_q, W_k, W_v, W_gate, W_up <- W Q     W_o, W_down <- Q^T W
    W_down <- W_down H_f^T,  x <- x H_f^T          W_v^T <- W_v^T (I (x) H_dh),  W_o <- W_o H^T_(nh dh)
    x_o <- (H_nh (x) I) x_o                        q, k <- q H_dh, k H_dh   (because H_(nh dh) = H_nh (x) H_dh)

Then weights are rounded by GPTQ or to nearest, and activations, keys and values per token. Where the number of
heads has no Hadamard matrix, the whole input of ``o`` gets the one of its width instead. The authors' code also
centres the embeddings, which RMSNorm does not forgive entirely: ``subtract_embed_mean`` switches it off.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import ActivationQuantizer, quantize_inputs
from methodbench.torchkit.attention import Operand, transform_operands
from methodbench.torchkit.hadamard import hadamard_transform, has_hadamard, random_rotation
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.rotation import (
    AcrossHeads,
    Hadamard,
    ResidualStream,
    center_embeddings,
    check_preserved,
    double,
    fuse_norms,
    probe_logits,
    residual_stream,
    rotate_heads_in,
    rotate_heads_out,
    rotate_online,
    rotate_stream,
    transform_input,
)
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.layers import finished, open_copy
from methodbench_quant.llm.rtn import RTN
from methodbench_quant.llm.settings import check_group_size

Bits = Annotated[int, Field(ge=2, le=16)]
Share = Annotated[float, Field(gt=0, le=1, description="clipping: factor on the extremes of a grid")]
Group = Annotated[int, Field(ge=-1, description="entries that share a grid; -1 for a whole row or token")]


@hyperparameters
class QuaRot:
    """Rotates a decoder and rounds its weights, activations, keys and values; 16 bits leave a part alone."""

    rotate_mode: Annotated[
        Literal["hadamard", "random"], Field(description="Q: randomized Hadamard, or uniformly random")
    ] = "hadamard"
    subtract_embed_mean: Annotated[
        bool, Field(description="centre the embeddings first, as the authors' code does for every model")
    ] = True
    online_fp32: Annotated[bool, Field(description="online Hadamard products in float32")] = False
    w_bits: Annotated[Bits, Field(description="weight bits; 16 leaves weights alone")] = 16
    w_rounding: Annotated[
        Literal["gptq", "rtn"], Field(description="how weights are rounded: error feedback, or to nearest")
    ] = "gptq"
    w_group_size: Group = -1
    w_asym: Annotated[bool, Field(description="weight grids with a zero point")] = False
    w_clip: Annotated[bool, Field(description="search the clipping of every weight grid")] = False
    percdamp: Annotated[float, Field(gt=0, le=1, description="damping of GPTQ's Hessian")] = 0.01
    a_bits: Annotated[Bits, Field(description="bits of the inputs of all layers, per token")] = 16
    a_group_size: Group = -1
    a_asym: Annotated[bool, Field(description="activation grids with a zero point")] = False
    a_clip_ratio: Share = 1.0
    k_bits: Annotated[Bits, Field(description="bits of keys, after the rotary embedding")] = 16
    k_group_size: Group = -1
    k_asym: Annotated[bool, Field(description="key grids with a zero point")] = False
    k_clip_ratio: Share = 1.0
    v_bits: Annotated[Bits, Field(description="bits of values")] = 16
    v_group_size: Group = -1
    v_asym: Annotated[bool, Field(description="value grids with a zero point")] = False
    v_clip_ratio: Share = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("w", "a", "k", "v"):
            check_group_size(getattr(self, f"{name}_group_size"), f"{name}_group_size")
            if getattr(self, f"{name}_bits") in range(9, 16) and name == "w":
                raise ValueError("w_bits is 2 to 8, or 16 to leave the weights alone")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the rotated model, its weights packed where they are rounded; ``data`` serves GPTQ.

        Raises:
            NotApplicableError: a decoder that cannot be rotated; no calibration inputs for GPTQ; a layer's
                width is no multiple of a group size, or no order of a known Hadamard matrix.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        with ctx.phase("rotate"):
            model.facts["rotation_error"] = self.rotate(model, ctx.seed)
        model = self._round_weights(model, data, ctx) if self.w_bits < 16 else finished(model, {})
        if self.a_bits < 16:
            quantize_inputs(model, lambda _: self._quantizer("a"))
            model.facts["activations"] = f"{self.a_bits} bits, simulated"
        if min(self.k_bits, self.v_bits) < 16:
            transform_operands(model, lambda _: self._cache_transforms())
            model.facts["keys and values"] = f"{self.k_bits} and {self.v_bits} bits, simulated"
        return model

    @torch.no_grad()
    def rotate(self, model: LoadedModel, seed: int) -> float:
        """Rotate ``model`` in place and return how far that moves its logits (a share of their spread)."""
        stream = residual_stream(model)
        if self.subtract_embed_mean:
            center_embeddings(stream)
        before = probe_logits(model)
        fuse_norms(stream)
        generator = torch.Generator().manual_seed(seed)
        rotate_stream(stream, random_rotation(stream.width, self.rotate_mode, generator))
        for attention, feed_forward in stream.branches:
            self._rotate_values(model, stream, attention.readers, attention.writers)
            for name in feed_forward.writers:
                rotate_online(stream.module, name, fp32=self.online_fp32)
        return check_preserved(model, before)

    def _rotate_values(
        self, model: LoadedModel, stream: ResidualStream, readers: tuple[str, ...], writers: tuple[str, ...]
    ) -> None:
        values = [name for name in readers if model.adapter.role(name) == "v"]
        size = getattr(stream.module.get_submodule(writers[0].rpartition(".")[0]), "head_dim", None)
        if len(values) != 1 or len(writers) != 1 or not isinstance(size, int):
            raise NotApplicableError(
                f"{model.name} has no value layer of its own, or heads of unknown size",
                "QuaRot rotates decoders with separate query, key and value layers.",
            )
        value, output = (stream.module.get_submodule(name) for name in (values[0], writers[0]))
        weight = stream.weight(values[0])
        rotations = hadamard_transform(torch.eye(size, dtype=torch.float64, device=weight.device))[None]
        set_weight(value, rotate_heads_out(weight, rotations))
        if getattr(value, "bias", None) is not None:
            set_weight(value, rotate_heads_out(double(value.get_parameter("bias")), rotations), "bias")
        set_weight(output, rotate_heads_in(stream.weight(writers[0]), rotations))
        heads = int(output.in_features) // size  # type: ignore[arg-type]
        if has_hadamard(heads):
            weight = stream.weight(writers[0]).unflatten(1, (heads, size))
            set_weight(output, hadamard_transform(weight, 1).flatten(1))
            transform_input(stream.module, writers[0], Hadamard(heads, fp32=self.online_fp32))
        else:
            rotate_online(stream.module, writers[0], fp32=self.online_fp32)

    def _round_weights(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        grid: dict[str, Any] = {
            "bits": self.w_bits,
            "group_size": self.w_group_size,
            "symmetric": not self.w_asym,
            "convention": "gptq" if self.w_asym else "absmax",
            "mse": self.w_clip,
        }
        if self.w_rounding == "rtn":
            return RTN(**grid).compress(model, data, ctx)
        return GPTQ(**grid, percdamp=self.percdamp, true_sequential=True).compress(model, data, ctx)

    def _quantizer(self, part: Literal["a", "k", "v"]) -> nn.Module:
        asymmetric, group_size = getattr(self, f"{part}_asym"), getattr(self, f"{part}_group_size")
        # Extremes of a group are not widened to include zero, those of a token are.
        asymmetric_convention: Literal["gptq", "omni"] = "gptq" if group_size == -1 else "omni"
        return ActivationQuantizer(
            getattr(self, f"{part}_bits"),
            group_size=group_size,
            convention=asymmetric_convention if asymmetric else "absmax",
            symmetric=not asymmetric,
            clip=getattr(self, f"{part}_clip_ratio"),
        )

    def _cache_transforms(self) -> dict[Operand, nn.Module]:
        found: dict[Operand, nn.Module] = {}
        if self.k_bits < 16:
            found["query"] = Hadamard(fp32=True)
            found["key"] = nn.Sequential(Hadamard(fp32=True), AcrossHeads(self._quantizer("k")))
        if self.v_bits < 16:
            found["value"] = AcrossHeads(self._quantizer("v"))
        return found
