"""Optimizers on a small decoder that predicts the next character of a text.

The text is Shakespeare's plays where the data folder has them, else the chapters of the language reference that
Python's ``help()`` shows: two tasks, whose records never meet. The last tenths of a text are held out, one for
validation and one for the test; windows of a part never reach into another.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.errors import DivergedError, SourceError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, Scores
from methodbench.sources import data_path
from methodbench_optim.workloads.decoder import Decoder, token_loss
from methodbench_optim.workloads.loop import Course, Problem, schedule, train

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel

TextName = Literal["pydoc", "shakespeare"]


@hyperparameters
class Characters:
    """Train a decoder of characters. Unit: a window of the test text.

    Scores: ``test-nll`` in nats per character, the mean over each window; ``validation-loss``, at the end;
    ``steps-to-target``, the first evaluated step whose validation loss is at most the target, infinite for a miss.
    Series: ``validation-loss``.
    """

    text: Annotated[TextName, Field(description="what is read")] = "pydoc"
    width: Annotated[int, Field(ge=8, le=1024, description="of the decoder")] = 64
    depth: Annotated[int, Field(ge=1, le=16, description="blocks")] = 2
    heads: Annotated[int, Field(ge=1, le=16, description="heads of a block")] = 4
    qk_norm: Annotated[bool, Field(description="normalize queries and keys per head")] = False
    z_loss: Annotated[float, Field(ge=0, description="weight of the squared log-normalizer")] = 0.0
    base_fan_in: Annotated[
        int, Field(ge=0, description="fan-in at which rates are as configured (muParam); 0 for all alike")
    ] = 0
    context: Annotated[int, Field(ge=2, le=1024, description="characters of a window")] = 64
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 300
    batch_size: Annotated[int, Field(ge=1, description="windows of one step")] = 16
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps with a rising rate")] = 0.05
    evaluate_every: Annotated[int, Field(ge=1, description="steps between two looks")] = 20
    held_out: Annotated[int, Field(ge=1, description="windows of a look, and of the test")] = 64
    target_loss: Annotated[float, Field(gt=0, description="validation loss to reach, in nats")] = 2.4

    @model_validator(mode="after")
    def _heads_divide(self) -> Characters:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is no multiple of twice the {self.heads} heads")
        return self

    def evaluate(self, method: OptimizerMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train once, with the hyperparameters as configured.

        Raises:
            DivergedError: the validation loss ends up not finite.
            SourceError: the text is not on this machine.
        """
        text = read_text(self.text)
        with ctx.phase("train"):
            course = self.train(method, text, ctx)
        if math.isinf(course.final_loss):
            raise DivergedError(f"the loss is not finite after {course.steps} steps", "Lower lr.")
        reached = course.first(lambda seen: seen.loss <= self.target_loss)
        return Evaluation(
            scores={
                "test-nll": Scores(self.losses(course, text.windows("test", self, ctx))),
                "validation-loss": Scores(np.array([course.final_loss])),
                "steps-to-target": Scores(np.array([reached.step if reached else math.inf])),
            },
            series={"validation-loss": np.array(course.losses)},
            facts={
                "vocabulary": len(text.characters),
                "text_sha256": text.sha256,
                "target_loss": self.target_loss,
                "seconds_to_target": reached.seconds if reached else None,
                **course.facts(),
            },
        )

    def train(
        self, method: OptimizerMethod, text: Text, ctx: Context, share: Callable[[int], float] | None = None
    ) -> Course:
        """Train a decoder from the initialization and on the windows that ``ctx.seed`` stands for.

        Args:
            share: share of the peak rate at a step, from 1; linear warm-up and cosine by default.
        """
        module = Decoder(
            len(text.characters),
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            qk_norm=self.qk_norm,
            seed=ctx.seed,
        ).to(ctx.device, getattr(torch, ctx.dtype))
        generator = torch.Generator().manual_seed(ctx.seed)
        # Windows are drawn here, so that a step draws nothing: their order is the same for every optimizer.
        starts = torch.randint(
            text.parts["train"].numel() - self.context, (self.steps, self.batch_size), generator=generator
        )
        tokens = text.parts["train"].to(ctx.device)
        span = torch.arange(self.context + 1)
        held = text.windows("validation", self, ctx)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            windows = tokens[starts[step - 1][:, None] + span]
            return windows[:, :-1], windows[:, 1:]

        @torch.no_grad()
        def look(module: nn.Module) -> tuple[float, float]:
            logits, targets = module(held[:, :-1]), held[:, 1:]
            right = (logits.argmax(-1) == targets).double().mean()
            return float(token_loss(logits, targets)), float(right)

        problem = Problem(
            module,
            functools.partial(token_loss, z=self.z_loss),
            batch,
            look,
            head=module.head.weight,
            embeddings=[module.embedding.weight],
            base_fan_in=self.base_fan_in,
        )
        if share is None:
            share = functools.partial(schedule, steps=self.steps, warmup=self.warmup)
        return train(method, problem, ctx, steps=self.steps, evaluate_every=self.evaluate_every, share=share)

    @staticmethod
    @torch.no_grad()
    def losses(course: Course, windows: Tensor) -> np.ndarray:
        """Return the mean loss of each window, float64 [windows]."""
        logits = course.module(windows[:, :-1]).double()
        losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
        return losses.mean(1).cpu().numpy()


@dataclass(frozen=True, slots=True)
class Text:
    """A text as indices of its characters, in three parts, and the digest of its UTF-8 bytes."""

    characters: str
    parts: dict[str, Tensor]
    sha256: str

    def windows(self, part: str, task: Characters, ctx: Context) -> Tensor:
        """Return evenly spread windows of a part: int64 [held_out, context + 1]."""
        tokens = self.parts[part]
        starts = torch.linspace(0, tokens.numel() - task.context - 1, task.held_out).long()
        return tokens[starts[:, None] + torch.arange(task.context + 1)].to(ctx.device)


def prose(name: TextName) -> str:
    """Return a text: Shakespeare's plays from the data folder, or the topics of Python's documentation.

    Raises:
        SourceError: no data folder holds the text.
    """
    if name == "shakespeare":
        path = data_path("tinyshakespeare/input.txt")
        if path is None:
            raise SourceError(
                "no data folder holds tinyshakespeare/input.txt",
                "Set METHODBENCH_DATA, or choose another text: the others come with Python.",
            )
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    return "\n".join(topics.values())


@functools.cache
def read_text(name: TextName) -> Text:
    """Read a text and split it 8 : 1 : 1.

    Raises:
        SourceError: no data folder holds the text.
    """
    content = prose(name)
    characters = "".join(sorted(set(content)))
    index = {character: number for number, character in enumerate(characters)}
    tokens = torch.tensor([index[character] for character in content])
    cuts = [tokens.numel() * 8 // 10, tokens.numel() * 9 // 10]
    parts = dict(zip(("train", "validation", "test"), tokens.tensor_split(cuts), strict=True))
    return Text(characters, parts, hashlib.sha256(content.encode()).hexdigest())
