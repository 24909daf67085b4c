"""The prepared folder of an image model, and how weights get in and out of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import SourceError

WEIGHTS = "model.safetensors"


def read_checkpoint(path: Path | None) -> dict[str, Any]:
    """Read a torch checkpoint without running code from it.

    Raises:
        SourceError: there is no file, or it holds something else than tensors and plain values.
    """
    if path is None:
        raise SourceError("the model has no weights file", "Its source must be a file, not a recipe.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SourceError(
            f"{path.name} is not a checkpoint of plain tensors: {error}",
            "Delete the cached file and fetch it again; pickled code is never run.",
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        SourceError: the file is missing, truncated or not a safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{path} cannot be read as safetensors: {error}", "Delete the file and fetch or prepare it again."
        ) from error


def save_weights(weights: Mapping[str, Tensor], target: Path) -> None:
    """Write floating-point tensors as float32, and others as they are, to ``target/model.safetensors``."""
    plain = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in weights.items()
    }
    save_file(plain, target / WEIGHTS)


def load_weights(module: nn.Module, folder: Path, ctx: Context) -> nn.Module:
    """Fill ``module`` from ``folder/model.safetensors``; return it frozen, in eval mode.

    Its tensors have the device and the dtype of the cell.

    Raises:
        SourceError: the file lacks a tensor, has one too many, or one of another shape.
    """
    try:
        module.load_state_dict(read_safetensors(folder / WEIGHTS), assign=True)
    except RuntimeError as error:
        raise SourceError(
            f"the weights in {folder / WEIGHTS} do not fit the architecture: {error}",
            "Delete the folder so that it is prepared again.",
        ) from error
    return module.to(ctx.device, getattr(torch, ctx.dtype)).eval().requires_grad_(False)
