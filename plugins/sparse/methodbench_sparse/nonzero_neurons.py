"""The lazy neuron phenomenon: how few hidden neurons a network uses for a token.

Li, You, Bhojanapalli, Li, Rawat, Reddi, Ye, Chern, Yu, Guo, Kumar, "The Lazy Neuron Phenomenon: On Emergence of
Activation Sparsity in Transformers", ICLR 2023, arXiv 2210.06313. No code of the authors is public.

In trained transformers with ReLU only a few per cent of the neurons are not zero for a token, fewer in larger models.
With a_ti the output of the activation function for token t and neuron i of a layer with d neurons::

    nonzero share = mean_t |{i: |a_ti| > eps}| / d       frequency_i = mean_t [|a_ti| > eps]

The paper counts with eps = 0, which says something of ReLU alone: SiLU and GELU are never exactly zero, so a share
without an eps is no measure of them, and the eps stands beside the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import feed_forwards, observed
from methodbench.torchkit.model import Calibration, LoadedModel


@hyperparameters
class NonzeroNeurons:
    """Counts the hidden neurons that are not zero; changes nothing."""

    eps: Annotated[
        float,
        Field(ge=0, description="magnitude up to which a neuron counts as zero; 0 for ReLU, as in the paper"),
    ] = 0.0

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        """Return ``nonzero`` (mean over layers), ``eps``, ``never-active`` and ``always-active`` (shares of neurons),
        and ``by-layer``.

        Raises:
            NotApplicableError: no inputs, or blocks without a feed-forward network whose activation function is a
                module.
        """
        if not len(data):
            raise NotApplicableError("neurons are counted on tokens, and there are none")
        networks = {network.activation: network for network in feed_forwards(model)}
        shares: list[float] = []
        frequencies: list[Tensor] = []
        smallest = torch.inf
        for (name,), tensors in observed(model, data, networks, "nonzero-neurons"):
            if not tensors:
                continue
            activation = model.module.get_submodule(name)
            with torch.no_grad():
                values = torch.cat([activation(z).flatten(0, -2) for z in tensors])
            smallest = min(smallest, float(values.abs().min()))
            counts = nonzeros(values, self.eps)
            shares.append(float(counts.double().mean()))
            frequencies.append(counts.double().mean(0))
        if not self.eps and smallest > 0:
            ctx.warn(
                "no neuron is ever exactly zero: this is no ReLU network, and without an eps all neurons count"
            )
        used = torch.cat(frequencies)
        return {
            "nonzero": float(np.mean(shares)),
            "eps": self.eps,
            "never-active": float((used == 0).double().mean()),
            "always-active": float((used == 1).double().mean()),
            "by-layer": np.array(shares),
        }


def nonzeros(activations: Tensor, eps: float = 0.0, tokens: Tensor | None = None) -> Tensor:
    """Return which neurons are not zero, bool [tokens, neurons].

    Args:
        activations: [..., neurons].
        tokens: bool, shaped like the leading dimensions: the tokens that count, all by default (no padding).
    """
    flat = activations.reshape(-1, activations.shape[-1])
    kept = flat if tokens is None else flat[tokens.flatten()]
    return kept.abs() > eps
