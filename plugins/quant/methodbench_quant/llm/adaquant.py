"""AdaQuant: layer-wise calibration and integer programming for post-training quantization.

Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
2020 (arXiv 2006.10518; ICML 2021). Each layer's weight, bias and quantization ranges are moved by gradient
descent so that its output on a small calibration set stays; weights may go anywhere, not just up or down. An
integer program spends the bits: one precision per layer, at the least sum of measured loss increases under a
limit of size. Then only the biases are tuned against the dense model's predictions.
The maths is in :mod:`methodbench_quant.learned_ranges`.

Layers of convolutional networks are fitted by the same code (:mod:`methodbench_quant.vit.adaquant`); the paper's
para-normalization is for those among them that had batch norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss, set_submodule
from methodbench.torchkit.packed import materialized
from methodbench.torchkit.quantizers import require_finite
from methodbench.torchkit.sequential import BlockStep, walk
from methodbench_quant.learned_ranges import Fitted, QuantizedLinear, adaquant, allocate
from methodbench_quant.llm.calls import require_finite_inputs
from methodbench_quant.llm.layers import check_calibration, finished, open_copy, replace_linear, weight_of
from methodbench_quant.vit.adaquant import quantize_network


@hyperparameters
class AdaQuant:
    """Fits and rounds every Linear in the blocks; embeddings and head stay as they are."""

    bits: Annotated[Literal[2, 3, 4, 8], Field(description="weight bits, where size does not decide")] = 4
    a_bits: Annotated[
        int, Field(ge=2, le=16, description="bits of the layers' inputs, one static range each; 16: off")
    ] = 4
    iterations: Annotated[
        int, Field(ge=0, le=100_000, description="gradient steps per layer; 0 only rounds")
    ] = 1000
    batch: Annotated[int, Field(ge=1, description="tokens per gradient step")] = 50
    lr_w: Annotated[float, Field(ge=0, le=1, description="learning rate of weights")] = 1e-5
    lr_b: Annotated[float, Field(ge=0, le=1, description="learning rate of biases")] = 1e-3
    lr_qin: Annotated[float, Field(ge=0, le=10, description="learning rate of input ranges")] = 1e-1
    lr_qw: Annotated[float, Field(ge=0, le=10, description="learning rate of weight ranges")] = 1e-3
    sequential: Annotated[
        bool, Field(description="inputs from the layers quantized before, instead of the dense model's")
    ] = False
    size: Annotated[
        float | None,
        Field(gt=0, le=1, description="target size of the layers as a share of fp32; the program sets bits"),
    ] = None
    precisions: Annotated[
        tuple[Literal[2, 3, 4, 8], ...], Field(min_length=1, description="what the program chooses from")
    ] = (8, 4)
    unit: Annotated[
        Literal["layer", "block"], Field(description="what gets a precision of its own from the program")
    ] = "layer"
    loss_tokens: Annotated[
        int, Field(ge=2, description="calibration tokens on which loss increases are measured")
    ] = 512
    edge_bits: Annotated[
        int, Field(ge=2, le=8, description="convolutional networks: bits of the first layer and the last")
    ] = 8
    bn_passes: Annotated[
        int, Field(ge=0, le=100, description="convolutional networks: passes of para-normalization; 0: off")
    ] = 0
    bias_steps: Annotated[int, Field(ge=0, description="steps of bias tuning; 0: off")] = 0
    bias_lr: Annotated[float, Field(gt=0, le=10, description="learning rate of bias tuning")] = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError("precisions must differ from each other")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` with packed layers, calibrated on ``data`` (token ids, or images).

        Raises:
            NotApplicableError: no calibration inputs.
            ParameterError: no choice of ``precisions`` meets ``size``.
            DivergedError: weights or calibration activations are not finite.
        """
        if model.kind == "cnn":
            return quantize_network(self, model, data, ctx)
        dense, model = open_copy(model), open_copy(model)
        check_calibration(model, data, ctx)
        names = list(model.adapter.targets(model.module))
        bits: dict[str, int] = dict.fromkeys(names, self.bits)
        facts: dict[str, object] = {}
        if self.size is not None:
            with ctx.phase("allocation"):
                bits, facts = self._allocate(dense, data)
        generator = torch.Generator().manual_seed(ctx.seed)
        before, after, layers = 0.0, 0.0, 0
        for reference, step in zip(
            self._reference(dense, data),
            walk(model, data, propagate="compressed" if self.sequential else "dense"),
            strict=True,
        ):
            seen = reference.inputs
            for group in model.adapter.sequential_groups(step.block):
                changed = self._inputs(step, group) if self.sequential else {}
                for name in group:
                    full = f"{step.name}.{name}"
                    x = changed.get(name, seen.get(name))
                    if x is None or name not in seen:
                        ctx.warn(f"no calibration token reached {full}: it is rounded by its extremes")
                    elif len(x) != len(seen[name]):
                        # An expert whose tokens changed has no targets for them: the dense model's serve.
                        x = seen[name]
                    layer = model_linear(step.block, name)
                    fitted = self._fit(layer, x, seen.get(name), bits[full], generator, full, ctx)
                    before, after, layers = before + fitted.before, after + fitted.after, layers + 1
                    self._replace(step.block, name, fitted.layer)
        if self.bias_steps:
            with ctx.phase("bias tuning"):
                tune_biases(model, dense, data, self.bias_steps, self.bias_lr)
        facts |= {"mse_before": before / layers, "mse_after": after / layers}
        if self.a_bits < 16:
            facts["activations"] = f"{self.a_bits} bits, static, simulated"
        return finished(model, facts)

    def _reference(self, dense: LoadedModel, data: Calibration) -> Iterable[Reference]:
        """Yield, block by block, the inputs of the dense model's layers, [tokens, in] by name."""
        parts: dict[str, list[Tensor]] = {}

        def watch(block: nn.Module) -> Mapping[str, object]:
            parts.clear()
            return {name: parts.setdefault(name, []).append for name in dense.adapter.linears(block)}

        for _ in walk(dense, data, propagate="dense", observe=watch):  # type: ignore[arg-type]
            yield Reference({name: flat(values) for name, values in parts.items() if values})

    def _inputs(self, step: BlockStep, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the inputs of some layers of a partly quantized block, [tokens, in] by name."""
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        step.forward({name: values.append for name, values in parts.items()})
        return {name: flat(values) for name, values in parts.items() if values}

    def _fit(
        self,
        linear: nn.Linear,
        x: Tensor | None,
        x_dense: Tensor | None,
        bits: int,
        generator: torch.Generator,
        name: str,
        ctx: Context,
    ) -> Fitted:
        require_finite(weight_of(linear), name)
        layer = QuantizedLinear(weight_of(linear), linear.bias, bits, self.a_bits if x is not None else 16)
        if x is None or x_dense is None:
            return Fitted(layer, 0.0, 0.0)
        require_finite_inputs(x, name)
        require_finite_inputs(x_dense, name)
        layer.measure([x])
        with torch.no_grad():
            target = F.linear(x_dense, layer.weight, layer.bias)
        with ctx.phase("fitting"):
            return adaquant(
                layer,
                x,
                target,
                iterations=self.iterations,
                batch=self.batch,
                lr_w=self.lr_w,
                lr_b=self.lr_b,
                lr_qin=self.lr_qin,
                lr_qw=self.lr_qw,
                generator=generator,
            )

    def _replace(self, block: nn.Module, name: str, layer: QuantizedLinear) -> None:
        """Put the packed form of a fitted layer in its place; a tuned bias may come where there was none."""
        linear = model_linear(block, name)
        bias = layer.quantized_bias()
        if bias is None and self.bias_steps:
            bias = torch.zeros(linear.out_features, device=linear.weight.device)
        if bias is not None:
            changed = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            changed.weight = linear.weight
            changed.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
            set_submodule(block, name, changed.train(linear.training))
        packed = replace_linear(block, name, layer.quantized())
        packed.input_quantizer = layer.static_input()

    def _allocate(self, dense: LoadedModel, data: Calibration) -> tuple[dict[str, int], dict[str, object]]:
        """Return the precision of every layer by full name, and facts for the record."""
        targets = dense.adapter.targets(dense.module)
        units: dict[str, list[str]] = {}
        for block in dense.adapter.block_names(dense.module):
            for name in (name for name in targets if name.startswith(f"{block}.")):
                units.setdefault(block if self.unit == "block" else name, []).append(name)
        base = max(self.precisions)
        losses = loss_by_precision(dense, data, units, sorted(self.precisions), self.loss_tokens)
        increases = np.array(
            [
                [0.0 if p == base else losses[unit, p] - losses["", base] for p in self.precisions]
                for unit in units
            ]
        )
        sizes = [sum(weight_of(targets[name]).numel() for name in names) for names in units.values()]
        return self.spend(list(units.values()), increases, sizes)

    def spend(
        self, units: Sequence[Sequence[str]], increases: np.ndarray, sizes: Sequence[int]
    ) -> tuple[dict[str, int], dict[str, object]]:
        """Return the precision of every layer by name, as :func:`allocate` chooses, and facts for the record.

        Args:
            units: names of the layers that change together.
            increases: [units, precisions].
            sizes: weights of each unit.

        Raises:
            ParameterError: no choice of ``precisions`` meets ``size``.
        """
        assert self.size is not None
        found = allocate(increases, sizes, self.precisions, self.size)
        if found is None:
            least = min(self.precisions) / 32
            raise ParameterError(
                f"no choice of precisions {self.precisions} makes the layers {self.size:.3g} of their fp32 size",
                f"Set size to {least:.3g} or more, or add a lower precision.",
            )
        bits = {name: p for p, names in zip(found.precisions, units, strict=True) for name in names}
        counts = {str(p): list(bits.values()).count(p) for p in sorted(self.precisions)}
        return bits, {"layers_by_bits": counts, "loss_increase": found.objective, "size": found.size}


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs of one block's layers in the dense model, [tokens, in] by name."""

    inputs: dict[str, Tensor]


def model_linear(block: nn.Module, name: str) -> nn.Linear:
    """Return the Linear called ``name`` in ``block``."""
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors [..., features] as one, fp32 [tokens, features]."""
    return torch.cat([part.flatten(0, -2).float() for part in parts])


def loss_by_precision(
    dense: LoadedModel,
    data: Calibration,
    units: Mapping[str, Sequence[str]],
    precisions: Sequence[int],
    tokens: int,
) -> dict[tuple[str, int], float]:
    """Return the language-modelling loss with one unit of layers at a precision and all others at the highest.

    Layers are rounded by the extremes of their channels. The key ``("", highest)`` has none lowered.

    Args:
        units: layers by full name, in groups that change together.
        tokens: calibration tokens that are scored.

    Raises:
        NotApplicableError: the calibration inputs are no token ids.
    """
    if data.inputs.ndim != 2 or data.inputs.is_floating_point():
        raise NotApplicableError("loss increases are measured on token ids, which the task does not offer")
    ids = data.inputs[: max(1, tokens // data.inputs.shape[1]), : max(2, tokens)]
    model = dense.clone()
    base = max(precisions)
    originals = {name: weight_of(layer) for name, layer in dense.adapter.targets(dense.module).items()}

    def put(names: Iterable[str], bits: int) -> None:
        for name in names:
            layer = model_linear(model.module, name)
            rounded = QuantizedLinear(originals[name], None, bits, 16)
            with torch.no_grad():
                layer.weight = nn.Parameter(
                    rounded.weight_range(rounded.weight).to(layer.weight.dtype), requires_grad=False
                )

    put(originals, base)
    losses = {("", base): next_token_loss(model, ids)}
    for unit, names in units.items():
        for precision in precisions:
            if precision != base:
                put(names, precision)
                losses[unit, precision] = next_token_loss(model, ids)
        put(names, base)
    return losses


def tune_biases(model: LoadedModel, dense: LoadedModel, data: Calibration, steps: int, lr: float) -> None:
    """Tune the biases of the blocks' layers, in place, towards the dense model's predictions.

    Plain SGD on the Kullback-Leibler divergence of the next-token distributions, one calibration sequence a
    step, in their order.
    """
    biases = []
    for layer in model.adapter.targets(model.module).values():
        assert isinstance(layer.bias, nn.Parameter)
        biases.append(layer.bias.requires_grad_())
    optimizer = torch.optim.SGD(biases, lr=lr)
    device = biases[0].device
    with materialized(model.module):
        for i in range(steps):
            ids = data.inputs[i % len(data)][None].to(device)
            with torch.no_grad():
                wanted = dense.module(ids).logits.float().log_softmax(-1)
            given = model.module(ids).logits.float().log_softmax(-1)
            loss = F.kl_div(given, wanted, log_target=True, reduction="sum") / ids.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for bias in biases:
        bias.requires_grad_(False)
