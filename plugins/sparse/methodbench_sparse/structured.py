"""Structured pruning of feed-forward networks: neurons go with their weights, and smaller dense layers stay."""

from __future__ import annotations

from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.activation_sparsity import FeedForward, feed_forwards
from methodbench.torchkit.model import LoadedModel, set_submodule

DENOMINATOR = "hidden neurons of the feed-forward networks; attention, embeddings and head keep their size"


def gated_networks(model: LoadedModel) -> list[FeedForward]:
    """Return the feed-forward network of every block.

    Raises:
        NotApplicableError: a block has none, more than one (experts), or one without a gate.
    """
    networks = feed_forwards(model)
    blocks = model.adapter.block_names(model.module)
    if [network.block for network in networks] != blocks or not all(network.up for network in networks):
        raise NotApplicableError(
            f"{model.name} has not one feed-forward network of gate, up and down projection in every block"
        )
    return networks


def cut(model: LoadedModel, network: FeedForward, mask: Tensor) -> None:
    """Replace the three projections of ``network`` by those of the neurons in ``mask``, in place."""
    index = mask.nonzero().flatten()
    for name, dim in ((network.first, 0), (network.up, 0), (network.down, 1)):
        set_submodule(model.module, name, part_of(model.module.get_submodule(name), index, dim))


def part_of(linear: nn.Module, index: Tensor, dim: int) -> nn.Linear:
    """Return the Linear of some outputs (``dim`` 0) or inputs (1) of ``linear``, those at ``index``, in their order."""
    weight = linear.get_parameter("weight").detach().index_select(dim, index)
    bias = getattr(linear, "bias", None)
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        kept_bias = bias.detach().index_select(0, index) if dim == 0 else bias.detach()
        part.register_parameter("bias", nn.Parameter(kept_bias, requires_grad=False))
    return part.train(linear.training)


class FeedForwardPart(nn.Module):
    """Some neurons of a gated network."""

    def __init__(
        self, gate: nn.Module, up: nn.Module, down: nn.Module, act: nn.Module, index: Tensor
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = part_of(gate, index, 0), part_of(up, index, 0)
        self.down_proj = part_of(down, index, 1)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        """Return their part of the network's output."""
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


def record_widths(model: LoadedModel, networks: list[FeedForward]) -> LoadedModel:
    """Put the neurons that are left into the facts of ``model``, and return it.

    Args:
        networks: as they were in the dense model.
    """
    widths = [
        int(model.module.get_submodule(network.down).get_parameter("weight").shape[1]) for network in networks
    ]
    model.storage = "real"
    model.facts |= {
        "neurons_cut_share": 1 - sum(widths) / sum(network.neurons for network in networks),
        "neurons_left": widths,
        "neurons_denominator": DENOMINATOR,
    }
    return model
