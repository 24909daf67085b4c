"""The plain published rules that every optimizer is compared with, from ``torch.optim``.

Gradient descent (Robbins and Monro 1951), with heavy-ball momentum (Polyak 1964) or Nesterov's (1983); AdaGrad
(Duchi et al., JMLR 2011), RMSProp (Hinton, lecture 2012), AdaDelta (Zeiler, arXiv 1212.5701), Adam (Kingma and
Ba, ICLR 2015, arXiv 1412.6980), AMSGrad (Reddi et al., ICLR 2018) and AdamW (Loshchilov and Hutter, ICLR 2019,
arXiv 1711.05101). With gradient g, to which all but AdamW first add λ θ:

    SGD        θ ← θ - η g
    SGDM       b ← μ b + g (b = g at step 1);    θ ← θ - η b    (Nesterov: θ ← θ - η (g + μ b))
    AdaGrad    S ← S + g²;    θ ← θ - η g / (√S + ε)
    RMSProp    S ← α S + (1 - α) g²;    θ ← θ - η g / (√S + ε)
    AdaDelta   S ← ρ S + (1 - ρ) g²;    d = g √(D + ε) / √(S + ε);    D ← ρ D + (1 - ρ) d²;    θ ← θ - η d
    Adam       m, v: averages of g, g²;    θ ← θ - η / (1 - β1^t) · m / (√v / √(1 - β2^t) + ε)
    AMSGrad    Adam with the largest v so far in place of v
    AdamW      θ ← θ (1 - η λ), then Adam's step on the plain g

ε of RMSProp stands outside of the root (TensorFlow puts it inside).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, model_validator

from methodbench.params import hyperparameters
from methodbench_optim.rule import ready

if TYPE_CHECKING:
    from methodbench.context import Context

LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False, description="learning rate")]
Beta1 = Annotated[float, Field(ge=0, lt=1, description="decay of the first moment")]
Beta2 = Annotated[float, Field(ge=0, lt=1, description="decay of the second moment")]
Epsilon = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="added to the root of the corrected second moment")
]
CoupledDecay = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="L2 penalty, added to the gradient (coupled)")
]
DecoupledDecay = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="decoupled decay; a step shrinks by lr times it")
]


@hyperparameters
class SGD:
    """Stochastic gradient descent.

    No paper of the registry states a rate for all uses of it; 0.01 puts the customary range, 1e-3 to 0.1, at
    the centre of a search around the default.
    """

    lr: LearningRate = 1e-2
    weight_decay: CoupledDecay = 0.0

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.SGD``; all roles of parameters are treated alike."""
        return ready(torch.optim.SGD(param_groups, lr=self.lr, weight_decay=self.weight_decay), "sgd")


@hyperparameters
class SGDM:
    """Stochastic gradient descent with momentum. The rate is outside of the buffer: a schedule acts at once."""

    lr: LearningRate = 1e-2
    momentum: Annotated[float, Field(ge=0, lt=1, description="share of the last step that is kept")] = 0.9
    nesterov: Annotated[bool, Field(description="look ahead along the momentum")] = False
    weight_decay: CoupledDecay = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDM:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.SGD`` with momentum; all roles of parameters are treated alike."""
        rule = torch.optim.SGD(
            param_groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )
        return ready(rule, "sgdm")


@hyperparameters
class AdaGrad:
    """Rates per coordinate that fall with the sum of squared gradients, with coupled weight decay."""

    lr: LearningRate = 1e-2
    lr_decay: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="step t has the rate lr / (1 + (t - 1) lr_decay)")
    ] = 0.0
    initial_accumulator_value: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="sum of squares before the first step")
    ] = 0.0
    eps: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="added to the root of the sum of squares")
    ] = 1e-10
    weight_decay: CoupledDecay = 0.0

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.Adagrad``; all roles of parameters are treated alike."""
        rule = torch.optim.Adagrad(
            param_groups,
            lr=self.lr,
            lr_decay=self.lr_decay,
            weight_decay=self.weight_decay,
            initial_accumulator_value=self.initial_accumulator_value,
            eps=self.eps,
        )
        return ready(rule, "adagrad")


@hyperparameters
class RMSProp:
    """Gradients over the root of their running mean square, with coupled weight decay."""

    lr: LearningRate = 1e-2
    alpha: Annotated[float, Field(ge=0, lt=1, description="decay of the mean square")] = 0.99
    eps: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="added to the root of the mean square")
    ] = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1, description="share of the last step that is kept")] = 0.0
    centered: Annotated[bool, Field(description="divide by the deviation instead of the mean square")] = False
    weight_decay: CoupledDecay = 0.0

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.RMSprop``; all roles of parameters are treated alike."""
        rule = torch.optim.RMSprop(
            param_groups,
            lr=self.lr,
            alpha=self.alpha,
            eps=self.eps,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            centered=self.centered,
        )
        return ready(rule, "rmsprop")


@hyperparameters
class AdaDelta:
    """Steps in units of the parameters, with coupled weight decay. Its natural rate is 1 (paper, algorithm 1)."""

    lr: LearningRate = 1.0
    rho: Annotated[float, Field(ge=0, lt=1, description="decay of both mean squares")] = 0.9
    eps: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="added to both mean squares, inside of the root")
    ] = 1e-6
    weight_decay: CoupledDecay = 0.0

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.Adadelta``; all roles of parameters are treated alike."""
        rule = torch.optim.Adadelta(
            param_groups, lr=self.lr, rho=self.rho, eps=self.eps, weight_decay=self.weight_decay
        )
        return ready(rule, "adadelta")


@hyperparameters
class Adam:
    """Adaptive moments, with coupled weight decay."""

    lr: LearningRate = 1e-3
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Epsilon = 1e-8
    weight_decay: CoupledDecay = 0.0

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.Adam``; all roles of parameters are treated alike."""
        rule = torch.optim.Adam(
            param_groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        return ready(rule, "adam")


@hyperparameters
class AMSGrad:
    """Adam whose second moment never falls, with coupled weight decay.

    The maximum is taken before the bias correction (torch's form).
    """

    lr: LearningRate = 1e-3
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Epsilon = 1e-8
    weight_decay: CoupledDecay = 0.0

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.Adam`` with ``amsgrad``; all roles of parameters are treated alike."""
        rule = torch.optim.Adam(
            param_groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=True,
        )
        return ready(rule, "amsgrad")


@hyperparameters
class AdamW:
    """Adaptive moments, with decoupled weight decay."""

    lr: LearningRate = 1e-3
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Epsilon = 1e-8
    weight_decay: DecoupledDecay = 1e-2

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return ``torch.optim.AdamW``; all roles of parameters are treated alike."""
        rule = torch.optim.AdamW(
            param_groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        return ready(rule, "adamw")
