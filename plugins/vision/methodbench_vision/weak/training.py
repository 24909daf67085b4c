"""What methods that learn from weak labels share: what they are given, how they train, what they hand back.

A task gives normalized ``images``, float32 [N, 3, H, W], with ``labels``, int64 [N] (one class per picture) or bool
[N, K] (several), or with ``points``, a list of float32 [n, 2] (x, y), one point per object. A :class:`Seeds` is what
comes back where classes were given: masks for a picture, and the maps that they are cut from.

The networks are small and trained from scratch by AdamW with a one-cycle schedule, where the papers fine-tune
ImageNet weights by SGD: the losses are the papers', the schedule is that of the procedural pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.torchkit.seeding import repeatable

#: Fields that every method that trains here has.
Epochs = Annotated[int, Field(ge=1, le=1000, description="passes over the pictures")]
BatchSize = Annotated[int, Field(ge=2, le=1024, description="pictures per step")]
PeakRate = Annotated[float, Field(gt=0, le=1, description="highest learning rate of the cycle")]
Threshold = Annotated[
    float, Field(ge=0, lt=1, description="score of the background when maps are cut into masks")
]

#: Keeps the scale of a class's map from dividing by zero, as the seeds of IRN and MCTformer do.
SEED_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Seeds:
    """A trained network as a predictor of masks.

    Attributes:
        read: from normalized images [B, 3, H, W] to the raw maps [B, K, h, w] and the scores [B, K] of classes.
        threshold: background's score.
        several: whether a picture may show several classes: then those with a positive score are.
    """

    read: Callable[[Tensor], tuple[Tensor, Tensor]]
    threshold: float
    several: bool

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of all classes in [0, 1], [B, K, H, W], and their scores [B, K].

        Raises:
            ParameterError: see :func:`check_pictures`.
        """
        check_pictures(x)
        with torch.inference_mode():
            raw, scores = zip(*(self.read(part) for part in x.split(100)), strict=True)
        return seed_maps(torch.cat(raw), (x.shape[2], x.shape[3])), torch.cat(scores)

    def __call__(self, x: Tensor) -> Tensor:
        """Return int64 masks [B, H, W] of images [B, 3, H, W]: 0 for the background, k + 1 for class k."""
        maps, scores = self.maps(x)
        present = F.one_hot(scores.argmax(1), scores.shape[1]).bool()
        if self.several:
            present |= scores > 0
        return labelled(maps, present, self.threshold)


def seed_maps(raw: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut raw maps [B, K, h, w] off at zero, resize them to ``size``, divide by each one's maximum + 1e-5."""
    maps = F.interpolate(raw.float().clamp_min(0), size=size, mode="bilinear", align_corners=False)
    return maps / (maps.amax((2, 3), keepdim=True) + SEED_EPSILON)


def labelled(maps: Tensor, present: Tensor, threshold: float) -> Tensor:
    """Return which plane is highest: 0 the constant ``threshold``, k + 1 the map of class k if it is present.

    Args:
        maps: [B, K, H, W].
        present: bool [B, K].
        threshold: the background's score.
    """
    planes = torch.where(present[:, :, None, None], maps, -1.0)
    return torch.cat([planes.new_full((len(planes), 1, *planes.shape[2:]), threshold), planes], 1).argmax(1)


def given(weak_labels: Mapping[str, Any], what: str, name: str) -> tuple[Tensor, Any]:
    """Return the pictures and their ``what``, "labels" or "points".

    Raises:
        NotApplicableError: the task gives no such labels.
        ParameterError: pictures or labels are malformed.
    """
    if what not in weak_labels:
        raise NotApplicableError(
            f"{name} learns from {what}, and this task gives {', '.join(sorted(weak_labels)) or 'nothing'}",
            f"Run it on a task whose pictures have {what}.",
        )
    images, labels = weak_labels["images"], weak_labels[what]
    check_pictures(images)
    if len(labels) != len(images):
        raise ParameterError(f"there are {len(images)} images and {what} of {len(labels)}")
    if isinstance(labels, Tensor):
        if labels.ndim not in (1, 2) or labels.is_floating_point():
            raise ParameterError(
                f"labels must be classes [N] or bool [N, K], got {labels.dtype} {list(labels.shape)}"
            )
        if bool((labels < 0).any()):
            raise ParameterError("classes count from 0; a label is negative")
    return images, labels


def check_pictures(images: Tensor) -> None:
    """Refuse what the networks here take no pictures from.

    Raises:
        ParameterError: ``images`` is no float batch [N, 3, H, W], or holds values that are not finite.
    """
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ParameterError(
            f"images must be floating point [N, C, H, W], got {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] != 3:
        raise ParameterError(
            f"the images have {images.shape[1]} channels, not 3",
            "Grayscale pictures and pictures with an alpha channel are converted to RGB first.",
        )
    if not bool(images.isfinite().all()):
        raise ParameterError("the images hold values that are not finite", "Mend or leave out these images.")


def one_hot(labels: Tensor) -> Tensor:
    """Return float32 [N, K] of labels int64 [N] or bool [N, K]; K is the largest class + 1 of the former."""
    if labels.ndim == 1:
        return F.one_hot(labels.long()).float()
    return labels.float()


def fit(
    modules: nn.Module,
    images: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    peak_rate: float,
    ctx: Context,
    every_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train in place with AdamW and a one-cycle schedule; leaves the modules in eval mode, without gradients.

    Call it inside :func:`seeded`, with the modules made there too.

    Args:
        modules: what is trained.
        images: only their number counts here.
        loss_of: from the indices of a batch [b] to a scalar.
        epochs: each in a fresh order; a last partial batch is left out.
        batch_size: at most the number of pictures.
        peak_rate: highest learning rate.
        ctx: its log gets one line per fifth of the epochs.
        every_epoch: called with 0, 1, ... before each epoch.

    Raises:
        DivergedError: the loss is not finite.
    """
    size = min(batch_size, len(images))
    steps = len(images) // size
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak_rate, total_steps=epochs * steps)
    for epoch in range(epochs):
        if every_epoch is not None:
            every_epoch(epoch)
        modules.train()
        total = 0.0
        for batch in torch.randperm(len(images))[: steps * size].split(size):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if not total < float("inf"):
            raise DivergedError(f"the loss is {total / steps} in epoch {epoch + 1}", "Lower peak_rate.")
        if (epoch + 1) % max(1, epochs // 5) == 0:
            ctx.log(f"epoch {epoch + 1} of {epochs}: loss {total / steps:.4f}")
    modules.eval().requires_grad_(False)


def seeded(ctx: Context) -> Any:
    """Return a context in which torch draws by the cell's seed, computes on one thread and keeps gradients."""
    return _Seeded(ctx.seed)


class _Seeded:
    def __init__(self, seed: int) -> None:
        self._contexts = (repeatable(seed), torch.enable_grad())

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *problem: Any) -> None:
        for context in self._contexts[::-1]:
            context.__exit__(*problem)
