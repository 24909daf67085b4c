"""The rules written out for one tensor at a time, as their papers have them, to hold the multi-tensor code against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def lion(p: Tensor, g: Tensor, state: State, lr: float, b1: float, b2: float, decay: float) -> Tensor:
    m = state.get("m", torch.zeros_like(p))
    state["m"] = b2 * m + (1 - b2) * g
    return p * (1 - lr * decay) - lr * torch.sign(b1 * m + (1 - b1) * g)


def diffgrad(p: Tensor, g: Tensor, state: State, lr: float, b1: float, b2: float, decay: float) -> Tensor:
    zeros = torch.zeros_like(p)
    g, t = g + decay * p, state.get("t", 0) + 1
    m, v = b1 * state.get("m", zeros) + (1 - b1) * g, b2 * state.get("v", zeros) + (1 - b2) * g * g
    xi = 1 / (1 + torch.exp(-(state.get("g", zeros) - g).abs()))
    state |= {"t": t, "m": m, "v": v, "g": g}
    return p - lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * m * xi / (v.sqrt() + 1e-8)


def lion_l2(p: Tensor, g: Tensor, state: State, lr: float, b1: float, b2: float, decay: float) -> Tensor:
    m = state.get("m", torch.zeros_like(p))
    c = b1 * m + (1 - b1) * g
    state["m"] = b2 * m + (1 - b2) * g
    return p * (1 - lr * decay) - lr * c / c.norm()


def muon(p: Tensor, g: Tensor, state: State, lr: float, b1: float, b2: float, decay: float) -> Tensor:
    """Matrices by Newton-Schulz in float64, vectors by AdamW at the same rate; b1 is the momentum of both."""
    zeros, t = torch.zeros_like(p), state.get("t", 0) + 1
    m = b1 * state.get("m", zeros) + (1 - b1) * g
    v = b2 * state.get("v", zeros) + (1 - b2) * g * g
    state |= {"t": t, "m": m, "v": v}
    if p.ndim < 2:
        return p * (1 - lr * decay) - lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-10)
    x = (1 - b1) * g + b1 * m
    rows, columns = x.shape
    x = x.T if rows > columns else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if rows > columns else x
    return p * (1 - lr * decay) - lr * max(1, rows / columns) ** 0.5 * x


def adafactor(p: Tensor, g: Tensor, state: State, lr: float, b1: float, b2: float, decay: float) -> Tensor:
    """The paper's form, which has neither b1 nor b2: at step t the second moment keeps 1 - t^-0.8 of itself."""
    t = state.get("t", 0) + 1
    keep = 1 - t**-0.8
    squares = g * g + 1e-30
    rate = lr * max(1e-3, float((p * p).mean()) ** 0.5)
    if p.ndim < 2:
        v = keep * state.get("v", 0.0) + (1 - keep) * squares
        state |= {"t": t, "v": v}
    else:
        rows = keep * state.get("rows", 0.0) + (1 - keep) * squares.mean(1)
        columns = keep * state.get("columns", 0.0) + (1 - keep) * squares.mean(0)
        state |= {"t": t, "rows": rows, "columns": columns}
        v = torch.outer(rows, columns) / rows.mean()
    u = g / v.sqrt()
    u = u / max(1.0, float((u * u).mean()) ** 0.5)
    return p * (1 - rate * decay) - rate * u


REFERENCES: Mapping[str, Any] = {
    "lion": lion,
    "diffgrad": diffgrad,
    "lion-k": lion_l2,
    "muon": muon,
    "adafactor": adafactor,
}
