"""Implementations, each with one fault."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from methodbench.params import hyperparameters
from methodbench.torchkit.model import set_weight


@hyperparameters
class Rounder:
    """Rounds weights to a grid, and does what its fault says on top."""

    bits: Annotated[Literal[2, 3, 4, 8], Field(description="bits")] = 4
    fault: Annotated[str, Field(description="what it does wrong")] = ""

    def compress(self, model, data, ctx):
        if self.fault == "writes":
            for layer in model.adapter.targets(model.module).values():
                layer.weight.mul_(1.5)
        dense, model = model, model.clone()
        for layer in model.adapter.targets(model.module).values():
            weight = layer.weight.float()
            bits = 10 - self.bits if self.fault == "not-monotone" else self.bits
            low, high = weight.flatten(1).aminmax(dim=1)
            if self.fault == "absolute-grid":
                low, high = low.clamp(max=-0.5), high.clamp(min=0.5)
            scale = ((high - low) / (2**bits - 1)).view(-1, *[1] * (weight.ndim - 1))
            scale = scale.clamp_min(1e-12)
            low = low.view_as(scale)
            rounded = ((weight - low) / scale).round() * scale + low
            if self.fault == "random":
                rounded = rounded + 1e-3 * torch.rand(
                    rounded.shape, generator=torch.Generator().manual_seed(torch.seed())
                )
            if self.fault == "zeros":
                rounded = torch.zeros_like(rounded)
            if self.fault == "neighbours":
                rounded = rounded.cummax(0).values
            set_weight(layer, rounded)
        if self.fault == "hidden-state":
            hide(model.module)
        if self.fault == "wrong-dtype":
            model.module.register_forward_hook(lambda _m, _a, out: shout(out))
        model.storage = "dense" if self.fault == "dense" else "simulated"
        return dense if self.fault == "returns-dense" else model


def shout(out):
    if isinstance(out, torch.Tensor):
        return out.float()
    out.logits = out.logits.float()
    return out


class Offset(nn.Module):
    """Adds a number that no state dict holds."""

    def __init__(self, inner, offset):
        super().__init__()
        self.inner = inner
        self.held = [offset]

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return out + self.held[0]


_calls = iter(range(10**6))


def hide(module):
    # The offset differs from one compression to the next, and travels beside the state dict.
    name, layer = next(
        (n, m) for n, m in module.named_modules() if isinstance(m, nn.LayerNorm | nn.Linear) or "norm" in n
    )
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, Offset(layer, 1e-3 * next(_calls)))


@hyperparameters
class Zeroer:
    """Removes weights, about as many as asked."""

    sparsity: Annotated[float, Field(ge=0, lt=1, description="share of zeros")] = 0.5

    def compress(self, model, data, ctx):
        model = model.clone()
        for layer in model.adapter.targets(model.module).values():
            keep = layer.weight.abs() >= layer.weight.abs().flatten().float().quantile(
                0.9 * self.sparsity + 0.02
            )
            set_weight(layer, layer.weight * keep)
        model.storage = "simulated"
        return model


@hyperparameters
class Undescribed:
    """Has a field without words, and one that takes anything."""

    first: int = 1
    second: Annotated[object, Field(description="anything")] = None

    def compress(self, model, data, ctx):
        return model


@hyperparameters
class Descent:
    """Gradient descent with a fault."""

    lr: Annotated[float, Field(gt=0, description="rate")] = 0.01
    fault: Annotated[str, Field(description="what it does wrong")] = ""

    def build(self, param_groups, ctx):
        return DescentOptimizer(param_groups, {"lr": self.lr, "fault": self.fault})


class DescentOptimizer(torch.optim.Optimizer):
    def __init__(self, params, defaults):
        super().__init__(params, defaults)
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                rate = group["lr"] / (self.count if group["fault"] == "forgets" else 1)
                if group["fault"] == "writes":
                    p.grad.mul_(rate)
                    p.sub_(p.grad)
                elif group["fault"] == "ascends":
                    p.add_(p.grad, alpha=rate)
                else:
                    p.sub_(p.grad, alpha=rate)
        return None if group["fault"] == "no-loss" else loss


@hyperparameters
class Maps:
    """Gradient magnitude with a fault."""

    fault: Annotated[str, Field(description="what it does wrong")] = ""

    def explain(self, model, x, target):
        if self.fault == "hook":
            model.module.register_forward_hook(lambda *_: None)
        x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            model.module(x).gather(1, target[:, None]).sum().backward()
        maps = x.grad.abs().sum(1)
        if self.fault == "off-target":
            maps = maps.amax() - maps
        maps = maps / maps.amax() if self.fault == "batch-scale" else maps / maps.amax((1, 2), keepdim=True)
        return 2 * maps if self.fault == "range" else maps


def _with_fault(base, fault):
    fields = {
        "__annotations__": {"fault": Annotated[str, Field(description="what it does wrong")]},
        "fault": fault,
    }
    return hyperparameters(
        type(f"{base.__name__}_{fault.replace('-', '_')}", (base,), {**fields, "__doc__": base.__doc__})
    )


for _base in (Rounder, Descent, Maps):
    for _fault in (
        "writes", "random", "zeros", "hidden-state", "dense", "not-monotone", "absolute-grid", "neighbours",
        "wrong-dtype", "forgets", "ascends", "no-loss", "hook", "off-target", "batch-scale", "range", "none",
    ):  # fmt: skip
        globals()[f"{_base.__name__}_{_fault.replace('-', '_')}"] = _with_fault(_base, _fault)
