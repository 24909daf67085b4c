"""What tasks of explainers share: asking for maps, timing it, and not trusting what comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import DivergedError, MethodbenchError, NotApplicableError
from methodbench.protocols import Explainer, Oracle, Shown
from methodbench.torchkit.model import LoadedModel, Preprocess

_TOLERANCE = 1e-4
#: Pictures that a record shows.
_SHOWN = 3


@runtime_checkable
class Blind(Explainer, Protocol):
    """An explainer that looks at no model: what a map is worth that knows nothing."""

    def draw(self, x: Tensor) -> Tensor:
        """Return maps float32 [B, H, W] in [0, 1] for normalized images ``x`` [B, C, H, W]."""
        ...

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return what :meth:`draw` does, whatever the model and the classes ``target`` [B] are."""
        return self.draw(x)


def preprocess_of(model: LoadedModel) -> Preprocess:
    """Return how pictures become inputs of ``model``.

    Raises:
        NotApplicableError: the model does not say.
    """
    if model.preprocess is None:
        raise NotApplicableError(
            f"{model.name} does not say how pictures become its inputs", "Its loader must set `preprocess`."
        )
    return model.preprocess


def on_device(inputs: Tensor, ctx: Context) -> Tensor:
    """Move inputs to the cell's device and precision."""
    return inputs.to(ctx.device, getattr(torch, ctx.dtype))


def timed_maps(
    method: Explainer, model: LoadedModel, x: Tensor, target: Tensor, masks: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return maps [B, H, W] of images [B, C, H, W] for classes [B], and the seconds it took.

    An oracle is handed the true ``masks``, bool [B, H, W], instead.

    Raises:
        NotApplicableError: an oracle on images whose truth is not known.
        DivergedError: a value is not finite.
        MethodbenchError: the maps have another shape, or leave [0, 1].
    """
    began = time.perf_counter()
    if masks is not None and isinstance(method, Oracle):
        maps = method.explain_known(masks)
    else:
        maps = method.explain(model, x, target)
    if maps.is_cuda:
        torch.cuda.synchronize(maps.device)
    seconds = time.perf_counter() - began
    name = type(method).__name__
    expected = (x.shape[0], *x.shape[2:])
    if tuple(maps.shape) != expected:
        raise MethodbenchError(
            f"{name}.explain returned maps of shape {tuple(maps.shape)} instead of {expected}",
            "An explainer returns one map per image, as large as the image.",
        )
    if not bool(maps.isfinite().all()):
        raise DivergedError(f"{name}.explain returned values that are not finite")
    low, high = float(maps.min()), float(maps.max())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise MethodbenchError(
            f"{name}.explain returned values from {low:.3g} to {high:.3g}", "Maps must lie in [0, 1]."
        )
    return maps, seconds


def control_maps(method: Explainer, x: Tensor, masks: Tensor) -> Tensor:
    """Return maps [B, K, H, W] of a control, where there is no model that could be explained.

    A control that looks at no model draws one map for all K classes; an oracle is handed the mask of each.

    Args:
        method: see above.
        x: normalized images [B, C, H, W].
        masks: bool [B, K, H, W].

    Raises:
        NotApplicableError: the method explains a model.
    """
    if isinstance(method, Oracle):
        return method.explain_known(masks.flatten(0, 1)).view(masks.shape)
    if isinstance(method, Blind):
        return method.draw(x)[:, None].expand(masks.shape)
    raise NotApplicableError(
        f"{type(method).__name__} explains a trained model, and this task brings pictures with weak labels alone",
        "Run it on a task that takes a model; controls that look at none run here.",
    )


def shown(images: Tensor, maps: Tensor | np.ndarray, names: Sequence[str]) -> list[Shown]:
    """Return the first pictures, RGB float [n, 3, H, W] in [0, 1], with maps [n, H, W], for the pages of the run."""
    return [
        Shown(
            f"{number + 1}: {name}",
            np.rint(image.permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8),
            np.asarray(one, dtype=np.float64),
        )
        for number, (image, one, name) in enumerate(zip(images[:_SHOWN], maps[:_SHOWN], names, strict=False))
    ]
