"""aTLAS: Knowledge Composition using Task Vectors with Learned Anisotropic Scaling (Zhang et al., NeurIPS 2024,
arXiv 2407.02880).

K task vectors, each the difference of fine-tuned from pre-trained weights, are added to the frozen pre-trained model
with one learned coefficient per vector and parameter tensor, in place of one per vector. K times the number of tensors
are all that is trained.

    θ_i = θ0_i + Σ_k c_{k,i} τ_{k,i},    c = 0 at the start

``granularity="scalar"`` has one coefficient per vector, task arithmetic with learned coefficients. An optional penalty
γ mean_i ‖c_{:,i}‖_p keeps the coefficients sparse or small. Buffers stay those of the pre-trained model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters

if TYPE_CHECKING:
    from methodbench.context import Context


@hyperparameters
class ATLAS:
    """Learned coefficients of task vectors, one per vector and tensor (paper, equation 3)."""

    granularity: Annotated[
        Literal["block", "scalar"], Field(description="a coefficient per vector and tensor, or per vector")
    ] = "block"
    gamma: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="strength of the penalty on coefficients; 0 for none"),
    ] = 0.0
    p: Annotated[float, Field(ge=1, description="order of the penalty's norm")] = 1.0
    clip: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="largest norm of the coefficients' gradient")
    ] = 1.0

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return the composition of ``model`` with the task vectors that the task supplies.

        Raises:
            NotApplicableError: the task supplies no task vectors, they do not fit the model, or that has no parameters.
        """
        vectors = ctx.supplies.get("task-vectors")
        if not vectors:
            raise NotApplicableError("the task supplies no task vectors to compose")
        if next(model.parameters(), None) is None:
            raise NotApplicableError("the model has no parameters that task vectors could be added to")
        for index, vector in enumerate(vectors):
            for name, p in model.named_parameters():
                if name not in vector or vector[name].shape != p.shape:
                    raise NotApplicableError(
                        f"task vector {index} has nothing of the shape of the model's {name}"
                    )
        return Composition(model, vectors, self.granularity)

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the task's loss and the penalty."""
        if not self.gamma or not isinstance(model, Composition):
            return task_loss
        return task_loss + penalty(model.coefficients, self.p, self.gamma)

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Bound the gradient of the coefficients."""
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], self.clip)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Leave the coefficients alone."""


class Composition(nn.Module):
    """A frozen model plus task vectors times ``coefficients``: float [K, tensors], or [K]."""

    def __init__(self, model: nn.Module, vectors: Sequence[Mapping[str, Tensor]], granularity: str) -> None:
        super().__init__()
        self.model = model
        for p in self.model.parameters():
            p.requires_grad_(False)
        self.vectors = [{name: vector[name] for name, _ in model.named_parameters()} for vector in vectors]
        like = next(model.parameters())
        shape = (len(vectors), len(self.vectors[0])) if granularity == "block" else (len(vectors),)
        self.coefficients = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))

    def forward(self, x: Any) -> Tensor:
        """Return the outputs of the composed model."""
        outputs: Tensor = functional_call(self.model, self.composed(), (x,))
        return outputs

    def composed(self) -> dict[str, Tensor]:
        """Return the composed parameters by name."""
        found = {}
        for index, (name, p) in enumerate(self.model.named_parameters()):
            c = self.coefficients[:, index] if self.coefficients.ndim > 1 else self.coefficients
            found[name] = p + sum(
                (c[k] * vector[name] for k, vector in enumerate(self.vectors)), torch.zeros_like(p)
            )
        return found


def penalty(coefficients: Tensor, p: float, gamma: float) -> Tensor:
    """Return γ times the mean over tensors of the p-norms of coefficients [K, tensors]; [K] is one tensor's."""
    return gamma * coefficients.norm(p, dim=0).mean()
