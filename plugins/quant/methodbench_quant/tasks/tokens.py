"""Token ids of whole texts, and sequences drawn from them for calibration."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.torchkit.model import Calibration
from methodbench_quant.tasks.texts import Text


def draw_calibration(text: Text, tokenizer: Any, samples: int, length: int, ctx: Context) -> Calibration:
    """Return token ids [samples, length] of ``text``.

    The text is cut into consecutive sequences, of which a sample drawn with ``ctx.seed`` is taken without
    replacement, in random order.

    Raises:
        NotApplicableError: there is no tokenizer.
        ParameterError: the text is too short for so many sequences.
    """
    sequences = consecutive(token_ids(text, tokenizer, ctx), length)
    if len(sequences) < samples:
        raise ParameterError(
            f"the calibration text has {len(sequences)} sequences of {length} tokens, "
            f"{samples} were asked for",
            "Lower calibration_samples or calibration_length.",
        )
    generator = torch.Generator().manual_seed(ctx.seed)
    chosen = torch.randperm(len(sequences), generator=generator)[:samples]
    source = f"{text.source}, {samples} x {length} tokens, seed {ctx.seed}, sha256 {text.sha256[:12]}"
    return Calibration(sequences[chosen], source)


def token_ids(text: Text, tokenizer: Any, ctx: Context) -> Tensor:
    """Return the ids of the whole text as one string, int64 [tokens], kept under ``ctx.cache``.

    Raises:
        NotApplicableError: there is no tokenizer.
    """
    if tokenizer is None:
        raise NotApplicableError(
            "the model has no tokenizer, so text is nothing to it", "Choose a model that comes with one."
        )
    cached = None
    if ctx.cache is not None:
        name = hashlib.sha256(f"{text.sha256} {tokenizer_digest(tokenizer)}".encode()).hexdigest()
        cached = ctx.cache / "tokens" / f"{name}.npy"
        if cached.is_file():
            try:
                return torch.from_numpy(np.load(cached, allow_pickle=False).astype(np.int64))
            except (OSError, ValueError):
                cached.unlink(missing_ok=True)
    ids = np.asarray(tokenizer(text.content, verbose=False)["input_ids"], dtype=np.int32)
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_name(f"{cached.stem}.{os.getpid()}.tmp")
        with partial.open("wb") as file:
            np.save(file, ids, allow_pickle=False)
        partial.replace(cached)
    return torch.from_numpy(ids.astype(np.int64))


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a sha256 over what decides a tokenizer's ids: the fast tokenizer's JSON, or the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    # Padding and truncation of the last call are kept inside the tokenizer and change nothing here.
    special = repr(
        (tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "add_bos_token", None))
    )
    return hashlib.sha256(f"{special}{described}".encode()).hexdigest()


def consecutive(ids: Tensor, length: int) -> Tensor:
    """Return consecutive pieces [pieces, length] of ``ids`` [tokens]; a shorter rest is dropped."""
    return ids[: len(ids) // length * length].view(-1, length)
