"""Optimizers on scikit-learn's digits: 1,797 grey pictures of 8 x 8, ten classes, a small MLP, CNN or ViT.

A fair comparison in small (after the rules of AlgoPerf, arXiv 2306.07179): split, initialization and order of
the data are equal for all optimizers; the schedule is linear warm-up then cosine decay; each optimizer is
tuned by the same number of trials, learning rates spread evenly in the logarithm around the one that it is
configured with. The trial with the lowest validation loss after its last step is the one that is scored, on
pictures that had no part in the choice.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, Scores
from methodbench_optim.workloads.loop import Course, Problem, batches, schedule, train

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel


@hyperparameters
class Digits:
    """Train a small classifier. Unit: a test picture.

    Scores, of the chosen trial: ``test-nll`` in nats and ``test-accuracy`` per picture; ``validation-loss``, the
    last of its curve; ``steps-to-target``, the first evaluated step whose validation accuracy reaches the target,
    infinite if none does; the fact ``seconds_to_target`` is its time, None for a miss. Series:
    ``validation-loss``, at step 0 and after every ``evaluate_every`` steps.
    """

    architecture: Annotated[
        Literal["mlp", "cnn", "vit"],
        Field(description="two hidden layers of 64, two convolutions, or two blocks of attention"),
    ]
    steps: Annotated[int, Field(ge=1, description="optimizer steps of one trial")] = 400
    batch_size: Annotated[int, Field(ge=1, le=1024, description="pictures of one step")] = 64
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="share of the steps with a rising learning rate")
    ] = 0.05
    evaluate_every: Annotated[
        int, Field(ge=1, description="steps between two looks at the validation pictures")
    ] = 10
    target_accuracy: Annotated[float, Field(gt=0, le=1, description="validation accuracy to reach")] = 0.96
    trials: Annotated[int, Field(ge=1, le=100, description="learning rates to try")] = 5
    decades: Annotated[
        float, Field(ge=0, le=10, description="powers of ten between the lowest and the highest")
    ] = 3.0
    split_seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="seed of the split of the pictures")] = 0

    def evaluate(self, method: OptimizerMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Tune the learning rate of ``method``, then score the best trial.

        A method without a field ``lr`` has nothing to tune: it is run once.

        Raises:
            DivergedError: the validation loss of every trial ends up not finite.
        """
        data = load_digits(self.split_seed, ctx)
        start = time.perf_counter()
        with ctx.phase("train"):
            trials = [self.train(candidate, data, ctx) for candidate in self.candidates(method)]
        seconds = time.perf_counter() - start
        chosen = min(trials, key=lambda trial: trial.course.final_loss)
        course = chosen.course
        if math.isinf(course.final_loss):
            rates = ", ".join(f"{trial.lr:.3g}" for trial in trials if trial.lr is not None)
            raise DivergedError(
                f"every trial diverged{f' (learning rates {rates})' if rates else ''}", "Lower lr."
            )
        if len(trials) > 1 and chosen in (trials[0], trials[-1]):
            ctx.warn(
                f"the best learning rate, {chosen.lr:.3g}, is at the edge of the search: try rates beyond"
            )
        scores, facts = tested(course, data, self.target_accuracy)
        return Evaluation(
            scores=scores,
            series={"validation-loss": np.array(course.losses)},
            facts={
                "chosen_lr": chosen.lr,
                "trials": [trial.record() for trial in trials],
                "evaluate_every": self.evaluate_every,
                **facts,
            },
            throughput=(sum(trial.course.steps for trial in trials) / seconds, "steps/s"),
        )

    def candidates(self, method: OptimizerMethod) -> list[OptimizerMethod]:
        """Return ``method`` with each learning rate of the search, from the lowest to the highest."""
        centre = getattr(method, "lr", None)
        if centre is None:
            return [method]
        half = self.decades / 2 if self.trials > 1 else 0.0
        rates = [float(centre * 10**power) for power in np.linspace(-half, half, self.trials)]
        return [dataclasses.replace(method, lr=rate) for rate in rates]  # type: ignore[type-var]

    def train(self, method: OptimizerMethod, data: Data, ctx: Context) -> Trial:
        """Run one trial from the initialization and the order of data that ``ctx.seed`` stands for."""
        module = network(self.architecture, ctx)
        order = batches(len(data.train), self.batch_size, self.steps, ctx.seed)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            picked = order[step - 1]
            return data.train.images[picked], data.train.labels[picked]

        problem = Problem(module, F.cross_entropy, batch, data.validation.look, head=module[-1].weight)
        course = train(
            method,
            problem,
            ctx,
            steps=self.steps,
            evaluate_every=self.evaluate_every,
            share=functools.partial(schedule, steps=self.steps, warmup=self.warmup),
        )
        return Trial(getattr(method, "lr", None), course)


@dataclass(slots=True)
class Pictures:
    """Images [N, 1, 8, 8] in [0, 1] and int64 classes [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def look(self, module: nn.Module) -> tuple[float, float]:
        """Return loss and accuracy of ``module`` on these pictures."""
        logits = module(self.images)
        right = (logits.argmax(-1) == self.labels).double().mean()
        return float(F.cross_entropy(logits, self.labels)), float(right)


@dataclass(slots=True)
class Data:
    """Three disjoint parts, and the SHA-256 of all pictures with their classes."""

    train: Pictures
    validation: Pictures
    test: Pictures
    digest: str


def tested(course: Course, data: Data, target_accuracy: float) -> tuple[dict[str, Scores], dict[str, object]]:
    """Return the scores of a trained classifier of pictures, and what is told of every such training.

    Args:
        course: ``test-nll`` is in nats, per test picture; ``test-accuracy`` 0 or 1; ``validation-loss`` the last one;
            ``steps-to-target`` the first step with the target's accuracy, infinite if there is none.
        data: what it was trained on.
        target_accuracy: on validation pictures.
    """
    with torch.no_grad():
        logits = torch.cat([course.module(part) for part in data.test.images.split(500)]).double()
    nll = F.cross_entropy(logits, data.test.labels, reduction="none")
    reached = course.first(lambda look: look.accuracy >= target_accuracy)
    scores = {
        "test-nll": Scores(nll.cpu().numpy()),
        "test-accuracy": Scores((logits.argmax(-1) == data.test.labels).cpu().numpy()),
        "validation-loss": Scores(np.array([course.final_loss])),
        "steps-to-target": Scores(np.array([reached.step if reached else math.inf])),
    }
    facts: dict[str, object] = {
        "target_accuracy": target_accuracy,
        "seconds_to_target": reached.seconds if reached else None,
        "pictures": {
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
        "data_digest": data.digest,
        **course.facts(),
    }
    return scores, facts


@dataclass(slots=True)
class Trial:
    """One training at one learning rate; None for a method that has none."""

    lr: float | None
    course: Course

    def record(self) -> dict[str, Any]:
        """Return what a reader of the run's page sees of this trial, JSON-ready."""
        loss = self.course.final_loss
        diverged = math.isinf(loss)
        return {"lr": self.lr, "validation_loss": None if diverged else loss, "diverged": diverged}


def load_digits(split_seed: int, ctx: Context) -> Data:
    """Return scikit-learn's digits in three parts of 60, 20 and 20 %, on ``ctx.device`` in ``ctx.dtype``."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = (digits.images / 16).astype(np.float64)
    labels = digits.target.astype(np.int64)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    order = np.random.RandomState(split_seed).permutation(len(labels))
    cuts = [len(order) * 3 // 5, len(order) * 4 // 5]
    dtype = getattr(torch, ctx.dtype)
    parts = [
        Pictures(
            torch.from_numpy(images[part]).unsqueeze(1).to(ctx.device, dtype),
            torch.from_numpy(labels[part]).to(ctx.device),
        )
        for part in np.split(order, cuts)
    ]
    train, validation, test = parts
    return Data(train, validation, test, digest)


def network(architecture: Literal["mlp", "cnn", "vit"], ctx: Context) -> nn.Sequential:
    """Return the classifier of images [N, 1, 8, 8] into 10 logits, initialized by ``ctx.seed``; head last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed)
        layers: list[nn.Module]
        if architecture == "mlp":
            layers = [
                nn.Flatten(),
                nn.Linear(64, 64),
                nn.ReLU(),
                nn.Linear(64, 64),
                nn.ReLU(),
                nn.Linear(64, 10),
            ]
        elif architecture == "cnn":
            layers = [
                *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(64, 10)),
            ]
        else:
            layers = [Patches(width=32), *(EncoderBlock(32, heads=2) for _ in range(2)), Pooled(32)]
            layers.append(nn.Linear(32, 10))
        return nn.Sequential(*layers).to(ctx.device, getattr(torch, ctx.dtype))


class Patches(nn.Module):
    """Cuts images [N, 1, 8, 8] into 16 patches of 2 x 2: embedded, with learned positions, [N, 16, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.project(images)
        return patches.flatten(2).transpose(1, 2) + self.positions


class EncoderBlock(nn.Module):
    """Attention between all tokens, then an MLP of four times the width; norms before both (ViT's form)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


class Pooled(nn.Module):
    """The mean over tokens [N, T, width] behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.norm(x).mean(1)
        return pooled
