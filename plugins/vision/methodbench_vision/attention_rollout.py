"""Attention rollout.

Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020 (2005.00928). Attention says how a block
mixes its tokens. Half of what a token becomes is itself, by the residual connection; multiplied over the blocks,
the mixtures tell how much of each patch has reached the class token. No class is asked and no gradient taken::

    A_b' = normalize((A_b + I) / 2)          R = A_L' ... A_2' A_1'          L = R[class token, patches]

where A_b joins the heads of block b. The defaults are those of vit-explain, the code that made rollout of vision
transformers popular: the smallest 90 % of the joint attention are dropped first, and the normalization divides
column j by the sum of row j (``legacy``). The paper drops nothing and divides rows by their sums: the preset
``paper``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.vit_attention import recorded_attention
from methodbench_vision.cam import PrefixTokens, check_images, spatial

Fusion = Literal["mean", "max", "min"]
Normalization = Literal["legacy", "row"]


@hyperparameters
class AttentionRollout:
    """Product over the blocks of attention and residual connection."""

    head_fusion: Annotated[Fusion, Field(description="how the heads of a block are joined")] = "mean"
    discard_ratio: Annotated[
        float, Field(ge=0, lt=1, description="share of the smallest joint attention that is set to zero")
    ] = 0.9
    normalize: Annotated[
        Normalization, Field(description="divide columns by the sums of rows (vit-explain), or rows (paper)")
    ] = "legacy"
    prefix_tokens: PrefixTokens = None

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized images ``x`` [B, C, H, W], whatever the class.

        Raises:
            NotApplicableError: no class token, or attention of an unknown kind.
        """
        check_images(model, x)
        prefix = (
            model.adapter.prefix_tokens(model.module) if self.prefix_tokens is None else self.prefix_tokens
        )
        if not prefix:
            raise NotApplicableError(
                f"{model.name} has no class token, whose row of the rollout is the map",
                "Set prefix_tokens if the model has tokens in front of the patches that it does not declare.",
            )
        with recorded_attention(model.module, model.adapter) as attention, torch.inference_mode():
            model.module(x)
        joined = rollout(
            (block.float() for block in attention.values()),
            fusion=self.head_fusion,
            discard_ratio=self.discard_ratio,
            normalize=self.normalize,
        )
        maps = spatial(model, "attention", joined[:, 0, :, None], prefix)
        maps = maps / maps.amax((2, 3), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        size = (x.shape[2], x.shape[3])
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[:, 0]


def rollout(
    attention: Iterable[Tensor],
    *,
    fusion: Fusion = "mean",
    discard_ratio: float = 0.9,
    normalize: Normalization = "legacy",
) -> Tensor:
    """Return R, how much of each token reaches each token: [B, N, N], row by row.

    Args:
        attention: probabilities of each block, [B, heads, N, N], first block first.
        fusion: joins the heads.
        discard_ratio: share of the smallest joint entries of an image that become zero; the first entry, of the
            class token by itself, is never one of them.
        normalize: ``row`` divides each row by its sum, ``legacy`` each column j by the sum of row j.
    """
    joined: Tensor | None = None
    for heads in attention:
        mixed = _without_smallest(_fused(heads, fusion), discard_ratio)
        mixed = (mixed + torch.eye(mixed.shape[-1], device=mixed.device, dtype=mixed.dtype)) / 2
        sums = mixed.sum(-1)
        mixed = mixed / (sums[:, :, None] if normalize == "row" else sums[:, None, :])
        joined = mixed if joined is None else mixed @ joined
    if joined is None:
        raise NotApplicableError("the model has no blocks whose attention could be followed")
    return joined


def _fused(heads: Tensor, fusion: Fusion) -> Tensor:
    if fusion == "mean":
        return heads.mean(1)
    return heads.amax(1) if fusion == "max" else heads.amin(1)


def _without_smallest(attention: Tensor, share: float) -> Tensor:
    flat = attention.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * share), dim=1, largest=False).indices
    kept = flat.scatter(1, smallest, 0.0)
    kept[:, 0] = flat[:, 0]
    return kept.view_as(attention)
