"""Probes of language models: numbers about a model as it is, on a text of which it sees the first windows."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from methodbench.context import Context
from methodbench.entries import Metric
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Probe, Scores
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.tasks.texts import Corpus, evaluation_text
from methodbench_quant.tasks.tokens import consecutive, token_ids, tokenizer_digest


@hyperparameters
class Probing:
    """Hands windows of a text to a probe. Its scalars become metrics, its arrays become curves."""

    text: Annotated[Corpus, Field(description="what the model reads")] = "pydoc"
    windows: Annotated[int, Field(ge=1, description="windows that the probe may use")] = 8
    length: Annotated[int, Field(ge=2, le=131072, description="tokens of a window")] = 512

    def evaluate(self, method: Probe, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Run the probe; its first scalar is repeated as ``score``.

        Raises:
            NotApplicableError: no model, windows longer than its positions, or a probe without a scalar.
            ParameterError: the text has fewer windows than asked for.
        """
        if model is None:
            raise NotApplicableError("a probe needs a model", "Name one in the suite.")
        limit = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
        if limit is not None and self.length > limit:
            raise NotApplicableError(
                f"windows of {self.length} tokens exceed the {limit} positions of {model.name}",
                f"Set length to {limit} or less.",
            )
        text = evaluation_text(self.text)
        windows = consecutive(token_ids(text, model.tokenizer, ctx), self.length)
        if len(windows) < self.windows:
            raise ParameterError(
                f"the text has {len(windows)} windows of {self.length} tokens, {self.windows} were asked for",
                "Lower windows or length.",
            )
        source = f"{text.source}, first {self.windows} x {self.length} tokens, sha256 {text.sha256[:12]}"
        measured = method.measure(model, Calibration(windows[: self.windows], source), ctx)
        scalars = {name: float(value) for name, value in measured.items() if np.ndim(value) == 0}
        if not scalars:
            raise NotApplicableError("the probe measured no scalar")
        scores = {
            name: Scores(np.array([value]), Metric(name=name, direction="lower", aggregate="single"))
            for name, value in scalars.items()
        }
        first = next(iter(scalars.values()))
        return Evaluation(
            scores={"score": Scores(np.array([first])), **scores},
            series={
                name: np.asarray(value, dtype=np.float64)
                for name, value in measured.items()
                if np.ndim(value) == 1
            },
            facts={
                "text": text.source,
                "text_sha256": text.sha256,
                "tokenizer_sha256": tokenizer_digest(model.tokenizer),
                "windows": self.windows,
                "length": self.length,
                "score": next(iter(scalars)),
            },
        )
