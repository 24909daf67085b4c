"""Relufication: ReLUs in place of smooth activation functions, and behind norms, and a short fine-tuning.

"ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models", ICLR 2024, arXiv 2310.04564; no code of
the authors is public.

- stage 1: every feed-forward network gets a ReLU (of the gate, where it has one): inputs of the down projection are
  sparse;
- stage 2: in addition ``ReLU(norm(x))`` is what query, key and value, and gate and up projection read;
- ``ReLU(x - b)`` with b from where pre-activations lie is sparser still.

The paper then trains on 30 to 50 billion tokens. Here it is ``steps`` of AdamW on calibration text, which recovers a
part. Zeros are exact, and counted where they are read: a zero behind the activation function spares a row of the up
and a column of the down projection, one behind a norm a column of each of its readers.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import feed_forwards, mask_inputs, mask_neurons
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench.torchkit.nonlinearities import ShiftedReLU
from methodbench.torchkit.text_tuning import own_parameters, tune_on_text

Stage = Literal[0, 1, 2]


@hyperparameters
class Relufication:
    """Puts ReLUs into a language model and fine-tunes it."""

    stage: Annotated[
        Stage, Field(description="0: nothing; 1: feed-forward networks; 2: behind norms as well")
    ] = 1
    shift: Annotated[float, Field(ge=0, le=100, description="b of ReLU(x - b), in feed-forward networks")] = (
        0.0
    )
    steps: Annotated[int, Field(ge=0, le=1_000_000, description="steps of fine-tuning; 0: none")] = 100
    lr: Annotated[float, Field(gt=0, le=1, description="learning rate of AdamW")] = 1e-4
    tokens: Annotated[int, Field(ge=2, le=100_000, description="tokens of a step")] = 256

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with ReLUs; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no feed-forward network whose activation function is a module; for stage 2, blocks
                without one norm before each half; for fine-tuning, no calibration text.
            DivergedError: fine-tuning diverged.
        """
        sparse = model.clone()
        if not self.stage:
            return sparse
        rectify(sparse, self.stage, self.shift)
        if self.steps:
            with ctx.phase("fine-tuning"):
                tune_on_text(
                    sparse,
                    data,
                    own_parameters(sparse.module),
                    steps=self.steps,
                    lr=self.lr,
                    tokens=self.tokens,
                    generator=torch.Generator().manual_seed(ctx.seed),
                )
        readers = norm_readers(sparse) if self.stage == 2 else {}
        mask_neurons(sparse, ((network, Nonzero()) for network in feed_forwards(sparse)), "all")
        mask_inputs(sparse, {name: Nonzero() for names in readers.values() for name in names}, "all")
        return sparse


class Nonzero(nn.Module):
    """The rule that keeps what is not zero: it changes nothing, and is counted."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mask of ``x`` [..., channels]."""
        return x != 0


class RectifiedNorm(nn.Module):
    """``ReLU(norm(x))``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified output of the norm, of the shape of ``x``."""
        return torch.relu(self.norm(x))


def rectify(model: LoadedModel, stage: Stage, shift: float) -> None:
    """Put the ReLUs of ``stage`` into ``model``, in place.

    Raises:
        NotApplicableError: see :meth:`Relufication.compress`.
    """
    if stage >= 1:
        for network in feed_forwards(model):
            set_submodule(model.module, network.activation, ShiftedReLU(shift))
    if stage == 2:
        for name in norm_readers(model):
            set_submodule(model.module, name, RectifiedNorm(model.module.get_submodule(name)))


def norm_readers(model: LoadedModel) -> dict[str, tuple[str, ...]]:
    """Return the norms before attention and feed-forward networks, by full name, with the Linears that read each.

    Raises:
        NotApplicableError: a block has not one norm before each of its halves.
    """
    adapter, found = model.adapter, {}
    layout = adapter.layout
    for block_name, block in zip(
        adapter.block_names(model.module), adapter.blocks(model.module), strict=True
    ):
        parts = dict(block.named_children())
        norms = [name for name in layout.feed_forward_norms if name in parts] if layout is not None else []
        if layout is None or layout.attention_norm not in parts or not norms:
            raise NotApplicableError(
                f"{block_name} of {model.name} has not one norm before each of its halves"
            )
        if not getattr(block, "do_layer_norm_before", True):
            raise NotApplicableError(f"the norms of {model.name} stand behind its halves, not before them")
        linears = [(name, adapter.role(name)) for name in adapter.linears(block)]
        for norm, roles in ((layout.attention_norm, {"q", "k", "v", "qkv"}),
                            (norms[0], {"gate", "up", "gate_up", "fc1"})):  # fmt: skip
            found[f"{block_name}.{norm}"] = tuple(
                f"{block_name}.{name}" for name, role in linears if role in roles
            )
    return found


def aggregated_sparsity(activations: Tensor) -> Tensor:
    """Return, for every t, the share of neurons that no token up to t has used: float64 [tokens].

    Args:
        activations: [tokens, neurons]; a neuron is used where it is not zero.
    """
    used = (activations != 0).cumsum(0) > 0
    return 1 - used.double().mean(1)
