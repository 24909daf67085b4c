"""Training of a small classifier of pictures: what a method of training, or an optimizer as configured, makes of it.

Initialization, batches, schedule and number of steps are fixed by the task and the seed. A method of training hooks
into the loop, and the optimizer is the task's; an optimizer trains the network without hooks. Digits come with
scikit-learn; a part of CIFAR-10 is read from the data folder.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError, SourceError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, OptimizerMethod, TrainingMethod
from methodbench_optim.baselines import SGDM, AdamW
from methodbench_optim.workloads.digits import Data, Pictures, load_digits, network, tested
from methodbench_optim.workloads.loop import Course, Problem, batches, schedule, train
from methodbench_optim.workloads.sparsity import densities

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel

Architecture = Literal["mlp", "cnn", "vit", "resnet20", "vit-tiny"]

_CIFAR10_MEAN, _CIFAR10_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@hyperparameters
class TrainPictures:
    """Train a small classifier once. Unit: a test picture.

    Scores: ``test-nll`` in nats and ``test-accuracy`` per picture; ``validation-loss``, the last of its curve;
    ``steps-to-target``, the first evaluated step whose validation accuracy reaches the target, infinite for a miss
    (the fact ``seconds_to_target`` is its time, None for a miss). Facts say how dense weights and activations ended
    up. Series: ``validation-loss`` and ``validation-accuracy``.
    """

    data: Annotated[Literal["digits", "cifar10"], Field(description="which pictures")] = "digits"
    architecture: Annotated[Architecture, Field(description="of the network")] = "cnn"
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 400
    batch_size: Annotated[int, Field(ge=1, le=4096, description="pictures of one step")] = 64
    train_pictures: Annotated[
        int, Field(ge=10, le=50_000, description="pictures of CIFAR-10 to train on; of the digits, all")
    ] = 4000
    test_pictures: Annotated[
        int, Field(ge=10, le=10_000, description="of CIFAR-10; a quarter more validate")
    ] = 800
    optimizer: Annotated[
        Literal["adamw", "sgdm"], Field(description="what trains under a method of training")
    ] = "adamw"
    lr: Annotated[float, Field(gt=0, description="its peak rate")] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, description="its decay: decoupled, or of SGD coupled")] = 1e-3
    decay: Annotated[Literal["cosine", "constant"], Field(description="of the rate, behind the warm-up")] = (
        "cosine"
    )
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps with a rising rate")] = 0.05
    evaluate_every: Annotated[int, Field(ge=1, description="steps between two looks")] = 10
    target_accuracy: Annotated[float, Field(gt=0, le=1, description="validation accuracy to reach")] = 0.95
    contrast: Annotated[
        float, Field(ge=0, le=4, description="powers of ten over which contrasts of pictures are spread")
    ] = 0.0

    def evaluate(
        self, method: OptimizerMethod | TrainingMethod, model: LoadedModel | None, ctx: Context
    ) -> Evaluation:
        """Train once.

        Raises:
            DivergedError: the validation loss ends up not finite.
            SourceError: the pictures are not on this machine.
        """
        data = load_digits(0, ctx) if self.data == "digits" else self.load_cifar10(ctx)
        if self.contrast:
            spread_contrast(data, self.contrast)
        with ctx.phase("train"):
            course = self.train(method, data, ctx)
        if math.isinf(course.final_loss):
            raise DivergedError(f"the loss is not finite after {course.steps} steps", "Lower lr.")
        scores, facts = tested(course, data, self.target_accuracy)
        return Evaluation(
            scores=scores,
            series={
                "validation-loss": np.array(course.losses),
                "validation-accuracy": np.array([look.accuracy for look in course.looks]),
            },
            facts={
                "evaluate_every": self.evaluate_every,
                **densities(course.module, data.test.images[:500]),
                **facts,
            },
            throughput=(course.steps / course.looks[-1].seconds, "steps/s"),
        )

    def train(self, method: OptimizerMethod | TrainingMethod, data: Data, ctx: Context) -> Course:
        """Train from the initialization and the order of data that ``ctx.seed`` stands for."""
        module, head = self.network(ctx)
        order = batches(len(data.train), self.batch_size, self.steps, ctx.seed)
        flips = torch.Generator().manual_seed(ctx.seed)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            picked = order[step - 1]
            images = data.train.images[picked]
            if self.data == "cifar10":
                images = shifted(images, flips)
            return images, data.train.labels[picked]

        def share(step: int) -> float:
            if self.decay == "cosine":
                return schedule(step, self.steps, self.warmup)
            return min(1.0, step / max(1, round(self.steps * self.warmup)))

        optimizer, training = both(method, self.recipe)
        return train(
            optimizer,
            Problem(module, F.cross_entropy, batch, data.validation.look, head=head),
            ctx,
            steps=self.steps,
            evaluate_every=self.evaluate_every,
            share=share,
            training=training,
        )

    def recipe(self) -> OptimizerMethod:
        """Return the optimizer of the task, for methods of training."""
        rule = AdamW if self.optimizer == "adamw" else SGDM
        return rule(lr=self.lr, weight_decay=self.weight_decay)

    def network(self, ctx: Context) -> tuple[nn.Module, Any]:
        """Return the network, initialized by ``ctx.seed``, and the weight of its last layer."""
        if self.architecture in ("mlp", "cnn", "vit"):
            if self.data != "digits":
                raise ValueError(f"{self.architecture} is for the digits")
            small = network(self.architecture, ctx)
            return small, small[-1].weight
        if self.data != "cifar10":
            raise ValueError(f"{self.architecture} is for CIFAR-10")
        # The networks come from the plugin that also has trained weights of them.
        from methodbench_vision.models.cifar10 import CifarResNet, build_vit

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)
            made = CifarResNet(blocks=3) if self.architecture == "resnet20" else build_vit()
        made = made.to(ctx.device, getattr(torch, ctx.dtype))
        last = [part for part in made.modules() if isinstance(part, nn.Linear)][-1]
        return made, last.weight

    def load_cifar10(self, ctx: Context) -> Data:
        """Return the first pictures of CIFAR-10's two files, normalized by channel, on ``ctx.device``.

        Validation pictures follow those that are trained on; test pictures come from the test file.
        """
        validation = self.test_pictures * 5 // 4
        images, labels = read_cifar10("train", self.train_pictures + validation)
        test_images, test_labels = read_cifar10("test", self.test_pictures)
        digest = hashlib.sha256(images.tobytes() + test_images.tobytes()).hexdigest()

        def part(pixels: np.ndarray, classes: np.ndarray) -> Pictures:
            scaled = (pixels / 255 - np.array(_CIFAR10_MEAN)) / np.array(_CIFAR10_DEVIATION)
            tensor = torch.from_numpy(scaled).permute(0, 3, 1, 2)
            return Pictures(
                tensor.to(ctx.device, getattr(torch, ctx.dtype)), torch.from_numpy(classes).to(ctx.device)
            )

        cut = self.train_pictures
        return Data(
            part(images[:cut], labels[:cut]),
            part(images[cut:], labels[cut:]),
            part(test_images, test_labels),
            digest,
        )


def both(
    method: OptimizerMethod | TrainingMethod, recipe: Callable[[], OptimizerMethod]
) -> tuple[OptimizerMethod, TrainingMethod | None]:
    """Return what takes the steps and what hooks into the loop, for a method of either kind."""
    if isinstance(method, OptimizerMethod):
        return method, None
    return recipe(), method


def spread_contrast(data: Data, decades: float) -> None:
    """Standardize all pictures alike, then multiply each by a factor of its own, in place: 10 to a power that is
    uniform on ``decades`` around 0."""
    mean, deviation = data.train.images.mean(), data.train.images.std()
    generator = torch.Generator().manual_seed(0)
    for part in (data.train, data.validation, data.test):
        powers = decades * (torch.rand(len(part), 1, 1, 1, generator=generator) - 0.5)
        part.images = (part.images - mean) / deviation * (10**powers).to(part.images)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures [N, C, H, W], each mirrored or not and moved by up to 4 pixels, with zeros from beyond."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    moves = torch.randint(0, 9, (2,), generator=generator).tolist()
    padded = F.pad(images, (4, 4, 4, 4))
    cut = padded[..., moves[0] : moves[0] + height, moves[1] : moves[1] + width]
    return torch.where(mirrored.to(cut.device)[:, None, None, None], cut.flip(-1), cut)


@functools.cache
def read_cifar10(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures uint8 [count, 32, 32, 3] and classes int64 [count] of one of CIFAR-10's files.

    Raises:
        SourceError: no data folder holds the file.
    """
    import polars as pl
    from PIL import Image

    from methodbench.sources import data_path

    path = data_path(f"cifar10/{part}.parquet")
    if path is None:
        raise SourceError(f"no data folder holds cifar10/{part}.parquet", "Set METHODBENCH_DATA.")
    frame = pl.read_parquet(path, columns=["image", "label"])[:count]
    pictures = [np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")) for encoded in frame["image"]]
    return np.stack(pictures), frame["label"].to_numpy().astype(np.int64)
