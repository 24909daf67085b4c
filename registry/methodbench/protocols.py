"""What the implementation of each kind of method, of a task and of a model loader must offer.

An implementation is a frozen dataclass whose typed, validated fields are its hyperparameters (see
:func:`methodbench.params.hyperparameters`) with the paper's defaults. The engine builds one instance per cell and
calls the one method of its kind. Nothing here imports torch at run time: the annotations are strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from methodbench.entries import Metric
from methodbench.kinds import KIND_NAMES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from methodbench.context import Context
    from methodbench.torchkit.model import Calibration, LoadedModel


@runtime_checkable
class Compressor(Protocol):
    """Quantizers, pruners, activation sparsifiers, layer skippers."""

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the compressed model.

        Args:
            model: the dense model, in eval mode. It is shared: work on ``model.clone()``, which shares tensors,
                and replace modules and parameters instead of writing into them.
            data: calibration inputs; empty for methods that do not list ``"calibration"`` in ``needs``.
            ctx: seed, device, cache folder, log.

        Returns:
            A model of the same kind whose ``storage`` says whether its tensors really hold the compressed form.

        Raises:
            NotApplicableError: the model lacks what the method needs.
        """
        ...


@runtime_checkable
class OptimizerMethod(Protocol):
    """Rules that update parameters.

    A workload calls ``optimizer.step(closure)`` in a loop, with a :class:`methodbench.torchkit.closures.Closure`, and
    counts what is asked of it. Optimizers have one of four shapes:

    - a plain rule calls the closure, which clears gradients, computes the loss and calls ``backward``, and then uses
      ``p.grad``; a line search calls it more than once;
    - a method that lists ``"closure"`` in ``needs`` asks the closure for its parts: the gradient of the loss with
      respect to the model's outputs, and the model on the inputs of the batch;
    - a method that lists ``"forward-only"`` in ``needs`` asks for the closure's value alone;
    - a method that lists ``"roles"`` in ``needs`` treats parameters by the ``"role"`` that their group carries
      (``"matrix"``, ``"vector"``, ``"embedding"``, ``"head"``), and not only by their shape.
    """

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return an optimizer over ``param_groups`` (dictionaries with ``"params"`` and ``"role"``)."""
        ...


@runtime_checkable
class TrainingMethod(Protocol):
    """Changes of a training loop: quantization-aware training, sparsity regularizers, backward-pass changes.

    A method that asks its task for more than a model and batches lists it in ``needs`` and finds it in
    ``ctx.supplies``: ``"replay"`` or ``"task-vectors"``.
    """

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return the module to train."""
        ...

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the loss to differentiate, a scalar."""
        ...

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Called once gradients are there, before the optimizer's step."""
        ...

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after the optimizer's step."""
        ...


@runtime_checkable
class Explainer(Protocol):
    """Saliency maps."""

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] for normalized images ``x`` [B, C, H, W] and classes ``target`` [B]."""
        ...


@runtime_checkable
class Oracle(Explainer, Protocol):
    """An explainer that is told the truth: the upper end of a scale, no competitor.

    Tasks that know the masks call :meth:`explain_known` instead of :meth:`Explainer.explain`, which has
    nothing to say without them.
    """

    def explain_known(self, masks: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] from the true masks, bool [B, H, W]."""
        ...


@runtime_checkable
class Segmenter(Protocol):
    """Masks learned from weak labels."""

    def fit(self, weak_labels: Mapping[str, Any], ctx: Context) -> Callable[[Tensor], Tensor]:
        """Return a predictor from images [B, C, H, W] to integer masks [B, H, W]."""
        ...


@runtime_checkable
class Probe(Protocol):
    """Measurements of a model that change nothing."""

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        """Return named scalars and arrays."""
        ...


#: Every kind of method (see :data:`methodbench.kinds.KIND_NAMES`), with the protocol of its implementation.
KINDS: Mapping[str, type] = dict(
    zip(KIND_NAMES, (Compressor, OptimizerMethod, TrainingMethod, Explainer, Segmenter, Probe), strict=True)
)


@dataclass(slots=True)
class Scores:
    """Scores of one metric, one per unit (sample, window, image, seeded start), in a fixed order of units.

    ``values`` is float64 [units]; NaN marks a unit without a score. Paired statistics rely on the order of units
    being the same for every method on the same task and data.
    """

    values: np.ndarray
    metric: Metric | None = None
    """Describes a metric that the task's entry does not list (tasks that are found by name)."""

    def __post_init__(self) -> None:
        self.values = np.atleast_1d(np.asarray(self.values, dtype=np.float64))
        if self.values.ndim != 1:
            raise ValueError(f"scores must be one-dimensional, got shape {self.values.shape}")


@dataclass(slots=True)
class Shown:
    """One picture and what a method made of it, for the pages of a run and a method."""

    name: str
    """The same for every method on the same task."""
    picture: np.ndarray
    """RGB, uint8 [H, W, 3]."""
    map: np.ndarray
    """[H, W] in [0, 1]."""


@dataclass(slots=True)
class Evaluation:
    """What a task returns."""

    scores: Mapping[str, Scores]
    series: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Named curves (loss per step, trajectory): float64 arrays [points]."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the protocol came to: token counts, data digest, chosen learning rate, layer names."""
    pictures: Sequence[Shown] = ()
    """A few of the pictures that maps were made of; the first :data:`methodbench.pictures.MOST` are kept."""
    throughput: tuple[float, str] | None = None
    """Units per second and their name, for example ``(812.0, "tokens/s")``."""


@runtime_checkable
class ModelTask(Protocol):
    """A task that evaluates a (compressed) model."""

    def calibration(self, model: LoadedModel, ctx: Context) -> Calibration:
        """Return calibration inputs that do not overlap with the evaluation data; drawn by ``ctx.seed``."""
        ...

    def evaluate(self, model: LoadedModel, ctx: Context) -> Evaluation:
        """Score the model."""
        ...


@runtime_checkable
class MethodTask(Protocol):
    """A task that runs the method itself: optimizers, training methods, explainers, segmenters, probes."""

    def evaluate(self, method: Any, model: LoadedModel | None, ctx: Context) -> Evaluation:
        """Run ``method`` (on ``model`` where the task accepts one) and score it."""
        ...


@runtime_checkable
class ModelLoader(Protocol):
    """Turns a source into a model, in two steps, so that the dear one is done once per machine."""

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        """Write safetensors and configuration into the empty folder ``target``.

        Args:
            source: the fetched file or folder; None for ``recipe:`` and ``builtin:`` sources.
            target: becomes the cached folder once this returns.
        """
        ...

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        """Load what :meth:`prepare` wrote, memory-mapped where the format allows it, in eval mode."""
        ...
