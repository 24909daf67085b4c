"""Perplexity of a language model on windows of one text.

The whole text goes through the model's tokenizer as one string; the ids are cut into consecutive windows that
do not overlap; every window is scored on its own, without context from the one before. With losses ``l_wt``
(nats) of token ``t`` in window ``w``::

    perplexity = exp( mean_w  mean_t>0  l_wt )

The mean loss of a window is the unit of paired statistics. This is the protocol of the GPTQ line of papers.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import materialized
from methodbench_quant.tasks.texts import Corpus, calibration_text, evaluation_text
from methodbench_quant.tasks.tokens import consecutive, draw_calibration, token_ids, tokenizer_digest

_BATCH_TOKENS = 512
_ROWS = 128


@hyperparameters
class Perplexity:
    """Scores the first windows of a text and calibrates on another text of the same kind."""

    text: Annotated[Corpus, Field(description="what is scored; calibration text follows")] = "pydoc"
    windows: Annotated[int, Field(ge=0, description="windows scored; 0 for all of the text")] = 4
    length: Annotated[int, Field(ge=2, le=131072, description="tokens of a window")] = 512
    calibration_samples: Annotated[int, Field(ge=1, le=4096, description="sequences for calibration")] = 16
    calibration_length: Annotated[
        int, Field(ge=2, le=131072, description="tokens of a calibration sequence")
    ] = 512

    def calibration(self, model: LoadedModel, ctx: Context) -> Calibration:
        """Return token ids [calibration_samples, calibration_length] drawn with ``ctx.seed``.

        Raises:
            ParameterError: the text is too short for so many sequences.
        """
        samples, length = self.calibration_samples, self.calibration_length
        return draw_calibration(calibration_text(self.text), model.tokenizer, samples, length, ctx)

    def evaluate(self, model: LoadedModel, ctx: Context) -> Evaluation:
        """Return the mean loss of every window as the score ``perplexity`` (nats per token).

        A window whose loss is not finite scores infinity, with a warning.

        Raises:
            NotApplicableError: windows are longer than the model's positions.
            ParameterError: the text has fewer windows than asked for.
        """
        limit = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
        if limit is not None and self.length > limit:
            raise NotApplicableError(
                f"windows of {self.length} tokens exceed the {limit} positions of {model.name}",
                f"Set length to {limit} or less.",
            )
        with ctx.phase("tokenize"):
            text = evaluation_text(self.text)
            ids = token_ids(text, model.tokenizer, ctx)
            windows = consecutive(ids, self.length)
        wanted = max(1, self.windows)
        if len(windows) < wanted:
            raise ParameterError(
                f"the text has {len(windows)} windows of {self.length} tokens, {wanted} were asked for",
                "Lower windows or length.",
            )
        windows = windows[: self.windows or None]
        device = model.device
        with materialized(model.module):
            start = time.perf_counter()
            losses = window_losses(model.module, windows.to(device)).cpu().numpy()
            seconds = time.perf_counter() - start
        broken = ~np.isfinite(losses)
        if broken.any():
            ctx.warn(f"{int(broken.sum())} of {len(losses)} windows have a loss that is not finite")
            losses = np.where(broken, np.inf, losses)
        scored = windows.numel() - len(windows)
        return Evaluation(
            scores={"perplexity": Scores(losses)},
            facts={
                "text": text.source,
                "text_sha256": text.sha256,
                "text_tokens": len(ids),
                "tokenizer_sha256": tokenizer_digest(model.tokenizer),
                "windows": len(windows),
                "length": self.length,
                "tokens_scored": scored,
                "joining": f"{text.joining}; one string through the tokenizer, windows without overlap",
            },
            throughput=(scored / seconds, "tokens/s"),
        )


@torch.no_grad()
def window_losses(module: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per predicted token of each window, float64 [windows], in nats.

    Args:
        module: a causal language model whose output has ``logits`` [B, T, vocabulary].
        windows: token ids [windows, length]; the first of each window is context only.
    """
    batch = max(1, _BATCH_TOKENS // windows.shape[1])
    losses = []
    for ids in windows.split(batch):
        # The last token predicts nothing that is scored, so it need not enter the model.
        logits = module(ids[:, :-1], use_cache=False).logits
        losses.append(
            token_losses(logits.flatten(0, 1), ids[:, 1:].flatten()).view(len(ids), -1).double().mean(1)
        )
    return torch.cat(losses)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return ``-log softmax(logits)[target]`` in fp32 [N] for ``logits`` [N, vocabulary] and ``targets`` [N].

    A few rows at a time, so that no second copy of all logits is made.
    """
    parts = [
        nn.functional.cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    ]
    return torch.cat(parts)
