"""Rows that every table of explanations has: what a map is worth that knows nothing, and one that knows all.

``random`` is noise, ``centre-gaussian`` the photographer's habit, ``full-image`` no localization at all, and
``oracle-mask`` the truth itself, the upper end of every localization score. None looks at the model.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.random_cam import drawn_per_image
from methodbench_vision.tasks.maps import Blind


@hyperparameters
class RandomMap(Blind):
    """Every pixel from U(0, 1), by seed and picture."""

    seed: Annotated[
        int, Field(ge=0, le=2**31 - 1, description="seed of the noise, joined with the picture")
    ] = 0

    def draw(self, x: Tensor) -> Tensor:
        """Return noise [B, H, W] for images ``x`` [B, C, H, W]."""
        return drawn_per_image(x, (x.shape[2], x.shape[3]), self.seed, 0, 1)


@hyperparameters
class CentreGaussian(Blind):
    """A Gaussian around the centre of the picture."""

    sigma: Annotated[
        float, Field(gt=0, le=10, description="standard deviation, as a share of height and of width")
    ] = 0.25

    def draw(self, x: Tensor) -> Tensor:
        """Return the same map, highest in the centre, for each of ``x`` [B, C, H, W]: [B, H, W]."""
        rows, columns = (
            torch.exp(-(((torch.arange(n, device=x.device) + 0.5) / n - 0.5) ** 2) / (2 * self.sigma**2))
            for n in x.shape[2:]
        )
        return (rows[:, None] * columns).expand(len(x), -1, -1).contiguous()


@hyperparameters
class FullImage(Blind):
    """One everywhere."""

    def draw(self, x: Tensor) -> Tensor:
        """Return ones [B, H, W] for images ``x`` [B, C, H, W]."""
        return x.new_ones((len(x), x.shape[2], x.shape[3]), dtype=torch.float32)


@hyperparameters
class OracleMask:
    """The true mask, where a task knows it."""

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Refuse: without a mask there is no map.

        Raises:
            NotApplicableError: always.
        """
        raise NotApplicableError(
            "the oracle needs the true masks, which this task does not know",
            "Run it on a task with exact masks.",
        )

    def explain_known(self, masks: Tensor) -> Tensor:
        """Return the masks, bool [B, H, W], as float32 maps."""
        return masks.float()
