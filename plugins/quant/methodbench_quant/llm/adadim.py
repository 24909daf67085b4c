"""AdaDim: groups along the output or the input, whichever a layer bears better (Heo et al., ICLR 2024).

Weights of one input channel that share a scale (``ic``: a group runs along the output rows of a column) keep the
damage of an outlier activation channel to that channel; groups along the input (``oc``) isolate rows instead. For
every Linear ``n``, in the order of the data flow, with the layers before it quantized already::

    dim = argmin over oc, ic of  mean || f(x; W) - f(x; Q_dim(W_n)) ||^2

``f`` is the attention or feed-forward module, or the Linear itself for the last layer of either; ties go to ``oc``.
The chosen layer is rounded to nearest, or by GPTQ with its columns in descending order of the Hessian's diagonal;
with ``ic`` the grids of a column are found at the moment it is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.compensation import Hessian, add_batch, inverse_factor
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.quantizers import Quantized, find_grid, groups_of, quantize, require_finite
from methodbench.torchkit.sequential import walk
from methodbench_quant.llm.calls import Recorder, count, output_of, require_finite_inputs, subset
from methodbench_quant.llm.gptq import gptq
from methodbench_quant.llm.layers import (
    check_calibration,
    finished,
    open_copy,
    replace_linear,
    weight_of,
)
from methodbench_quant.llm.settings import ActivationSettings, Bits, GroupSize, check_group_size

Dim = Literal["oc", "ic"]


@hyperparameters
class AdaDim(ActivationSettings):
    """Quantizes the weights of every Linear in the blocks along the dimension that costs least."""

    bits: Bits = 3
    group_size: GroupSize = 128
    base: Annotated[Literal["rtn", "gptq"], Field(description="how the chosen layer is rounded")] = "rtn"
    adaptive: Annotated[bool, Field(description="choose per layer; off for groups along the input")] = True
    search_tokens: Annotated[
        int,
        Field(ge=0, description="calibration tokens that judge a dimension; 0 for all, as the authors do"),
    ] = 1024
    percdamp: Annotated[
        float, Field(gt=0, le=1, description="damping of gptq, as a share of the Hessian's mean diagonal")
    ] = 0.01
    blocksize: Annotated[int, Field(ge=1, description="columns per lazy update of gptq")] = 128

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.group_size)
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers, calibrated on ``data`` (token ids or images).

        Raises:
            NotApplicableError: no calibration inputs; a layer's width or height is no multiple of
                ``group_size``.
            DivergedError: weights or calibration activations are not finite.
        """
        model = open_copy(model)
        check_calibration(model, data, ctx)
        for name, layer in model.adapter.targets(model.module).items():
            weight = weight_of(layer)
            require_finite(weight, name)
            groups_of(weight, self.group_size, name)
            if self.adaptive:
                groups_of(weight.T, self.group_size, name, "output")
        dims: dict[str, Dim] = {}
        recorder = Recorder(model.adapter, lambda block: inspected_modules(model.adapter, block))
        propagate: Literal["dense", "compressed"] = "dense" if self.base == "rtn" else "compressed"
        batch = max(1, min(2048, self.search_tokens or 2048) // data.inputs.shape[-1]) if len(data) else None
        for step in walk(
            model,
            data,
            propagate=propagate,
            observe=recorder.watch,
            batch_size=batch if data.inputs.ndim == 2 else None,
        ):
            recorder.stop()
            for name in model.adapter.linears(step.block):
                full_name = f"{step.name}.{name}"
                with ctx.phase("dimensions"):
                    dims[full_name] = self.choose(step.block, name, recorder)
                with ctx.phase("rounding"):
                    quantized = self.round(step.block, name, recorder, dims[full_name], full_name)
                replace_linear(step.block, name, quantized)
        along = sum(dim == "ic" for dim in dims.values())
        return finished(
            model, {"dims": dims, "groups along outputs": along, **self.quantize_activations(model)}
        )

    def choose(self, block: nn.Module, name: str, recorder: Recorder) -> Dim:
        """Return the dimension of the Linear called ``name``, given ``block`` as it is at this moment."""
        if not self.adaptive:
            return "oc"
        losses = self.losses(block, name, recorder)
        return "ic" if losses and losses["ic"] < losses["oc"] else "oc"

    def losses(self, block: nn.Module, name: str, recorder: Recorder) -> Mapping[Dim, float]:
        """Return the error of each dimension; empty for a layer that no token reached."""
        weight = weight_of(block.get_submodule(name))
        rounded: dict[Dim, Tensor] = {
            "oc": quantize(weight, self.bits, group_size=self.group_size, name=name).dequantize(),
            "ic": quantize(
                weight, self.bits, group_size=self.group_size, along="output", name=name
            ).dequantize(),
        }
        inspected = inspected_module(recorder.adapter, block, name)
        if not inspected:
            parts = subset(recorder.inputs.get(name, []), count, self.search_tokens)
            if not parts:
                return {}
            x = torch.cat([part.float().flatten(0, -2) for part in parts])
            require_finite_inputs(x, name)
            return {
                dim: float((x @ (weight - candidate).T).square().mean()) for dim, candidate in rounded.items()
            }
        module = block.get_submodule(inspected)
        calls = subset(recorder.calls[inspected], lambda call: count(call.hidden), self.search_tokens)
        parameter = f"{name.removeprefix(f'{inspected}.')}.weight"
        sums: dict[Dim, float] = {"oc": 0.0, "ic": 0.0}
        total = 0
        for call in calls:
            before = output_of(module, call)
            require_finite_inputs(before, name)
            total += before.numel()
            for dim, candidate in rounded.items():
                after = output_of(module, call, {parameter: candidate.to(before.dtype)})
                sums[dim] += float((before - after).float().square().sum())
        return {dim: value / total for dim, value in sums.items()}

    def round(self, block: nn.Module, name: str, recorder: Recorder, dim: Dim, full_name: str) -> Quantized:
        """Return the weight of the Linear called ``name``, quantized along ``dim``."""
        weight = weight_of(block.get_submodule(name))
        if self.base == "rtn" or name not in recorder.inputs:
            along: Literal["input", "output"] = "output" if dim == "ic" else "input"
            return quantize(weight, self.bits, group_size=self.group_size, along=along, name=full_name)
        hessian = Hessian(weight.new_zeros(weight.shape[1], weight.shape[1]))
        for x in recorder.inputs[name]:
            add_batch(hessian, x)
        return self.gptq(weight, hessian.matrix, dim, full_name)

    def gptq(self, weight: Tensor, hessian: Tensor, dim: Dim, name: str = "the weight") -> Quantized:
        """Return ``weight`` [out, in] rounded with error feedback, along ``dim``."""
        if dim == "ic":
            return gptq_per_input(
                weight,
                hessian,
                bits=self.bits,
                group_size=self.group_size,
                percdamp=self.percdamp,
                blocksize=self.blocksize,
                name=name,
            )
        return gptq(
            weight,
            hessian,
            bits=self.bits,
            group_size=self.group_size,
            percdamp=self.percdamp,
            blocksize=self.blocksize,
            act_order=True,
            static_groups=self.group_size != -1,
            name=name,
        ).quantized


def inspected_module(adapter: Adapter, block: nn.Module, name: str) -> str:
    """Return the module of ``block`` whose output judges the layer ``name``; empty for the layer itself."""
    layout, role = adapter.layout, adapter.role(name)
    if layout is None:
        return ""
    if role in ("q", "k", "v", "qkv") and name.startswith(f"{layout.attention}."):
        return layout.attention
    if role in ("gate", "up", "gate_up", "fc1"):
        return next((ffn for ffn in layout.feed_forward if ffn and name.startswith(f"{ffn}.")), "")
    return ""


def inspected_modules(adapter: Adapter, block: nn.Module) -> set[str]:
    """Return every module that :func:`inspected_module` names in ``block``."""
    return {inspected_module(adapter, block, name) for name in adapter.linears(block)} - {""}


def gptq_per_input(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    percdamp: float = 0.01,
    blocksize: int = 128,
    name: str = "the weight",
) -> Quantized:
    """Quantize one weight column by column, each in groups of rows whose grids are found when it is reached.

    Columns go in descending order of the Hessian's diagonal; grids follow the convention ``awq_asym``.

    Args:
        weight: fp32 [rows, columns].
        hessian: fp32 [columns, columns].
        group_size: rows that share a grid; -1 for all.

    Raises:
        NotApplicableError: ``rows`` is no multiple of ``group_size``.
        DivergedError: ``hessian`` cannot be factored.
    """
    rows, columns = weight.shape
    size = rows if group_size == -1 else group_size
    groups_of(weight.T, group_size, name, "output")
    dead = hessian.diagonal() == 0
    order = torch.argsort(hessian.diagonal().masked_fill(dead, 1.0), descending=True)
    upper, _ = inverse_factor(hessian[order[:, None], order], percdamp, name, dead=dead[order])
    outer = weight.T[order].contiguous()
    codes = torch.empty_like(outer)
    scales = outer.new_empty(columns, rows // size)
    zeros = torch.empty_like(scales)
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        errors = outer.new_empty(stop - start, rows)
        for j in range(start, stop):
            column = outer[j].view(-1, size)
            grid = find_grid(column, bits, "awq_asym")
            found = grid.encode(column)
            errors[j - start] = (column - grid.decode(found)).flatten() / upper[j, j]
            codes[j], scales[j] = found.flatten(), grid.scale.squeeze(-1)
            assert grid.zero is not None
            zeros[j] = grid.zero.squeeze(-1)
            outer[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        outer[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    back = torch.argsort(order)
    return Quantized(codes[back].to(torch.int16), scales[back], zeros[back], 0, bits, transposed=True)
