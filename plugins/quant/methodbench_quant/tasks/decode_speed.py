"""How fast a compressed language model decodes, beside the dense model.

Both models go on from the same prompt, greedily, one token at a time, batch 1, with a key-value cache; the time of the
prompt does not count. Repeats alternate between the two, so that what else the machine does hits both alike, and the
speed-up of a repeat is the ratio of its two rates::

    speedup = median over repeats of  (tokens per second, compressed) / (tokens per second, dense)

It is 1 for the dense model itself, and below 1 where a method costs more than it spares. What is measured is the model
as its method returned it: masks on dense weights cost time, and nothing is credited that no product makes use of.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import decoding
from methodbench_quant.decode import paired_rates
from methodbench_quant.tasks.texts import Corpus, calibration_text, evaluation_text
from methodbench_quant.tasks.tokens import draw_calibration, token_ids


@hyperparameters
class DecodeSpeed:
    """Times greedy decoding of single tokens, compressed and dense model in turn."""

    text: Annotated[Corpus, Field(description="where the prompt is from; calibration text follows")] = "pydoc"
    prompt: Annotated[int, Field(ge=1, le=131072, description="tokens of the prompt")] = 32
    tokens: Annotated[int, Field(ge=1, le=131072, description="tokens decoded in a repeat")] = 32
    repeats: Annotated[int, Field(ge=1, le=1000, description="timed repeats of each model")] = 9
    calibration_samples: Annotated[int, Field(ge=1, le=4096, description="sequences for calibration")] = 8
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
        """Return the scores ``speedup``, ``tokens_per_second`` and ``dense_tokens_per_second`` of every repeat.

        Raises:
            NotApplicableError: prompt and tokens exceed the model's positions, or nobody gave the dense model.
            ParameterError: the text is shorter than the prompt.
        """
        limit = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
        if limit is not None and self.prompt + self.tokens > limit:
            raise NotApplicableError(
                f"{self.prompt} + {self.tokens} tokens exceed the {limit} positions of {model.name}",
                "Lower prompt or tokens.",
            )
        if ctx.dense is None:
            raise NotApplicableError(
                f"decode speed compares {model.name} with its dense model, which is not at hand",
                "Run the task through the engine.",
            )
        text = evaluation_text(self.text)
        ids = token_ids(text, model.tokenizer, ctx)[: self.prompt]
        if len(ids) < self.prompt:
            raise ParameterError(
                f"the text has {len(ids)} tokens, {self.prompt} were asked for", "Lower prompt."
            )
        prompt = ids[None].to(model.device)
        with decoding(model.module) as kernels:
            (rates, dense), (ours, theirs) = paired_rates(
                model.module, ctx.dense.module, prompt, self.tokens, self.repeats
            )
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        return Evaluation(
            scores={
                "speedup": Scores(np.array(rates) / np.array(dense)),
                "tokens_per_second": Scores(np.array(rates)),
                "dense_tokens_per_second": Scores(np.array(dense)),
            },
            facts={
                "text": text.source,
                "text_sha256": text.sha256,
                "prompt": self.prompt,
                "tokens": self.tokens,
                "tokens_before_first_difference": same,
                "kernels": sorted(set(kernels.values())),
                "protocol": "greedy, batch 1, key-value cache; repeats alternate with the dense model",
            },
            throughput=(float(np.median(rates)), "tokens/s"),
        )
