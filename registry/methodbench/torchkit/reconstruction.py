"""Learning the quantization parameters of a few blocks at a time against the full-precision model.

:func:`windows` walks two models side by side: the *teacher* stays as it is, the *student* is a copy whose blocks
the consumer quantizes. Each window of consecutive blocks comes with its inputs in both streams and with the
teacher's outputs for both; :func:`fit` then minimizes a loss of the student's outputs over learned tensors.
Blocks compute with tensors that are given at each step (:meth:`Window.student`), so that a learned weight, scale or
rounding is an ordinary differentiable function of what is learned, and nothing is written to the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.sequential import batches_of, capture_blocks, hidden_of

Parameters = Mapping[str, Tensor]
Schedule = Literal["constant", "linear", "cosine"]

_SCHEDULES: Mapping[Schedule, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(slots=True)
class Window:
    """Consecutive blocks with everything that learning them needs.

    Tensors are lists over batches, hidden states [B, T, hidden].
    """

    start: int
    """Index of the first block."""
    names: list[str]
    """Dotted names of the blocks in the model."""
    teacher_blocks: list[nn.Module]
    student_blocks: list[nn.Module]
    kwargs: list[list[dict[str, Any]]]
    """The blocks' other arguments: by block, then by batch."""
    dense_inputs: list[Tensor]
    """What enters the window of the teacher."""
    inputs: list[Tensor]
    """What enters the window of the student, whose blocks before the window are quantized."""
    dense_targets: list[Tensor]
    """The teacher's outputs for ``dense_inputs``."""
    targets: list[Tensor]
    """The teacher's outputs for ``inputs``."""
    last: bool
    """Whether the window ends with the model's last block."""

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.inputs)

    def student(self, batch: int, parameters: Sequence[Parameters] | None = None) -> Tensor:
        """Return the student's output for a batch of its inputs, [B, T, hidden]; differentiable.

        Args:
            parameters: per block, tensors to compute with in place of parameters and buffers, by name relative
                to the block.
        """
        hidden = self.inputs[batch]
        for index, block in enumerate(self.student_blocks):
            given = parameters[index] if parameters is not None else {}
            kwargs = self.kwargs[index][batch]
            hidden = hidden_of(functional_call(block, dict(given), (hidden,), kwargs))
        return hidden


def windows(
    teacher: LoadedModel,
    student: LoadedModel,
    data: Calibration,
    *,
    size: int = 1,
    overlap: int = 0,
    batch_size: int = 1,
) -> Iterator[Window]:
    """Yield windows of ``size`` blocks, each starting ``size - overlap`` after the one before.

    When the consumer asks for the next window, the teacher's stream advances through the teacher's blocks and the
    student's through the student's, as the consumer left them, up to the next window's first block. The last
    window ends with the last block, and may be shorter only where the model is.

    Args:
        teacher: stays untouched.
        student: a copy of it, with modules of its own in the blocks.
        data: token ids [sequences, tokens].

    Raises:
        NotApplicableError: no calibration inputs, or blocks that the model does not call one after another.
    """
    if not len(data):
        raise NotApplicableError(
            "learning block by block needs calibration inputs, and there are none",
            "The method must list 'calibration' in its needs, and the task must offer calibration data.",
        )
    if not 0 <= overlap < size:
        raise ValueError(f"an overlap of {overlap} blocks needs windows of more than {size}")
    names = teacher.adapter.block_names(teacher.module)
    dense, arguments = capture_blocks(teacher, batches_of(data.inputs, batch_size))
    inputs = dense
    start = 0
    while True:
        stop = min(start + size, len(names))
        span = range(start, stop)
        last = stop == len(names)
        after = stop if last else start + size - overlap
        blocks = [teacher.module.get_submodule(names[i]) for i in span]
        kwargs = [arguments[i] for i in span]
        dense_outputs = _through(blocks, dense, kwargs)
        yield Window(
            start,
            [names[i] for i in span],
            blocks,
            [student.module.get_submodule(names[i]) for i in span],
            kwargs,
            dense,
            inputs,
            dense_outputs[-1],
            _through(blocks, inputs, kwargs)[-1],
            last,
        )
        if last:
            return
        advanced = [student.module.get_submodule(names[i]) for i in range(start, after)]
        dense = dense_outputs[after - start - 1]
        inputs = _through(advanced, inputs, kwargs[: after - start])[-1]
        start = after


@torch.no_grad()
def _through(
    blocks: Sequence[nn.Module], inputs: list[Tensor], kwargs: Sequence[list[dict[str, Any]]]
) -> list[list[Tensor]]:
    """Return the outputs of every block in turn, each a list over batches."""
    outputs = []
    for block, arguments in zip(blocks, kwargs, strict=True):
        inputs = [hidden_of(block(x, **given)) for x, given in zip(inputs, arguments, strict=True)]
        outputs.append(inputs)
    return outputs


@dataclass(frozen=True, slots=True)
class Fit:
    """What learning came to: the mean loss of the first and of the last pass over the calibration batches."""

    first: float
    last: float


def fit(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int, float], Tensor],
    batches: int,
    *,
    steps: int,
    schedule: Schedule = "constant",
    name: str = "the window",
) -> Fit:
    """Minimize ``loss`` over the batches in turn, one step of ``optimizer`` each.

    Args:
        loss: of the batch's index and the share of all steps that is done, from 0 up to 1; a scalar.
        schedule: learning rates stay, fall linearly to zero, or along half a cosine.
        name: for error messages.

    Raises:
        DivergedError: a loss is not finite.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    values: list[float] = []
    for step in range(steps):
        done = step / steps
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _SCHEDULES[schedule](done)
        optimizer.zero_grad()
        value = loss(step % batches, done)
        if not bool(torch.isfinite(value)):
            raise DivergedError(
                f"the loss of {name} is not finite at step {step}",
                "Lower the learning rates, or calibrate on other inputs.",
            )
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    first, last = values[:batches], values[-batches:]
    return Fit(sum(first) / max(1, len(first)), sum(last) / max(1, len(last)))
