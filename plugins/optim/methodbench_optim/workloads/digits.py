"""Optimizers on scikit-learn's digits: 1,797 grey pictures of 8 x 8, ten classes, a small MLP or CNN.

A fair comparison in small (after the rules of AlgoPerf, arXiv 2306.07179): split, initialization and order of
the data are equal for all optimizers; the schedule is linear warm-up then cosine decay; each optimizer is
tuned by the same number of trials, learning rates spread evenly in the logarithm around the one that it is
configured with. The trial with the lowest validation loss after its last step is the one that is scored, on
pictures that had no part in the choice.
"""

from __future__ import annotations

import dataclasses
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
from methodbench.torchkit.closures import Closure, Evaluations

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel


@hyperparameters
class Digits:
    """Train a small classifier. Unit: a test picture.

    Scores, of the chosen trial: ``test-nll`` in nats and ``test-accuracy`` per picture; ``steps-to-target``,
    the first evaluated step whose validation accuracy reaches the target, infinite if none does. Series:
    ``validation-loss``, at step 0 and after every ``evaluate_every`` steps.
    """

    architecture: Annotated[
        Literal["mlp", "cnn"], Field(description="two hidden layers of 64, or two convolutions")
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
        chosen = min(trials, key=lambda trial: trial.final_loss)
        if math.isinf(chosen.final_loss):
            rates = ", ".join(f"{trial.lr:.3g}" for trial in trials if trial.lr is not None)
            raise DivergedError(
                f"every trial diverged{f' (learning rates {rates})' if rates else ''}", "Lower lr."
            )
        if len(trials) > 1 and chosen in (trials[0], trials[-1]):
            ctx.warn(
                f"the best learning rate, {chosen.lr:.3g}, is at the edge of the search: try rates beyond"
            )
        with torch.no_grad():
            logits = chosen.module(data.test.images).double()
        nll = F.cross_entropy(logits, data.test.labels, reduction="none")
        reached = [step for step, accuracy in chosen.accuracies if accuracy >= self.target_accuracy]
        return Evaluation(
            scores={
                "test-nll": Scores(nll.cpu().numpy()),
                "test-accuracy": Scores((logits.argmax(-1) == data.test.labels).cpu().numpy()),
                "steps-to-target": Scores(np.array([reached[0] if reached else math.inf])),
            },
            series={"validation-loss": np.array(chosen.losses)},
            facts={
                "chosen_lr": chosen.lr,
                "trials": [trial.record() for trial in trials],
                "target_accuracy": self.target_accuracy,
                "evaluate_every": self.evaluate_every,
                "pictures": {
                    "train": len(data.train),
                    "validation": len(data.validation),
                    "test": len(data.test),
                },
                "parameters": sum(p.numel() for p in chosen.module.parameters()),
                "data_digest": data.digest,
                **chosen.evaluations.facts(),
            },
            throughput=(sum(trial.steps for trial in trials) / seconds, "steps/s"),
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
        optimizer = method.build(param_groups(module), ctx)
        peaks = [group.get("lr") for group in optimizer.param_groups]
        params = list(module.parameters())
        trial = Trial(lr=getattr(method, "lr", None), module=module)
        trial.look(0, data.validation)
        for step, batch in enumerate(
            batches(len(data.train), self.batch_size, self.steps, ctx.seed), start=1
        ):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                if peak is not None:
                    group["lr"] = peak * schedule(step, self.steps, self.warmup)
            images, labels = data.train.images[batch], data.train.labels[batch]

            closure = Closure(params, module, F.cross_entropy, images, labels, trial.evaluations)
            optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, its optimizers take the tensor
            if step % self.evaluate_every == 0 or step == self.steps:
                trial.look(step, data.validation)
                if not math.isfinite(trial.losses[-1]):
                    break
        return trial


@dataclass(slots=True)
class Pictures:
    """Images [N, 1, 8, 8] in [0, 1] and int64 classes [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(slots=True)
class Data:
    """Three disjoint parts, and the SHA-256 of all pictures with their classes."""

    train: Pictures
    validation: Pictures
    test: Pictures
    digest: str


@dataclass(slots=True)
class Trial:
    """One training: its learning rate, its network and its curves on the validation pictures."""

    lr: float | None
    module: nn.Module
    losses: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """(step, accuracy) pairs."""
    evaluations: Evaluations = dataclasses.field(default_factory=Evaluations)

    @property
    def steps(self) -> int:
        return self.accuracies[-1][0]

    @property
    def final_loss(self) -> float:
        """Validation loss at the end; infinite for a diverged trial."""
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf

    def look(self, step: int, pictures: Pictures) -> None:
        """Append loss and accuracy on ``pictures``."""
        with torch.no_grad():
            logits = self.module(pictures.images)
            self.losses.append(float(F.cross_entropy(logits, pictures.labels)))
            self.accuracies.append((step, float((logits.argmax(-1) == pictures.labels).double().mean())))

    def record(self) -> dict[str, Any]:
        """Return what a reader of the run's page sees of this trial, JSON-ready."""
        diverged = math.isinf(self.final_loss)
        return {"lr": self.lr, "validation_loss": None if diverged else self.final_loss, "diverged": diverged}


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


def network(architecture: Literal["mlp", "cnn"], ctx: Context) -> nn.Sequential:
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
        else:
            layers = [
                *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(64, 10)),
            ]
        return nn.Sequential(*layers).to(ctx.device, getattr(torch, ctx.dtype))


def param_groups(module: nn.Sequential) -> list[dict[str, Any]]:
    """Return the parameters by role.

    ``head`` is the last layer's weight, ``matrix`` every other weight of two or more dimensions (kernels of
    convolutions included), ``vector`` the rest.
    """
    head = module[-1].weight
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "vector": [], "head": []}
    for p in module.parameters():
        groups["head" if p is head else "matrix" if p.ndim >= 2 else "vector"].append(p)
    return [{"params": params, "role": role} for role, params in groups.items() if params]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak rate at ``step`` (from 1): linear to 1, then half a cosine towards 0."""
    rising = round(steps * warmup)
    if step <= rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - rising) / (steps - rising)))


def batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Return the indices of each step's batch: epochs shuffled by ``seed``, without incomplete batches."""
    size = min(size, count)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    while len(chosen) < steps:
        chosen += [
            batch for batch in torch.randperm(count, generator=generator).split(size) if len(batch) == size
        ]
    return chosen[:steps]
