"""The plain published rules that every optimizer is compared with, from ``torch.optim``.

SGD with heavy-ball momentum (Polyak 1964) or Nesterov's (1983), Adam (Kingma and Ba, ICLR 2015, arXiv
1412.6980; AMSGrad: Reddi et al., ICLR 2018) and AdamW (Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101).
With gradient g:

    SGD     g ← g + λ θ;    b ← μ b + g (b = g at step 1);    θ ← θ - η b    (Nesterov: θ ← θ - η (g + μ b))
    Adam    g ← g + λ θ;    m, v: averages of g, g²;    θ ← θ - η / (1 - β1^t) · m / (√v / √(1 - β2^t) + ε)
    AdamW   θ ← θ (1 - η λ), then Adam's step on the plain g
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, model_validator

from methodbench.params import hyperparameters

if TYPE_CHECKING:
    from methodbench.context import Context

LearningRate = Annotated[float, Field(gt=0, description="learning rate")]
Beta1 = Annotated[float, Field(ge=0, lt=1, description="decay of the first moment")]
Beta2 = Annotated[float, Field(ge=0, lt=1, description="decay of the second moment")]
Epsilon = Annotated[float, Field(gt=0, description="added to the root of the corrected second moment")]
CoupledDecay = Annotated[float, Field(ge=0, description="L2 penalty, added to the gradient (coupled)")]
DecoupledDecay = Annotated[float, Field(ge=0, description="decoupled decay; a step shrinks by lr times it")]
AMSGrad = Annotated[bool, Field(description="divide by the largest second moment so far")]


@hyperparameters
class SGD:
    """Stochastic gradient descent with momentum.

    No paper of the registry states a rate for all uses of it; 0.01 puts the customary range, 1e-3 to 0.1, at
    the centre of a search around the default.
    """

    lr: LearningRate = 1e-2
    momentum: Annotated[
        float, Field(ge=0, lt=1, description="share of the last step that is kept; 0 for none")
    ] = 0.9
    nesterov: Annotated[bool, Field(description="look ahead along the momentum")] = False
    weight_decay: CoupledDecay = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.SGD``; all roles of parameters are treated alike."""
        return torch.optim.SGD(
            param_groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


@hyperparameters
class Adam:
    """Adaptive moments, with coupled weight decay."""

    lr: LearningRate = 1e-3
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Epsilon = 1e-8
    weight_decay: CoupledDecay = 0.0
    amsgrad: AMSGrad = False

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.Adam``; all roles of parameters are treated alike."""
        return torch.optim.Adam(
            param_groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )


@hyperparameters
class AdamW:
    """Adaptive moments, with decoupled weight decay."""

    lr: LearningRate = 1e-3
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Epsilon = 1e-8
    weight_decay: DecoupledDecay = 1e-2
    amsgrad: AMSGrad = False

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.AdamW``; all roles of parameters are treated alike."""
        return torch.optim.AdamW(
            param_groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )
