"""What class activation maps share: a layer's feature maps, their gradients, the way to picture-sized maps.

A method reads :func:`features` of one or several layers, reduces each to a raw map [B, h, w], and hands the
raw maps to :func:`saliency`. The pipeline is that of pytorch-grad-cam 1.5.7, over a whole batch at once:
ReLU, min-max, bilinear resize, mean over layers, min-max again.

Only the layers behind the first one that is read are differentiated: the forward pass before it builds no
graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.torchkit.model import LoadedModel

#: Keeps a constant map from dividing by zero.
EPSILON = 1e-7

#: Fields that every class activation map has.
LayerChoice = Annotated[
    str | tuple[str, ...],
    Field(
        description="layers to read and average, by dotted name; by default the one that feeds the pooling"
    ),
]
PrefixTokens = Annotated[
    int | None, Field(ge=0, description="tokens in front of the patches; by default what the model says")
]

_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)


class _AllRead(Exception):
    """Ends a forward pass once every layer that is read has run; never leaves :func:`recorded`."""


class Features(NamedTuple):
    """Feature maps of one layer and the gradient of the class scores by them, float32 [B, C, h, w]."""

    activation: Tensor
    gradient: Tensor


def features(
    model: LoadedModel,
    x: Tensor,
    target: Tensor,
    *,
    layer: LayerChoice = "",
    prefix_tokens: PrefixTokens = None,
) -> list[Features]:
    """Return A and G = d score / dA of each layer, for a batch in one forward and one partial backward pass.

    The score is the raw logit of the target class, summed over the batch: images do not interact in eval
    mode.

    Args:
        model: a classifier in eval mode that returns logits [B, K].
        x: normalized images [B, C, H, W].
        target: int64 [B], class of each image.
        layer: dotted names, see :func:`layer_names`.
        prefix_tokens: see :func:`spatial`.

    Raises:
        ParameterError: a layer does not exist, a target is not one of the classes, or the images are no images.
        NotApplicableError: a layer has no feature maps, the score does not depend on it, or the model is in
            training mode.
    """
    check_images(model, x)
    names = layer_names(model, x, layer)
    with recorded(model.module, names, gradients=True) as held:
        logits = model.module(x)
    check_targets(logits, target, len(x))
    activations = [called(held, name) for name in names]
    score = logits.gather(1, target[:, None]).sum()
    gradients: Sequence[Tensor | None] = [None] * len(names)
    if score.requires_grad:
        gradients = torch.autograd.grad(score, activations, allow_unused=True)
    return [
        Features(
            spatial(model, name, activation.detach(), prefix_tokens),
            spatial(model, name, _connected(name, gradient), prefix_tokens),
        )
        for name, activation, gradient in zip(names, activations, gradients, strict=True)
    ]


def activations(
    model: LoadedModel, x: Tensor, *, layer: LayerChoice = "", prefix_tokens: PrefixTokens = None
) -> list[Tensor]:
    """Return the feature maps [B, C, h, w] of each layer for images ``x`` [B, C, H, W], without any gradient.

    The forward pass ends at the last of the layers where each is known to run once.

    Raises:
        ParameterError: a layer does not exist, or the images are no images.
        NotApplicableError: a layer has no feature maps, or the model is in training mode.
    """
    check_images(model, x)
    names = layer_names(model, x, layer)
    with recorded(model.module, names, gradients=False, until_read=_run_once(model, names)) as held:
        model.module(x)
    return [spatial(model, name, called(held, name), prefix_tokens) for name in names]


def class_scores(model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
    """Return the raw logit of each image's class, float32 [B], without any gradient.

    Raises:
        ParameterError: a target is not one of the classes.
        DivergedError: the logits are not finite.
    """
    with torch.inference_mode():
        logits = model.module(x)
    check_targets(logits, target, len(x))
    check_scores(model, logits)
    return logits.gather(1, target[:, None])[:, 0].float()


def check_images(model: LoadedModel, x: Tensor) -> None:
    """Refuse what no map can be made of.

    Raises:
        ParameterError: ``x`` is no batch of images with the model's channels and size, or holds values that are not
            finite.
        NotApplicableError: the model is in training mode, where images change each other's scores.
    """
    if model.module.training:
        raise NotApplicableError(
            f"{model.name} is in training mode, where batch norm and dropout change the scores",
            "Call model.module.eval() first.",
        )
    if x.ndim != 4 or not x.is_floating_point() or not x.numel():
        raise ParameterError(
            f"images must be floating point [B, C, H, W], got {x.dtype} {list(x.shape)}",
            "Turn pictures into inputs as the model's `preprocess` says.",
        )
    channels = len(model.preprocess.mean) if model.preprocess is not None else x.shape[1]
    if x.shape[1] != channels:
        raise ParameterError(
            f"the images have {x.shape[1]} channels, {model.name} takes {channels}",
            "Grayscale pictures and pictures with an alpha channel are converted to RGB first.",
        )
    size = _only_size(model)
    if size is not None and tuple(x.shape[2:]) != size:
        raise ParameterError(
            f"the images have {x.shape[2]} x {x.shape[3]} pixels, {model.name} takes {size[0]} x {size[1]} alone",
            "Resize the images first.",
        )
    if not bool(x.isfinite().all()):
        raise ParameterError("the images hold values that are not finite", "Mend or leave out these images.")


def _only_size(model: LoadedModel) -> tuple[int, int] | None:
    """Return the height and width that a transformer is bound to, or None where other sizes do."""
    patches = getattr(model.module, "patch_embed", None)
    if patches is None or not getattr(patches, "strict_img_size", False):
        return None
    size = getattr(patches, "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def saliency(raw: Sequence[Tensor], size: tuple[int, int], *, rectify: bool = True) -> Tensor:
    """Turn raw maps [B, h, w], one per layer, into one map [B, H, W] in [0, 1] per image.

    Each layer's map loses its negative part (unless ``rectify`` is False), is scaled to [0, 1] and resized to
    ``size`` (height, width) with half-pixel bilinear interpolation; the mean over layers is scaled once more.
    A map that is constant becomes zero everywhere.
    """
    layers = []
    for maps in raw:
        scaled = min_max(maps.clamp_min(0) if rectify else maps)
        layers.append(F.interpolate(scaled[:, None], size=size, mode="bilinear", align_corners=False)[:, 0])
    return min_max(torch.stack(layers).mean(0))


def min_max(maps: Tensor) -> Tensor:
    """Scale each map of [B, h, w] to [0, 1]; constant maps become zero."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (EPSILON + maps.amax((1, 2), keepdim=True))


def layer_names(model: LoadedModel, x: Tensor, layer: LayerChoice = "") -> list[str]:
    """Return the dotted names of the layers to read.

    Without a name: in a transformer the norm before the last attention, behind which every patch still has a
    path to the score; in a convolutional network the layer that feeds the pooling, found by passing on one
    image.

    Raises:
        ParameterError: a name that the model does not have.
        NotApplicableError: no such layer is there.
    """
    if layer:
        names = [layer] if isinstance(layer, str) else list(layer)
        known = {name for name, _ in model.module.named_modules() if name}
        for name in names:
            if name not in known:
                raise ParameterError(
                    f"{model.name} has no layer {name!r}",
                    f"Its outermost layers: {', '.join(name for name, _ in model.module.named_children())}",
                )
        return names
    layout = model.adapter.layout
    if layout is not None:
        if not layout.attention_norm:
            raise NotApplicableError(
                f"the blocks of {model.name} have no norm of known name before the attention",
                "Name the layer to read with the parameter `layer`.",
            )
        return [f"{model.adapter.block_names(model.module)[-1]}.{layout.attention_norm}"]
    return [_pooled_layer(model, x[:1])]


@contextmanager
def recorded(
    module: nn.Module, names: Sequence[str], *, gradients: bool, until_read: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of submodules during the forward passes inside the ``with`` block, by name.

    The model goes on with a copy of each output, so that an in-place activation behind a layer does not reach
    what is kept. With ``gradients`` the graph begins at the first of the layers that runs; of a module that
    runs several times the last output is kept. With ``until_read`` the ``with`` block ends as soon as every layer
    has run once. Gradient mode and hooks are as before when the block ends, whatever happens in it.
    """
    held: dict[str, Tensor] = {}
    wanted = dict.fromkeys(names)

    def keep(name: str, output: object) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise NotApplicableError(
                f"layer {name!r} returns {shape}, not feature maps",
                "Choose a layer with an output [B, C, h, w] or [B, tokens, C].",
            )
        if gradients:
            torch.set_grad_enabled(True)
            held[name] = output if output.requires_grad else output.detach().requires_grad_()
        else:
            held[name] = output
        if until_read and len(held) == len(wanted):
            raise _AllRead
        return held[name].clone()

    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: keep(name, output)
        )
        for name in wanted
    ]
    try:
        with torch.no_grad() if gradients else torch.inference_mode():
            yield held
    except _AllRead:
        pass
    finally:
        for handle in handles:
            handle.remove()


def spatial(model: LoadedModel, name: str, values: Tensor, prefix_tokens: PrefixTokens = None) -> Tensor:
    """Return a layer's output as float32 maps [B, C, h, w].

    Tokens [B, prefix + h w, C] lose their ``prefix_tokens`` leading ones (by default as many as the adapter
    finds) and are laid out on the adapter's grid of patches, or on a square.

    Raises:
        NotApplicableError: the tokens fill no grid.
    """
    values = values.float()
    if values.ndim == 4:
        return values
    prefix = model.adapter.prefix_tokens(model.module) if prefix_tokens is None else prefix_tokens
    patches = values[:, prefix:]
    count = patches.shape[1]
    side = math.isqrt(max(count, 0))
    grid = model.adapter.patch_grid(model.module) or (side, side)
    if count == 0 or grid[0] * grid[1] != count:
        raise NotApplicableError(
            f"the {values.shape[1]} tokens of layer {name!r}, less {prefix} in front, do not fill a grid",
            "Set prefix_tokens to the number of class, distillation and register tokens.",
        )
    return patches.transpose(1, 2).unflatten(2, grid)


def _run_once(model: LoadedModel, names: Sequence[str]) -> bool:
    """Whether each layer is known to run once in a forward pass: blocks of a transformer, their first norms."""
    layout = model.adapter.layout
    if layout is None:
        return False
    blocks = model.adapter.block_names(model.module)
    return set(names) <= {*blocks, *(f"{block}.{layout.attention_norm}" for block in blocks)}


def _pooled_layer(model: LoadedModel, x: Tensor) -> str:
    """Return the name of the last layer, other than a pooling, with maps of more than one pixel."""
    last = ""

    def note(name: str, output: object) -> None:
        nonlocal last
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            last = name

    handles = [
        layer.register_forward_hook(lambda _module, _args, output, name=name: note(name, output))
        for name, layer in model.module.named_modules()
        if name and not isinstance(layer, _POOLS)
    ]
    try:
        with torch.inference_mode():
            model.module(x)
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise NotApplicableError(
            f"{model.name} has no layer with feature maps",
            "Name one with the parameter `layer`, if there is one.",
        )
    return last


def check_targets(logits: Tensor, target: Tensor, images: int) -> None:
    """Refuse targets that are not one class per image, and models that return no logits.

    Raises:
        ParameterError: a target is not one of the classes.
        NotApplicableError: the output is not [B, K].
    """
    if logits.ndim != 2 or len(logits) != images:
        raise NotApplicableError(
            f"the model returns {tuple(logits.shape)} for {images} images, not logits [B, K]"
        )
    if target.shape != (images,) or bool(((target < 0) | (target >= logits.shape[1])).any()):
        raise ParameterError(
            f"targets must be {images} classes in 0..{logits.shape[1] - 1}, got {target.tolist()}",
            "Pass one class index per image.",
        )


def check_scores(model: LoadedModel, logits: Tensor) -> None:
    """Refuse logits that no explanation can be read off.

    Raises:
        DivergedError: a value is not finite.
    """
    if not bool(logits.isfinite().all()):
        raise DivergedError(f"{model.name} returns scores that are not finite")


def called(held: dict[str, Tensor], name: str) -> Tensor:
    """Return what :func:`recorded` kept of a layer.

    Raises:
        NotApplicableError: the forward pass did not run it.
    """
    if name not in held:
        raise NotApplicableError(f"the model does not run its layer {name!r}", "Choose a layer that it runs.")
    return held[name]


def _connected(name: str, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise NotApplicableError(
            f"the class score does not depend on layer {name!r}",
            "Choose a layer between the image and the logits.",
        )
    return gradient
