"""The same network, faster: batch norms folded into the convolutions before them, channels last in memory.

Perturbation curves ask a network the same question thousands of times. Whether a batch norm follows a convolution is
read off the order of a forward pass, and the result is held against the original before it is used.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from methodbench.torchkit.model import set_submodule
from methodbench.torchkit.tracing import traced

#: Largest difference of logits that folding may make, as a share of the largest logit.
_ROUNDING = 1e-4


def folded(module: nn.Module, x: Tensor) -> nn.Module:
    """Return a network with the function of ``module`` up to rounding, for scoring alone; ``module`` stays as it is.

    It is ``module`` itself where there is nothing to fold, or where the folded network does not agree on ``x``
    [B, C, H, W].
    """
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()):
        return module
    pairs = _pairs(module, x)
    other = copy.deepcopy(module).requires_grad_(False)
    for convolution, norm in pairs:
        first, second = other.get_submodule(convolution), other.get_submodule(norm)
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.BatchNorm2d)
        set_submodule(other, convolution, fuse_conv_bn_eval(first, second))
        set_submodule(other, norm, nn.Identity())
    if x.device.type == "cpu":
        other = other.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected, found = module(x), other(x)
    if expected.shape != found.shape or not bool(found.isfinite().all()):
        return module
    close = float((expected - found).abs().max()) <= _ROUNDING * float(expected.abs().max())
    return other if close else module


def _pairs(module: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Return names of convolutions and the norms whose input is their output, each used once."""
    found = traced(
        module,
        x,
        writers=lambda _, layer: type(layer) is nn.Conv2d,
        readers=lambda _, layer: type(layer) is nn.BatchNorm2d,
    )
    return [
        (convolution, norm)
        for norm, convolution in found.pairs
        if found.calls[norm] == found.calls[convolution] == 1
    ]
