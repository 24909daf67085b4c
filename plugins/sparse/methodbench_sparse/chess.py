"""CHESS: thresholds per channel for the gate, and sparse inputs for two Linears of the attention.

He et al., "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification", EMNLP 2024,
arXiv 2409.01366; authors' code ZeonfaiHo/CHESS.

What is lost with a gate a_i is its product with the up projection u_i, so a gate matters as a_i^2 E[u_i^2]: channels
of large u keep smaller gates. In the attention only the inputs of the query and of the output projection are
sparse; key and value, which a cache keeps, see dense inputs. With quantile_s over tokens and channels::

    T = quantile_s(a_i^2 E[u_i^2])      t_i = sqrt(T / E[u_i^2])      a_i <- 0 unless |a_i| > t_i
    q = W_q (h [|h| > t_in])            o = W_o (z [|z| > t_out])     t_in, t_out = quantile_s(|h|), quantile_s(|z|)

Quantiles are averages of quantiles over groups of calibration windows; T is taken in a second pass, here over the
other half of the calibration text. Every token is masked. Products are dense, unless execution asks for
sparse ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import (
    POSITIONS_HELP,
    FeedForward,
    Positions,
    Threshold,
    block_linears,
    feed_forwards,
    mask_inputs,
    mask_neurons,
    match,
    observed,
    site_sparsity,
)
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sparse_gemv import Execution, execute
from methodbench_sparse.cats import COUNTED_HELP

#: Linears of the attention whose inputs are sparse.
SELECTED = ("q", "o")


@hyperparameters
class CHESS:
    """Zeroes gates by channel-wise thresholds, and small inputs of the query and output projections."""

    sparsity: Annotated[float, Field(ge=0, lt=1, description="share zeroed; see counted")] = 0.5
    counted: Annotated[Literal["site", "model"], Field(description=COUNTED_HELP)] = "site"
    selective: Annotated[
        bool, Field(description="also mask the inputs of the query and output projections (CHESS w/)")
    ] = True
    accumulate: Annotated[
        int, Field(ge=1, description="calibration sequences of which one quantile is taken")
    ] = 4
    positions: Annotated[Positions, Field(description=POSITIONS_HELP)] = "all"
    corrections: Annotated[
        int,
        Field(ge=0, le=8, description="times that the level is corrected by what calibration text measures"),
    ] = 0
    execution: Execution = "masked"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with masked gates and inputs; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: fewer than two calibration sequences, blocks without a gated network, without
                query or output projection, or a model-level sparsity out of reach.
        """
        if len(data) < 2:
            raise NotApplicableError(
                f"chess calibrates in two passes over different text, and the task gives {len(data)} sequences",
                "Set calibration_samples to 2 or more.",
            )
        networks = feed_forwards(model)
        if not all(network.up for network in networks):
            raise NotApplicableError(f"chess needs gated networks, and {model.name} has others")
        selected = [name for name in block_linears(model) if model.adapter.role(name) in SELECTED]
        if self.selective and len(selected) < 2 * len(model.adapter.block_names(model.module)):
            raise NotApplicableError(
                f"{model.name} has no query and output projection of its own in every block",
                "Set selective=false to leave attention dense.",
            )
        selected = selected if self.selective else []
        spared = {name: part for network in networks for name, part in network.spared.items()}
        spared |= dict.fromkeys(selected, 1.0)
        level = self.sparsity
        if self.counted == "model":
            level = site_sparsity(model, spared, self.sparsity)

        def install(sparse: LoadedModel, level: float) -> None:
            with ctx.phase("calibrate"):
                gates, inputs = self.thresholds(model, networks, selected, data, level)
            mask_neurons(sparse, [(n, Threshold(gates[n])) for n in networks if n in gates], self.positions)
            mask_inputs(sparse, {name: Threshold(t) for name, t in inputs.items()}, self.positions)

        corrections = self.corrections if self.counted == "model" else 0
        sparse, level = match(model, data, self.sparsity, level, install, corrections)
        sparse.facts |= {"sparsity_target": self.sparsity, "sparsity_level": level}
        execute(sparse, self.execution, level)
        return sparse

    def thresholds(
        self,
        model: LoadedModel,
        networks: Sequence[FeedForward],
        selected: Sequence[str],
        data: Calibration,
        level: float,
    ) -> tuple[dict[FeedForward, Tensor], dict[str, float]]:
        """Return the thresholds of the gates [neurons] and of the inputs of ``selected``, at a sparsity.

        The first half of ``data`` serves the first pass, the rest the second. A network that no token reached has
        none.
        """
        first = Calibration(data.inputs[: len(data) // 2], data.source)
        second = Calibration(data.inputs[len(data) // 2 :], data.source)
        up_inputs = {network.up: network for network in networks}
        squares: dict[FeedForward, Tensor] = {}
        inputs: dict[str, float] = {}
        for names, tensors in observed(model, first, [*selected, *up_inputs], "chess"):
            for name in names:
                if not tensors:
                    continue
                if name in up_inputs:
                    up = model.module.get_submodule(name)
                    with torch.no_grad():
                        squares[up_inputs[name]] = mean_square([up(x) for x in tensors])
                else:
                    inputs[name] = mean_quantile(grouped(tensors, self.accumulate), level)
        activations = {network.activation: network for network in networks}
        gates: dict[FeedForward, Tensor] = {}
        for (name,), tensors in observed(model, second, activations, "chess"):
            network = activations[name]
            if not tensors or network not in squares:
                continue
            activation: nn.Module = model.module.get_submodule(name)
            with torch.no_grad():
                steps = grouped([activation(z) for z in tensors], self.accumulate)
            gates[network] = channel_thresholds(steps, squares[network], level)
        return gates, inputs


def grouped(tensors: Sequence[Tensor], accumulate: int) -> list[Tensor]:
    """Return activations of ``accumulate`` sequences at a time, float32 [tokens, channels] each.

    Args:
        tensors: [sequences, tokens, channels] each, or [tokens, channels] without an order.
    """
    sequences = [part for x in tensors for part in (x.unbind(0) if x.dim() == 3 else [x])]
    return [
        torch.cat(sequences[start : start + accumulate]).float()
        for start in range(0, len(sequences), accumulate)
    ]


def mean_square(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean over tokens of the squares of ``tensors`` [..., channels], float32 [channels]."""
    flat = torch.cat([x.reshape(-1, x.shape[-1]).float() for x in tensors])
    return flat.square().mean(0)


def quantile(values: Tensor, share: float) -> Tensor:
    """Return the ``int(n share)``-th smallest of the n non-negative ``values`` (any shape); 0 where that count is 0."""
    count = int(values.numel() * share)
    return values.flatten().kthvalue(count).values if count else torch.zeros_like(values.flatten()[0])


def mean_quantile(steps: Sequence[Tensor], share: float) -> float:
    """Return the average over ``steps`` [tokens, channels] of the quantile of their magnitudes."""
    return float(torch.stack([quantile(step.abs(), share) for step in steps]).mean())


def importance_threshold(steps: Sequence[Tensor], squares: Tensor, share: float) -> Tensor:
    """Return T, the average over ``steps`` of the quantile of ``a^2 E[u^2]``, for ``squares`` [channels]."""
    return torch.stack([quantile(step.square() * squares, share) for step in steps]).mean()


def channel_thresholds(steps: Sequence[Tensor], squares: Tensor, share: float) -> Tensor:
    """Return ``t_i = sqrt(T / E[u_i^2])``, float32 [channels]; infinite where u_i is always zero.

    A share of 0 gives zeros: nothing but exact zeros is masked.
    """
    if share == 0:
        return torch.zeros_like(squares)
    t = (importance_threshold(steps, squares, share) / squares).sqrt()
    return t.masked_fill(squares == 0, torch.inf)
