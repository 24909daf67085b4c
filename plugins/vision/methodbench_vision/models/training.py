"""Training of recipe models: small networks, repeatable bit for bit on one machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import DivergedError


def train(
    module: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    peak_rate: float,
    weight_decay: float,
    ctx: Context,
) -> None:
    """Train a classifier in place with AdamW and a one-cycle schedule; leaves it in eval mode.

    Args:
        module: maps float inputs [B, ...] to logits [B, classes].
        inputs: float [samples, ...].
        labels: int64 [samples].
        epochs: passes over the samples, each in a fresh order; a last partial batch is left out.
        batch_size: samples per step.
        peak_rate: highest learning rate of the cycle.
        weight_decay: AdamW's.
        ctx: its log gets one line per fifth of the epochs.
    """
    steps = len(inputs) // batch_size
    optimizer = torch.optim.AdamW(module.parameters(), lr=peak_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak_rate, total_steps=epochs * steps)
    module.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(inputs))[: steps * batch_size].split(batch_size):
            loss = F.cross_entropy(module(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % max(1, epochs // 5) == 0:
            ctx.log(f"epoch {epoch} of {epochs}: loss {total / steps:.4f}")
    module.eval()


def check_accuracy(module: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, least: float) -> None:
    """Refuse a recipe's result that falls short of what the recipe is known to reach.

    Raises:
        DivergedError: the share of right answers on held-out ``inputs`` is below ``least``.
    """
    with torch.inference_mode():
        right = sum(
            int((module(x).argmax(dim=1) == y).sum())
            for x, y in zip(inputs.split(100), labels.split(100), strict=True)
        )
    accuracy = right / len(labels)
    if accuracy < least:
        raise DivergedError(
            f"the trained network is right on {accuracy:.1%} of the held-out images, not on {least:.0%}",
            "Train for more epochs or with another seed.",
        )
