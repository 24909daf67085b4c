"""A classifier of digits that is adapted to other looks of them: what it learns there, and what it forgets.

A network is trained on the pictures as they are. It is then fine-tuned on a few pictures of other domains (turned,
in negative, mirrored), under a method of training, and scored on these domains and on the pictures as they were.
Methods find general samples, pictures of the first domain, and task vectors, differences between networks that were
fine-tuned on one domain each and the one that they started from (arXiv 2407.02880, in small).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores, TrainingMethod
from methodbench_optim.baselines import AdamW
from methodbench_optim.workloads.bases import trained_once
from methodbench_optim.workloads.digits import Data, Pictures, load_digits, network
from methodbench_optim.workloads.loop import Problem, batches, schedule, train
from methodbench_optim.workloads.sparsity import densities

if TYPE_CHECKING:
    from methodbench.context import Context
    from methodbench.torchkit.model import LoadedModel

Domain = Literal["turned", "negative", "mirrored"]

#: Pictures are centred, so that a negative is as bright as what it is made of.
_LOOKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda images: images.rot90(1, (-2, -1)),
    "negative": lambda images: -images,
    "mirrored": lambda images: images.flip(-1),
}


@hyperparameters
class Adaptation:
    """Fine-tune a trained classifier. Unit: a test picture in one of the domains.

    Scores: ``test-nll`` in nats and ``test-accuracy`` on the new domains; ``general-accuracy`` per test picture as it
    was; ``validation-loss`` on the new domains, at the end. Facts: the same accuracies before fine-tuning, densities of
    weights and activations on the new domains, and how many parameters are trained. Series: ``validation-loss``.
    """

    architecture: Annotated[Literal["mlp", "cnn"], Field(description="of the network")] = "mlp"
    domains: Annotated[tuple[Domain, ...], Field(min_length=1, description="what is adapted to")] = (
        "negative",
    )
    experts: Annotated[
        tuple[Domain, ...], Field(description="domains whose task vectors methods may compose")
    ] = ("turned", "mirrored")
    shots: Annotated[
        int,
        Field(ge=1, le=1000, description="pictures of each domain to learn from; the others train experts"),
    ] = 100
    general_samples: Annotated[int, Field(ge=1, description="pictures as they were, for replay")] = 128
    base_steps: Annotated[int, Field(ge=1, description="steps of the training before")] = 600
    expert_steps: Annotated[int, Field(ge=1, description="steps of each expert's fine-tuning")] = 300
    steps: Annotated[int, Field(ge=1, description="steps of the fine-tuning that is scored")] = 400
    batch_size: Annotated[int, Field(ge=1, description="pictures of one step")] = 64
    lr: Annotated[float, Field(gt=0, description="peak rate of AdamW in the fine-tuning")] = 3e-3
    weight_decay: Annotated[float, Field(ge=0, description="its decoupled decay")] = 0.0
    evaluate_every: Annotated[int, Field(ge=1, description="steps between two looks")] = 25

    def evaluate(self, method: TrainingMethod, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Train the base and the experts (once for all methods), then fine-tune under ``method``.

        Raises:
            DivergedError: the validation loss ends up not finite.
        """
        data = load_digits(0, ctx)
        standardize(data)
        base = network(self.architecture, ctx)
        with ctx.phase("prepare"):
            self.prepare(base, "base", data.train, data, self.base_steps, ctx)
            supplies = {
                "replay": (
                    data.train.images[: self.general_samples],
                    data.train.labels[: self.general_samples],
                ),
                "task-vectors": self.task_vectors(base, data, ctx),
            }
        few = Pictures(data.train.images[: self.shots], data.train.labels[: self.shots])
        seen, held, tested = (self.adapted(part) for part in (few, data.validation, data.test))
        before = tested.look(base)[1], data.test.look(base)[1]
        order = batches(len(seen), self.batch_size, self.steps, ctx.seed)
        problem = Problem(
            copy.deepcopy(base),
            F.cross_entropy,
            lambda step: (seen.images[order[step - 1]], seen.labels[order[step - 1]]),
            held.look,
            head=None,
        )
        with ctx.phase("train"):
            course = train(
                AdamW(lr=self.lr, weight_decay=self.weight_decay),
                problem,
                dataclasses.replace(ctx, supplies=supplies),
                steps=self.steps,
                evaluate_every=self.evaluate_every,
                share=functools.partial(schedule, steps=self.steps, warmup=0.05),
                training=method,
            )
        if math.isinf(course.final_loss):
            raise DivergedError(f"the loss is not finite after {course.steps} steps", "Lower lr.")
        with torch.no_grad():
            logits = course.module(tested.images).double()
            general = course.module(data.test.images).argmax(-1) == data.test.labels
        nll = F.cross_entropy(logits, tested.labels, reduction="none")
        return Evaluation(
            scores={
                "test-nll": Scores(nll.cpu().numpy()),
                "test-accuracy": Scores((logits.argmax(-1) == tested.labels).cpu().numpy()),
                "general-accuracy": Scores(general.cpu().numpy()),
                "validation-loss": Scores(np.array([course.final_loss])),
            },
            series={"validation-loss": np.array(course.losses)},
            facts={
                "accuracy_before": before[0],
                "general_accuracy_before": before[1],
                "trained_parameters": sum(p.numel() for p in course.module.parameters() if p.requires_grad),
                "data_digest": data.digest,
                **densities(course.module, tested.images),
                **course.facts(),
            },
        )

    def adapted(self, pictures: Pictures, domains: Sequence[Domain] = ()) -> Pictures:
        """Return ``pictures`` in every domain, one after the other; the task's own domains by default."""
        chosen = domains or self.domains
        images = torch.cat([_LOOKS[domain](pictures.images) for domain in chosen])
        return Pictures(images, pictures.labels.repeat(len(chosen)))

    def task_vectors(self, base: nn.Module, data: Data, ctx: Context) -> list[dict[str, Tensor]]:
        """Return, for each expert, by how much its parameters differ from those of ``base``."""
        # Experts learn from pictures of their own, so that what they know is not what is learnt from.
        rest = Pictures(data.train.images[self.shots :], data.train.labels[self.shots :])
        vectors = []
        for domain in self.experts:
            expert = copy.deepcopy(base)
            self.prepare(expert, domain, self.adapted(rest, (domain,)), data, self.expert_steps, ctx)
            pairs = zip(expert.named_parameters(), base.parameters(), strict=True)
            vectors.append({name: (p - start).detach() for (name, p), start in pairs})
        return vectors

    def prepare(
        self, module: nn.Module, name: str, pictures: Pictures, data: Data, steps: int, ctx: Context
    ) -> None:
        """Train ``module`` on ``pictures``, in place, by AdamW at a rate of 3e-3; or take the weights of that."""
        order = batches(len(pictures), self.batch_size, steps, ctx.seed)
        problem = Problem(
            module,
            F.cross_entropy,
            lambda step: (pictures.images[order[step - 1]], pictures.labels[order[step - 1]]),
            data.validation.look,
        )
        identity = {
            "what": ["adaptation", self.architecture, name, self.shots, self.batch_size],
            "steps": [self.base_steps, steps],
            "data": data.digest,
        }
        trained_once(
            module,
            identity,
            lambda: train(
                AdamW(lr=3e-3),
                problem,
                ctx,
                steps=steps,
                evaluate_every=steps,
                share=functools.partial(schedule, steps=steps, warmup=0.05),
            ),
            ctx,
        )
        module.zero_grad()


def standardize(data: Data) -> None:
    """Give all pictures the mean 0 and the deviation 1 that the training pictures have, in place."""
    mean, deviation = data.train.images.mean(), data.train.images.std()
    for part in (data.train, data.validation, data.test):
        part.images = (part.images - mean) / deviation
