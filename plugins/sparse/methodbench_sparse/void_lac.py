"""L2 adaptive computation (LAC): blocks that add little to the norm of a token's state are voids.

Shemiranifar, "Void in Language Models", arXiv 2505.14467; authors' code manishemirani/void_in_language_models
(3e2e830). For each token of a forward pass, with h_l the output of block l and h_-1 the input of the first::

    delta_l = ||h_l|| - ||h_l-1||        theta_0 = 0,  theta_l = alpha (max_j<l delta_j - min_j<l delta_j)

Block l is a void where delta_l < theta_l. Blocks still run on the true stream, and nothing is faster for it. In the
code, ``mode="final-state"``, a token leaves the last block with the output of its last active one: trailing voids have
an effect, those in the middle have none. ``residual-skip`` passes the input of a void on to the next block instead,
which is another model; ``trace`` changes nothing and counts. The usage that is recorded is the share of active blocks,
over the tokens of prompts and over single tokens (generation) apart.

With several sequences the code takes theta_0 over the batch; here each sequence is what it is alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import BlockUsage
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.masks import weight_matrix

Mode = Literal["final-state", "residual-skip", "trace"]


@hyperparameters
class VoidLAC:
    """Leaves out blocks whose outputs grow little, token by token."""

    alpha: Annotated[float, Field(ge=0, le=1, description="larger: more voids")] = 0.8
    mode: Annotated[Mode, Field(description="what becomes of a void's token")] = "final-state"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with watched blocks; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: the model has no blocks, or one whose output is not as wide as its input.
        """
        watched = model.clone()
        blocks = watched.adapter.blocks(watched.module)
        if not blocks or not all(
            keeps_width(list(watched.adapter.linears(block).values())) for block in blocks
        ):
            raise NotApplicableError(f"{model.name} has no blocks whose outputs are as wide as their inputs")
        watch(blocks, self.alpha, self.mode)
        watched.storage = "simulated"
        return watched


def keeps_width(linears: list[nn.Module]) -> bool:
    """Return whether the last Linear of a block gives as many channels as the first one takes."""
    if not linears:
        return False
    return weight_matrix(linears[0]).shape[1] == weight_matrix(linears[-1]).shape[0]


class Stream:
    """What is known of one forward pass up to a block. ``deltas`` and ``active`` hold one [batch, tokens] per block."""

    def __init__(self, alpha: float, mode: Mode) -> None:
        self.alpha = alpha
        self.mode = mode
        self.usage = BlockUsage()
        self.deltas: list[Tensor] = []
        self.active: list[Tensor] = []
        self._state = self._norm = self._high = self._low = torch.empty(0)

    def start(self, hidden: Tensor) -> None:
        """Begin a pass with the input of the first block, [batch, tokens, channels]."""
        self.deltas, self.active = [], []
        self._state, self._norm = hidden, hidden.norm(dim=-1)

    def advance(self, hidden: Tensor) -> Tensor:
        """Take the output of the next block, and return the state: each token's output of its last active block."""
        norm = hidden.norm(dim=-1)
        delta = norm - self._norm
        theta = self.alpha * (self._high - self._low) if self.deltas else torch.zeros_like(delta)
        active = delta >= theta
        self._high = torch.maximum(self._high, delta) if self.deltas else delta
        self._low = torch.minimum(self._low, delta) if self.deltas else delta
        self.deltas.append(delta)
        self.active.append(active)
        self.usage.count(active)
        self._state = torch.where(active[..., None], hidden, self._state)
        self._norm = self._state.norm(dim=-1) if self.mode == "residual-skip" else norm
        return self._state


class Watch:
    """Forward hook of one block."""

    def __init__(self, stream: Stream, *, first: bool, last: bool) -> None:
        self.stream = stream
        self.first = first
        self.last = last

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what the block hands on, in the form of ``output``: a tensor, or a tuple that begins with one."""
        hidden = output[0] if isinstance(output, tuple) else output
        if self.first:
            self.stream.start(args[0] if args else next(iter(kwargs.values())))
        state = self.stream.advance(hidden)
        passed_on = {"final-state": self.last, "residual-skip": True, "trace": False}[self.stream.mode]
        if not passed_on:
            return output
        return (state, *output[1:]) if isinstance(output, tuple) else state


def watch(blocks: list[nn.Module], alpha: float, mode: Mode) -> Stream:
    """Hook ``blocks``, in order, in place, and return their common stream."""
    stream = Stream(alpha, mode)
    for index, block in enumerate(blocks):
        hook = Watch(stream, first=index == 0, last=index == len(blocks) - 1)
        block.register_forward_hook(hook, with_kwargs=True)
    object.__setattr__(blocks[0], "usage", stream.usage)
    return stream
