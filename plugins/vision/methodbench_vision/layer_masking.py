"""Layer masking.

Balasubramanian and Feizi, Towards Improved Input Masking for Convolutional Neural Networks, ICCV 2023
(2211.14646). A region that is painted black or grey is still seen: its colour and its outline are features. Layer
masking takes the mask along with the activations instead. Every layer pads what is hidden from its visible
neighbours before it computes, and hides it again afterwards, so that the network behaves as if the region were not
there. With x hidden where m = 0, and * a sum over 3 x 3 neighbours::

    pad(x, m):   x <- x + (1 - m) (x * 1) / (m * 1),   m <- min(m + m * 1, 1)          k times
    convolution: y = conv(pad(x, m)) m',   m' = maxpool(m)          k, stride and padding of the layer
    mean over positions: sum(x m) / sum(m)                          only what is visible counts

An explanation is LIME (Ribeiro et al., 1602.04938) over a grid of cells: the class probability of pictures with
half of their cells hidden, fitted by a weighted linear model whose coefficients are the map. ``masking`` chooses how
cells are hidden, so that painting (``black``, ``grey``) and partial convolutions can be compared on the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import check_images, class_scores, min_max

Masking = Literal["layer", "partial", "black", "grey"]
#: What a convolution does about hidden neighbours: pad them, leave them at zero, or divide by what is visible.
Convolution = Literal["pad", "zero", "partial"]

_PADDING_EPSILON = 1e-5
_POOL_EPSILON = 1e-8
#: Width of LIME's kernel over the cosine distance, and the ridge of its linear model.
_KERNEL_WIDTH = 0.25
_RIDGE = 1.0


@hyperparameters
class LayerMasking:
    """LIME over a grid of cells that are hidden in every layer."""

    masking: Annotated[
        Masking, Field(description="how cells are hidden: in every layer, or painted over")
    ] = "layer"
    cells: Annotated[int, Field(ge=2, le=64, description="cells along each side of the picture")] = 8
    samples: Annotated[int, Field(ge=8, le=100_000, description="masked pictures per image")] = 256
    batch_size: Annotated[int, Field(ge=1, le=4096, description="masked pictures per forward pass")] = 64
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="seed of the hidden cells")] = 0

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized images ``x`` [B, C, H, W] for classes [B].

        A cell's value is its positive coefficient; every image is asked with the same hidden cells.

        Raises:
            NotApplicableError: the network uses an operation without a rule for masks.
        """
        check_images(model, x)
        class_scores(model, x, target)  # refuses targets that are no classes before the samples are spent
        kept = _samples(self.samples, self.cells**2, self.seed).to(x.device)
        size = (x.shape[2], x.shape[3])
        pixels = F.interpolate(kept.view(-1, 1, self.cells, self.cells).to(x.dtype), size=size)
        maps = []
        for image, label in zip(x, target, strict=True):
            scores = torch.cat(
                [
                    masked_logits(model, image.expand(len(m), -1, -1, -1), m, self.masking)
                    .double()
                    .softmax(1)[:, label]
                    for m in pixels.split(self.batch_size)
                ]
            )
            coefficients = lime(kept.double(), scores).clamp_min(0)
            maps.append(coefficients.view(1, 1, self.cells, self.cells))
        return min_max(F.interpolate(torch.cat(maps), size=size)[:, 0]).float()


def masked_logits(model: LoadedModel, x: Tensor, mask: Tensor, masking: Masking = "layer") -> Tensor:
    """Return the logits [B, K] of images of which a part is hidden.

    Args:
        model: a convolutional classifier in eval mode.
        x: normalized images [B, C, H, W].
        mask: [B, 1, H, W], 1 where the image is visible and 0 where it is hidden.
        masking: ``layer`` pads hidden neighbours, ``partial`` divides each convolution by the visible share,
            ``black`` paints 0 in pixel space and ``grey`` 0 in the model's input space.

    Raises:
        NotApplicableError: an operation without a rule, or ``black`` for a model that does not say how it
            normalizes.
    """
    with torch.inference_mode():
        if masking in ("layer", "partial"):
            out = model.module(masked(x, mask, convolution="pad" if masking == "layer" else "partial"))
            return out if type(out) is Tensor else plain(out)
        if masking == "grey":
            return model.module(x * mask)
        if model.preprocess is None:
            raise NotApplicableError(
                f"{model.name} does not say which input is black", "Its loader must set `preprocess`."
            )
        mean, std = (x.new_tensor(v)[:, None, None] for v in (model.preprocess.mean, model.preprocess.std))
        return model.module(torch.where(mask > 0, x, -mean / std))


def lime(kept: Tensor, scores: Tensor) -> Tensor:
    """Return the coefficients [P] of a weighted ridge regression from visible cells to scores.

    A sample weighs ``exp(-d^2 / 0.25^2)``, d being its cosine distance to the whole picture; the intercept is
    free of the ridge.

    Args:
        kept: float64 [N, P], 1 where a cell is visible.
        scores: float64 [N].
    """
    share = kept.mean(1)
    weights = torch.exp(-((1 - share.sqrt()) ** 2) / _KERNEL_WIDTH**2)
    weights = weights / weights.sum()
    centred = kept - weights @ kept
    gram = (centred * weights[:, None]).mT @ centred * len(kept)
    gram.diagonal().add_(_RIDGE)
    return torch.linalg.solve(gram, (centred * weights[:, None]).mT @ (scores - weights @ scores) * len(kept))


def _samples(count: int, cells: int, seed: int) -> Tensor:
    """Return which cells are visible, bool [count, cells], each with probability 1/2; never none."""
    kept = np.random.default_rng(seed).random((count, cells)) < 0.5
    kept[~kept.any(1), 0] = True
    return torch.from_numpy(kept)


# The masked forward pass: a tensor that carries its mask through the functions of a network.


def neighbour_padding(x: Tensor, mask: Tensor, rounds: int) -> Tensor:
    """Give hidden pixels the mean of their known neighbours, one ring further in each round.

    Args:
        x: [B, C, H, W].
        mask: [B, 1, H, W], 1 where ``x`` is known; what ``x`` holds elsewhere does not matter.
        rounds: rings to fill; 0 leaves hidden pixels at zero.
    """
    x = x * mask
    for _ in range(rounds):
        if bool((mask > 0).all()):
            break
        # 9 times the mean over 3 x 3 with zeros outside is the sum; the factors cancel but for the epsilon.
        total = 9 * F.avg_pool2d(x, 3, stride=1, padding=1)
        known = 9 * F.avg_pool2d(mask, 3, stride=1, padding=1)
        x = x + (1 - mask) * total / (known + _PADDING_EPSILON)
        mask = (mask + known).clamp(0, 1)
    return x


class MaskedTensor(Tensor):
    """Activations [B, C, h, w], zero where hidden, with the mask [B, 1, h, w] of what is visible."""

    mask: Tensor
    convolution: Convolution

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        rule = _RULES.get(func)
        if rule is not None:
            with torch._C.DisableTorchFunctionSubclass():
                return rule(*args, **options)
        name = getattr(func, "__name__", str(func))
        if name in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        raise NotApplicableError(
            f"layer masking has no rule for {name} on activations that are partly hidden",
            "It covers convolutions, batch norm, pointwise activations, pooling, sums, products and concatenation.",
        )


def masked(x: Tensor, mask: Tensor, *, convolution: Convolution = "pad") -> MaskedTensor:
    """Return ``x * mask`` with its mask and what convolutions do about hidden neighbours.

    Args:
        x: [B, C, h, w].
        mask: [B, 1, h, w] of zeros and ones, in the dtype of ``x``.
    """
    tensor = (x * mask).as_subclass(MaskedTensor)
    tensor.mask, tensor.convolution = mask, convolution
    return tensor


def plain(x: Any) -> Any:
    """Return activations without their mask; everything else as it is."""
    return x.as_subclass(Tensor) if isinstance(x, MaskedTensor) else x


def _like(x: MaskedTensor, values: Tensor, mask: Tensor | None = None) -> MaskedTensor:
    return masked(values, x.mask if mask is None else mask, convolution=x.convolution)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _convolution(
    x: MaskedTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> MaskedTensor:
    kernel = (weight.shape[2], weight.shape[3])
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "valid":
        padding = 0
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = (reach[0] // 2, reach[1] // 2)
        if any(r % 2 for r in reach):
            raise NotApplicableError("layer masking has no rule for even kernels with padding 'same'")
    padding = _pair(padding)
    values = neighbour_padding(plain(x), x.mask, kernel[1] if x.convolution == "pad" else 0)
    out = F.conv2d(values, weight, None, stride, padding, dilation, groups)
    if x.convolution == "partial":
        area = x.mask.new_full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        out = out / (F.conv2d(x.mask, area, None, stride, padding, dilation) + _POOL_EPSILON)
    if bias is not None:
        out = out + bias[:, None, None]
    return _like(x, out, _grown(x.mask, kernel, stride, padding, dilation))


def _grown(mask: Tensor, kernel: Any, stride: Any, padding: tuple[int, int], dilation: Any = 1) -> Tensor:
    """Return where at least one pixel under the kernel is visible, [B, 1, h', w']."""
    if padding[0] or padding[1]:
        # Hidden, as what lies outside: also where the padding exceeds half of the kernel.
        mask = F.pad(mask, (padding[1], padding[1], padding[0], padding[0]))
    return F.max_pool2d(mask, kernel, stride, 0, dilation)


def _batch_norm(x: MaskedTensor, *args: Any, **options: Any) -> MaskedTensor:
    return _like(x, F.batch_norm(plain(x), *args, **options))


def _pointwise(function: Callable[..., Tensor]) -> Callable[..., MaskedTensor]:
    def apply(x: MaskedTensor, *args: Any, **options: Any) -> MaskedTensor:
        return _like(x, function(plain(x), *args, **options))

    return apply


def _max_pool(
    x: MaskedTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaskedTensor:
    options = (kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
    return _like(x, F.max_pool2d(plain(x), *options), F.max_pool2d(x.mask, *options))


def _avg_pool(x: MaskedTensor, *args: Any, **options: Any) -> MaskedTensor:
    visible = (F.avg_pool2d(x.mask, *args, **options) > 0).to(x.mask.dtype)
    return _like(x, F.avg_pool2d(plain(x), *args, **options), visible)


def _adaptive_pool(x: MaskedTensor, output_size: Any) -> Tensor:
    """Mean over the visible positions of each output cell; the mask ends here."""
    pooled, visible = (F.adaptive_avg_pool2d(part, output_size) for part in (plain(x), x.mask))
    return pooled / (visible + _POOL_EPSILON)


def _mean(x: MaskedTensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    axes = {axis % 4 for axis in ((dim,) if isinstance(dim, int) else dim or range(4))}
    if axes != {2, 3}:
        raise NotApplicableError("layer masking has a rule for means over height and width only")
    return plain(x).mean((2, 3), keepdim=keepdim) / (x.mask.mean((2, 3), keepdim=keepdim) + _POOL_EPSILON)


def _combined(function: Callable[..., Tensor]) -> Callable[..., MaskedTensor]:
    """Sum or product: visible where both are."""

    def apply(a: Any, b: Any, **options: Any) -> MaskedTensor:
        first = a if isinstance(a, MaskedTensor) else b
        both = [part for part in (a, b) if isinstance(part, MaskedTensor)]
        mask = both[0].mask * both[1].mask if len(both) == 2 else first.mask
        return _like(first, function(plain(a), plain(b), **options), mask)

    return apply


def _cat(tensors: Sequence[Any], dim: int = 0, **_: Any) -> MaskedTensor:
    first = next(part for part in tensors if isinstance(part, MaskedTensor))
    if dim not in (1, -3):
        raise NotApplicableError("layer masking has a rule for concatenation of channels only")
    mask = torch.stack([part.mask for part in tensors if isinstance(part, MaskedTensor)]).amin(0)
    return _like(first, torch.cat([plain(part) for part in tensors], dim), mask)


def _getitem(x: MaskedTensor, index: Any) -> MaskedTensor:
    parts = index if isinstance(index, tuple) else (index,)
    whole = slice(None)
    if not all(isinstance(part, slice) for part in parts):
        raise NotApplicableError("layer masking has a rule for slices only")
    channels_whole = tuple(whole if axis == 1 else part for axis, part in enumerate(parts))
    return _like(x, plain(x)[index], x.mask[channels_whole])


def _pad(x: MaskedTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    mask = F.pad(x.mask, list(pad[:4])) if len(pad) <= 4 or any(pad[:4]) else x.mask
    return _like(x, F.pad(plain(x), list(pad), mode, value), mask)


def _same(x: MaskedTensor, *_: Any, **__: Any) -> MaskedTensor:
    return x


_POINTWISE = (
    torch.relu,
    torch.relu_,
    F.relu,
    F.relu6,
    F.hardtanh,
    F.silu,
    F.hardswish,
    F.hardsigmoid,
    F.leaky_relu,
    F.elu,
    F.gelu,
    torch.sigmoid,
    torch.tanh,
    Tensor.relu,
    Tensor.sigmoid,
    Tensor.tanh,
    Tensor.clamp,
    Tensor.clamp_min,
)
_SUMS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__)

#: What each function of a network does to activations that carry a mask.
_RULES: Mapping[Any, Callable[..., Any]] = {
    F.conv2d: _convolution,
    torch.conv2d: _convolution,
    F.batch_norm: _batch_norm,
    **{function: _pointwise(function) for function in _POINTWISE},
    **{function: _combined(torch.add) for function in _SUMS},
    **{function: _combined(torch.mul) for function in _PRODUCTS},
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive_pool,
    torch.mean: _mean,
    Tensor.mean: _mean,
    torch.cat: _cat,
    Tensor.__getitem__: _getitem,
    F.pad: _pad,
    F.dropout: _same,
    Tensor.contiguous: _same,
    Tensor.clone: _pointwise(torch.clone),
}

#: Attributes of a tensor that say nothing of its values.
_READS = frozenset(
    {"__get__", "size", "dim", "is_floating_point", "stride", "numel", "__len__", "is_contiguous"}
)
