"""Networks that are trained once, before what a task measures, and kept in the cache folder for every cell."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from methodbench.provenance import digest

if TYPE_CHECKING:
    from methodbench.context import Context


def trained_once(
    module: nn.Module, identity: Mapping[str, Any], train: Callable[[], object], ctx: Context
) -> None:
    """Give ``module`` the weights that ``train`` gives it: from the cache where they are, else by training.

    Args:
        module: in its initial state; ``train`` trains it in place.
        identity: everything that the weights depend on, JSON-ready; seed, device class, dtype and torch's version
            are added.
        train: takes no argument.
        ctx: seed, device, cache folder.
    """
    if ctx.cache is None:
        train()
        return
    where = {"seed": ctx.seed, "device": ctx.device.partition(":")[0], "dtype": ctx.dtype}
    key = digest({**identity, **where, "threads": ctx.threads, "torch": torch.__version__})
    path = ctx.cache / "bases" / f"{key}.safetensors"
    if not path.exists():
        train()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and moved: another cell sees all of it or nothing.
        handle, partial = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
        save_file({name: value.contiguous() for name, value in module.state_dict().items()}, partial)
        os.replace(partial, path)
    module.load_state_dict(load_file(path, device=ctx.device))
