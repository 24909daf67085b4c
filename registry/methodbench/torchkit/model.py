"""Models as methods see them: a module, an adapter that knows its parts, and an honest account of its storage."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError

if TYPE_CHECKING:
    from methodbench.torchkit.adapters import Adapter

Storage = Literal["dense", "real", "simulated"]


@dataclass(slots=True)
class Preprocess:
    """How raw images become inputs: RGB in [0, 1], resized to ``size`` (height, width), then normalized."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    """Share of the shorter side that the centre crop keeps; the picture is resized to ``size / crop`` first."""
    interpolation: str = "bicubic"


@dataclass(slots=True)
class Calibration:
    """Inputs that a method may look at before it compresses.

    ``inputs`` is int64 token ids [sequences, tokens] or float images [images, channels, height, width].
    """

    inputs: Tensor
    source: str = ""
    """What the inputs are, for the record: data set, count, length, seed."""

    @classmethod
    def none(cls) -> Calibration:
        """No inputs, for methods that need none."""
        return cls(torch.empty(0))

    def __len__(self) -> int:
        return int(self.inputs.shape[0]) if self.inputs.numel() else 0


@dataclass(slots=True)
class LoadedModel:
    """A model in memory, in eval mode."""

    name: str
    kind: str
    module: nn.Module
    adapter: Adapter
    tokenizer: Any = None
    """A Hugging Face tokenizer, for language models."""
    preprocess: Preprocess | None = None
    """For image models."""
    classes: tuple[str, ...] = ()
    storage: Storage = "dense"
    """``real`` when the module's tensors hold the compressed form, ``simulated`` when they only imitate it."""
    accounted_bits: float | None = None
    """Bits per weight over the compressed layers that the method's own format would take."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the method found out (layers touched, scales chosen), kept with the record."""

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies, and inputs have to."""
        return next(self.module.parameters()).device

    def clone(self) -> LoadedModel:
        """Return a model with its own module tree whose tensors are shared with this one.

        Replace modules and parameters of the clone; never write into a tensor, since the original holds it too.
        """
        shared: dict[int, Any] = {id(t): t for t in self.module.parameters()}
        shared.update({id(t): t for t in self.module.buffers()})
        module = copy.deepcopy(self.module, shared)
        return dataclasses.replace(self, module=module, facts=dict(self.facts))


def set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of ``root`` at dotted path ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def set_weight(module: nn.Module, weight: Tensor, name: str = "weight") -> None:
    """Give ``module`` a parameter of its own in place of the shared one, with the same dtype and device."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(weight.detach().to(old), requires_grad=False))


@torch.no_grad()
def next_token_loss(model: LoadedModel, ids: Tensor) -> float:
    """Return the mean negative log-likelihood of the next token over ``ids`` [sequences, tokens], in nats.

    One sequence at a time, and all of its tokens enter the model: where a method treats the last share of a sequence
    in a way of its own, that share is what it is in use.

    Raises:
        NotApplicableError: the model gives no logits.
    """
    losses = []
    for row in ids.to(model.device):
        logits = getattr(model.module(row[None]), "logits", None)
        if logits is None:
            raise NotApplicableError(f"{model.name} gives no logits, so text has no loss")
        losses.append(nn.functional.cross_entropy(logits[0, :-1].float(), row[1:], reduction="none"))
    return float(torch.stack(losses).double().mean())
