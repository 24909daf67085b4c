"""ASFT: Anchored Supervised Fine-Tuning (Zhu et al., 2025, arXiv 2509.23753), with DFT (Wu et al., arXiv 2508.05629).

DFT weighs the cross entropy of every token by the probability that the model itself gives it, detached: demonstrations
that the model finds improbable get small gradients. ASFT adds the divergence from the frozen model that training
started from, which stops the drift that DFT shows. With p = softmax(logits)[y] and q the frozen model's softmax:

    sft      ℓ = -ln p                      dft      ℓ = -p̄ ln p              (p̄: without gradient)
    sft+kl   ℓ = -ln p + w KL(q ‖ softmax)  asft     ℓ = -p̄ ln p + w KL(q ‖ softmax)

The loss is the mean over the tokens that have a label.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.params import hyperparameters

if TYPE_CHECKING:
    from methodbench.context import Context

Mode = Literal["sft", "dft", "sft+kl", "asft"]


@hyperparameters
class ASFT:
    """Cross entropy weighed by the model's own probability, anchored to the start (paper, equation 8)."""

    mode: Annotated[
        Mode, Field(description="which loss: with the weight (dft, asft), with the anchor (+kl, asft)")
    ] = "asft"
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False, description="strength of the anchor, w")] = (
        0.05
    )

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return ``model`` beside a frozen copy of itself."""
        return Anchored(model)

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the loss of logits [..., V] for classes [...] that stand at the same places."""
        reference = model.reference_outputs if isinstance(model, Anchored) else None
        return anchored_loss(
            outputs.flatten(0, -2),
            targets.flatten(),
            None if reference is None else reference.flatten(0, -2),
            self.mode,
            self.kl_weight,
        )

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Leave the gradients alone."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Leave the weights alone."""


class Anchored(nn.Module):
    """A model, and what it was before training; while training, both see each input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        self.reference_outputs: Tensor | None = None

    def train(self, mode: bool = True) -> Anchored:
        """Set the model's mode; the reference stays in eval mode."""
        super().train(mode)
        self.reference.eval()
        return self

    def forward(self, x: Any) -> Tensor:
        """Return the model's outputs, and keep the reference's while training."""
        if self.training:
            with torch.no_grad():
                self.reference_outputs = self.reference(x)
        outputs: Tensor = self.model(x)
        return outputs


def anchored_loss(
    logits: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    mode: Mode,
    kl_weight: float,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean loss over the labelled rows, a scalar; 0 without any.

    Args:
        logits: of the model, float [N, V].
        labels: int64 [N]; ``ignore_index`` marks rows without one.
        reference: logits of the frozen model, [N, V]; needed by the modes with an anchor.
        mode: which loss.
        kl_weight: strength of the anchor.
    """
    valid = labels != ignore_index
    if not bool(valid.any()):
        return logits.sum() * 0
    log_p = F.log_softmax(logits[valid], -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = log_p.gather(-1, labels[valid].unsqueeze(-1)).squeeze(-1)
    losses = -chosen * (chosen.detach().exp() if mode in ("dft", "asft") else 1.0)
    if mode in ("sft+kl", "asft") and kl_weight:
        assert reference is not None, "a mode with an anchor needs the reference's logits"
        log_q = F.log_softmax(reference[valid].to(log_p.dtype), -1)
        losses = losses + kl_weight * (log_q.exp() * (log_q - log_p)).sum(-1)
    return losses.mean()
