"""A pre-trained language model that is fine-tuned with a small budget: a few dozen steps on short sequences.

Optimizers are run as configured; a method of training hooks into the loop, and AdamW takes the steps. The model is
scored on the new text and on the text that methods replay, which is closer to what it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, Scores, TrainingMethod
from methodbench.torchkit.text_tuning import own_parameters
from methodbench_optim.baselines import AdamW
from methodbench_optim.workloads.decoder import token_loss
from methodbench_optim.workloads.finetuning import content, look, per_window
from methodbench_optim.workloads.loop import Problem, schedule, train
from methodbench_optim.workloads.pictures import both

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel


@hyperparameters
class FineTuneLanguageModel:
    """Fine-tune a causal language model. Unit: a sequence.

    Scores: ``test-nll`` in nats per token of the new text; ``general-nll`` of Python's language reference, and
    ``forgetting``, by how much that is above its value before; ``validation-loss`` on the new text, at the end.
    Series: ``validation-loss``.
    """

    text: Annotated[Literal["programs", "shakespeare"], Field(description="what is fine-tuned on")] = (
        "shakespeare"
    )
    tokens: Annotated[int, Field(ge=2, le=4096, description="of a sequence")] = 64
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 24
    batch_size: Annotated[int, Field(ge=1, description="sequences of one step")] = 2
    lr: Annotated[float, Field(gt=0, description="peak rate of AdamW under a method of training")] = 2e-5
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps with a rising rate")] = 0.1
    general_samples: Annotated[int, Field(ge=1, description="sequences for replay")] = 32
    evaluate_every: Annotated[int, Field(ge=1, description="steps between two looks")] = 12
    held_out: Annotated[int, Field(ge=1, description="sequences of a look, and of each test")] = 16
    characters: Annotated[int, Field(ge=1000, description="of each text, from its start")] = 200_000

    def evaluate(
        self, method: OptimizerMethod | TrainingMethod, model: LoadedModel | None, ctx: Context
    ) -> Evaluation:
        """Fine-tune a copy of ``model``.

        Raises:
            DivergedError: the validation loss ends up not finite.
            NotApplicableError: the model has no tokenizer or gives no logits.
            SourceError: the text is not on this machine.
        """
        assert model is not None, "the task accepts models"
        if model.tokenizer is None:
            raise NotApplicableError("the model has no tokenizer, so text is nothing to it")
        own = model.clone()
        own_parameters(own.module)
        module = Logits(own.module)
        new, general = (self.sequences(model.tokenizer, name) for name in (self.text, "reference"))
        draw = torch.Generator().manual_seed(ctx.seed)
        rest = spread(new, self.held_out, "learn")
        chosen = torch.randint(len(rest), (self.steps * self.batch_size,), generator=draw)
        learnt = rest[chosen].to(ctx.device)
        replay = spread(general, self.held_out, "learn")[: self.general_samples].to(ctx.device)
        held = spread(new, self.held_out, "validate").to(ctx.device)
        tested = spread(new, self.held_out, "test").to(ctx.device)
        before = spread(general, self.held_out, "test").to(ctx.device)
        with ctx.phase("prepare"):
            general_before, _ = per_window(module.eval(), before)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            rows = learnt[(step - 1) * self.batch_size : step * self.batch_size]
            return rows[:, :-1], rows[:, 1:]

        optimizer, training = both(method, lambda: AdamW(lr=self.lr, weight_decay=0.0))
        problem = Problem(
            module,
            token_loss,
            batch,
            functools.partial(look, held),
            head=weight_of(own.module, "get_output_embeddings"),
            embeddings=[weight_of(own.module, "get_input_embeddings")],
        )
        with ctx.phase("train"):
            course = train(
                optimizer,
                problem,
                dataclasses.replace(ctx, supplies={"replay": (replay[:, :-1], replay[:, 1:])}),
                steps=self.steps,
                evaluate_every=self.evaluate_every,
                share=functools.partial(schedule, steps=self.steps, warmup=self.warmup),
                training=training,
            )
        if math.isinf(course.final_loss):
            raise DivergedError(f"the loss is not finite after {course.steps} steps", "Lower lr.")
        nll, _ = per_window(course.module, tested)
        general_nll, _ = per_window(course.module, before)
        return Evaluation(
            scores={
                "test-nll": Scores(nll),
                "general-nll": Scores(general_nll),
                "forgetting": Scores(general_nll - general_before),
                "validation-loss": Scores(np.array([course.final_loss])),
            },
            series={"validation-loss": np.array(course.losses)},
            facts={"general_nll_before": float(general_before.mean()), **course.facts()},
            throughput=(course.steps / course.looks[-1].seconds, "steps/s"),
        )

    def sequences(self, tokenizer: Any, name: Literal["programs", "shakespeare", "reference"]) -> Tensor:
        """Return consecutive sequences of a text's tokens, int64 [sequences, tokens + 1]."""
        ids = tokenizer(content(name)[: self.characters], verbose=False)["input_ids"]
        length = self.tokens + 1
        if len(ids) // length < 4 * self.held_out:
            raise NotApplicableError(
                f"{self.characters} characters are {len(ids) // length} sequences, too few to learn from"
            )
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


class Logits(nn.Module):
    """A model of transformers that returns logits [N, T, vocabulary] for ids [N, T]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        found = getattr(self.model(ids), "logits", None)
        if found is None:
            raise NotApplicableError("the model gives no logits, so text has no loss")
        logits: Tensor = found
        return logits


def weight_of(module: nn.Module, getter: str) -> Any:
    """Return the weight of a model's input or output embeddings; None where it names none."""
    found = getattr(module, getter, lambda: None)()
    return getattr(found, "weight", None)


def spread(sequences: Tensor, held_out: int, part: Literal["learn", "validate", "test"]) -> Tensor:
    """Return one of three parts of sequences [N, ...]: ``held_out`` each are spread evenly for two of them."""
    picked = torch.linspace(0, len(sequences) - 1, 2 * held_out).long()
    if part == "learn":
        mask = torch.ones(len(sequences), dtype=torch.bool)
        mask[picked] = False
        return sequences[mask]
    return sequences[picked[::2] if part == "validate" else picked[1::2]]
