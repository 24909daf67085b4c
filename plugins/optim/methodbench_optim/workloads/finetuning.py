"""A small language model of characters that is fine-tuned on another kind of text: what it learns, and what it forgets.

The decoder of :mod:`methodbench_optim.workloads.decoder` is trained on Python's language reference. It is then
fine-tuned on Python programs (the standard library's own) or on Shakespeare's plays, under a method of training, and
scored on windows of both texts that had no part in it. A share of the labels that it is fine-tuned on may be drawn at
random; the text that it reads and is scored on stays clean.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib
import inspect
import math
import string
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError, SourceError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores, TrainingMethod
from methodbench_optim.baselines import AdamW
from methodbench_optim.workloads.bases import trained_once
from methodbench_optim.workloads.characters import prose
from methodbench_optim.workloads.decoder import Decoder, token_loss
from methodbench_optim.workloads.loop import Problem, schedule, train
from methodbench_optim.workloads.sparsity import densities

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel

TextName = Literal["reference", "programs", "shakespeare"]
#: Characters of all texts; any other is read as the last one.
ALPHABET = string.printable
#: Modules of the standard library whose source is the text ``programs``.
PROGRAMS = (
    "argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "fractions", "inspect", "ipaddress",
    "logging", "mailbox", "optparse", "pathlib", "pickle", "pydoc", "statistics", "subprocess", "tarfile",
    "threading", "typing", "uuid", "zipfile",
)  # fmt: skip


@hyperparameters
class FineTuneText:
    """Fine-tune a decoder of characters on other text. Unit: a window.

    Scores: ``test-nll`` in nats per character on the new text, ``test-accuracy`` likewise; ``general-nll`` on the text
    that the decoder comes from; ``forgetting``, by how much that is above its value before; ``validation-loss`` on the
    new text, at the end. Facts: ``kl_to_base``, the divergence of the fine-tuned model's predictions of the new text
    from the base's in nats per character, and densities. Series: ``validation-loss``.
    """

    text: Annotated[TextName, Field(description="what is fine-tuned on")] = "programs"
    noise: Annotated[
        float, Field(ge=0, lt=1, description="share of the labels that are drawn at random instead")
    ] = 0.0
    width: Annotated[int, Field(ge=8, le=1024, description="of the decoder")] = 64
    depth: Annotated[int, Field(ge=1, le=16, description="blocks")] = 2
    relu: Annotated[bool, Field(description="ReLUs in the decoder in place of GELUs")] = False
    context: Annotated[int, Field(ge=2, le=1024, description="characters of a window")] = 64
    base_steps: Annotated[int, Field(ge=1, description="steps of the training before")] = 800
    steps: Annotated[int, Field(ge=1, description="steps of the fine-tuning")] = 300
    batch_size: Annotated[int, Field(ge=1, description="windows of one step")] = 16
    lr: Annotated[float, Field(gt=0, description="peak rate of AdamW in the fine-tuning")] = 1e-3
    general_samples: Annotated[
        int, Field(ge=1, description="windows of the first text, for replay; the paper has 1,000 texts")
    ] = 200
    evaluate_every: Annotated[int, Field(ge=1, description="steps between two looks")] = 50
    held_out: Annotated[int, Field(ge=1, description="windows of a look, and of the test")] = 128

    def evaluate(self, method: TrainingMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train the base (once for all methods), then fine-tune under ``method``.

        Raises:
            DivergedError: the validation loss ends up not finite.
            SourceError: the text is not on this machine.
        """
        general, new = read("reference"), read(self.text)
        base = Decoder(
            len(ALPHABET), width=self.width, depth=self.depth, heads=4, qk_norm=False, seed=ctx.seed
        ).to(ctx.device, getattr(torch, ctx.dtype))
        if self.relu:
            for block in base.blocks:
                block.activation = nn.ReLU()
        with ctx.phase("prepare"):
            self.prepare(base, general, ctx)
        draw = torch.Generator().manual_seed(ctx.seed + 1)
        replay = self.drawn(general.train, self.general_samples, draw).to(ctx.device)
        windows = self.drawn(new.train, self.steps * self.batch_size, draw)
        labels = windows[:, 1:].clone()
        random = torch.rand(labels.shape, generator=draw) < self.noise
        labels[random] = torch.randint(len(ALPHABET), (int(random.sum()),), generator=draw)
        windows, labels = windows.to(ctx.device), labels.to(ctx.device)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            rows = slice((step - 1) * self.batch_size, step * self.batch_size)
            return windows[rows, :-1], labels[rows]

        tested, held, before = (
            self.spread(part).to(ctx.device) for part in (new.test, new.validation, general.test)
        )
        problem = Problem(copy.deepcopy(base), token_loss, batch, functools.partial(look, held))
        with ctx.phase("train"):
            course = train(
                AdamW(lr=self.lr, weight_decay=0.0),
                problem,
                dataclasses.replace(ctx, supplies={"replay": (replay[:, :-1], replay[:, 1:])}),
                steps=self.steps,
                evaluate_every=self.evaluate_every,
                share=functools.partial(schedule, steps=self.steps, warmup=0.05),
                training=method,
            )
        if math.isinf(course.final_loss):
            raise DivergedError(f"the loss is not finite after {course.steps} steps", "Lower lr.")
        nll, right = per_window(course.module, tested)
        general_nll, _ = per_window(course.module, before)
        general_before, _ = per_window(base, before)
        return Evaluation(
            scores={
                "test-nll": Scores(nll),
                "test-accuracy": Scores(right),
                "general-nll": Scores(general_nll),
                "forgetting": Scores(general_nll - general_before),
                "validation-loss": Scores(np.array([course.final_loss])),
            },
            series={"validation-loss": np.array(course.losses)},
            facts={
                "test_nll_before": float(per_window(base, tested)[0].mean()),
                "general_nll_before": float(general_before.mean()),
                "kl_to_base": divergence(base, course.module, tested),
                "trained_parameters": sum(p.numel() for p in course.module.parameters() if p.requires_grad),
                "text_sha256": {"general": general.sha256, "new": new.sha256},
                **densities(course.module, tested[:, :-1]),
                **course.facts(),
            },
        )

    def prepare(self, module: Decoder, text: Text, ctx: Context) -> None:
        """Train ``module`` on ``text``, in place, by AdamW at a rate of 3e-3; or take the weights of that."""
        draw = torch.Generator().manual_seed(ctx.seed)
        windows = self.drawn(text.train, self.base_steps * self.batch_size, draw).to(ctx.device)
        held = self.spread(text.validation).to(ctx.device)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            rows = windows[(step - 1) * self.batch_size : step * self.batch_size]
            return rows[:, :-1], rows[:, 1:]

        identity = {
            "what": ["finetuning", self.width, self.depth, self.relu, self.context, self.batch_size],
            "steps": self.base_steps,
            "text": text.sha256,
        }
        trained_once(
            module,
            identity,
            lambda: train(
                AdamW(lr=3e-3),
                Problem(module, token_loss, batch, functools.partial(look, held)),
                ctx,
                steps=self.base_steps,
                evaluate_every=self.base_steps,
                share=functools.partial(schedule, steps=self.base_steps, warmup=0.05),
            ),
            ctx,
        )
        module.zero_grad()
        module.eval()

    def drawn(self, tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return windows [count, context + 1] from random places."""
        starts = torch.randint(len(tokens) - self.context, (count, 1), generator=generator)
        return tokens[starts + torch.arange(self.context + 1)]

    def spread(self, tokens: Tensor) -> Tensor:
        """Return evenly spread windows [held_out, context + 1]."""
        starts = torch.linspace(0, len(tokens) - self.context - 1, self.held_out).long()
        return tokens[starts[:, None] + torch.arange(self.context + 1)]


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A text as int64 indices into the alphabet, in three parts (8 : 1 : 1), and the digest of its UTF-8 bytes."""

    train: Tensor
    validation: Tensor
    test: Tensor
    sha256: str


@functools.cache
def read(name: TextName) -> Text:
    """Read a text as characters.

    Raises:
        SourceError: as :func:`content`.
    """
    text = content(name)
    index = {character: number for number, character in enumerate(ALPHABET)}
    tokens = torch.tensor([index.get(character, len(ALPHABET) - 1) for character in text])
    train, validation, test = tokens.tensor_split([len(tokens) * 8 // 10, len(tokens) * 9 // 10])
    return Text(train, validation, test, hashlib.sha256(text.encode()).hexdigest())


def content(name: TextName) -> str:
    """Return a text.

    Raises:
        SourceError: no data folder holds it, or this Python comes without the source of its modules.
    """
    if name != "programs":
        return prose("shakespeare" if name == "shakespeare" else "pydoc")
    try:
        return "\n".join(inspect.getsource(importlib.import_module(module)) for module in PROGRAMS)
    except OSError as error:
        raise SourceError(f"this Python has no source of its modules: {error}") from error


@torch.no_grad()
def look(windows: Tensor, module: nn.Module) -> tuple[float, float]:
    """Return loss and accuracy of ``module`` on windows [N, context + 1]."""
    nll, right = per_window(module, windows)
    return float(nll.mean()), float(right.mean())


@torch.no_grad()
def per_window(module: nn.Module, windows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return loss in nats and accuracy, means over each window's characters, float64 [N] each."""
    logits, targets = module(windows[:, :-1]).double(), windows[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
    right = (logits.argmax(-1) == targets).double().mean(1)
    return losses.cpu().numpy(), right.cpu().numpy()


@torch.no_grad()
def divergence(base: nn.Module, module: nn.Module, windows: Tensor) -> float:
    """Return the mean of KL(base ‖ module) over all characters of windows [N, context + 1], in nats."""
    p, q = (found(windows[:, :-1]).double().log_softmax(-1) for found in (base, module))
    return float((p.exp() * (p - q)).sum(-1).mean())
