"""Top-k Transformer: the k largest neurons of every token, after the nonlinearity.

Li, You, Bhojanapalli, Li, Rawat, Reddi, Ye, Chern, Yu, Guo, Kumar, "The Lazy Neuron Phenomenon: On Emergence of
Activation Sparsity in Transformers", ICLR 2023, arXiv 2210.06313. No code of the authors is public.

Trained networks with ReLU use a few per cent of their hidden neurons for a token. Keeping a fixed small number of
them makes that explicit. For a token with pre-activations z::

    a = f(z)      a_i <- 0 unless a_i is among the k largest      y = W_2 a + b_2

The largest are meant, not those of largest magnitude: what is negative goes first. Gradients flow through what is
kept, the mask being a constant. A zero neuron spares its column of the second matrix, and its row of the up
projection in a gated network; the first matrix is read in full. Every token is masked; products are dense, unless
execution asks for sparse ones.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import (
    POSITIONS_HELP,
    Positions,
    feed_forwards,
    mask_neurons,
    site_sparsity,
)
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sparse_gemv import Execution, execute
from methodbench_sparse.cats import COUNTED_HELP


@hyperparameters
class LazyNeuron:
    """Keeps the largest neurons of every token in each feed-forward network."""

    k: Annotated[
        int, Field(ge=0, description="neurons kept per token, all where there are no more; 0 to keep a share")
    ] = 128
    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="where k is 0: share of neurons zeroed; see counted")
    ] = 0.5
    counted: Annotated[Literal["site", "model"], Field(description=COUNTED_HELP)] = "site"
    positions: Annotated[Positions, Field(description=POSITIONS_HELP)] = "all"
    execution: Execution = "masked"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with masked neurons; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: blocks without a feed-forward network whose activation function is a module, or a
                model-level sparsity that these networks cannot give.
        """
        networks = feed_forwards(model)
        level = self.sparsity
        if self.counted == "model" and not self.k:
            spared = {name: part for network in networks for name, part in network.spared.items()}
            level = site_sparsity(model, spared, self.sparsity)
        kept = {network: self.k or round(network.neurons * (1 - level)) for network in networks}
        sparse = model.clone()
        rules = [(network, Largest(min(kept[network], network.neurons))) for network in networks]
        mask_neurons(sparse, rules, self.positions)
        sparse.facts["neurons_kept"] = max(kept.values())
        shares = [min(1.0, keep / network.neurons) for network, keep in kept.items()]
        execute(sparse, self.execution, 1 - sum(shares) / len(shares))
        return sparse


class Largest(nn.Module):
    """Keeps the ``keep`` largest entries of every token, by value; ties go either way."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        """Return the mask of ``x`` [..., neurons], with ``keep`` True in every row."""
        largest = x.topk(self.keep, dim=-1, sorted=False).indices
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, largest, True)

    def extra_repr(self) -> str:
        return f"keep={self.keep}"
