"""Fingerprints: what the parts of a model held and gave, small enough to keep with every run.

When two runs of one cell disagree, comparing their marks in order names the first place where they part: the
calibration inputs, the weights that a method made of a block, or what a block gives for them. Outputs are those of
the first batch that the protocol evaluates, so they cost no pass of their own, disturb no counter or generator that
a method keeps, and need no knowledge of what a model takes. Every bit counts towards a digest, by a checksum at the
speed of memory (but for outputs as large as logits), and sha256 over a sample knows the places as well.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from methodbench.torchkit.model import LoadedModel

#: Elements up to which an output is summed up in full; logits of a whole batch are sampled only.
_OUTPUT_SUMMED = 1 << 22
#: Elements of the sample of an output.
_OUTPUT_SAMPLE = 1 << 15
#: Pieces of the sample of a weight, and the elements of each.
_PIECES, _PIECE = 16, 64
_DIGITS = 6
#: What torch raises for tensors whose bits cannot be had (subclasses, exotic dtypes).
_UNREADABLE = (RuntimeError, NotImplementedError, TypeError)


@dataclass(frozen=True, slots=True)
class Mark:
    """What one tensor, or the tensors of one block, looked like."""

    what: str
    """``calibration``, ``weights`` or ``output``."""
    at: str
    """Dotted name of the block; empty for the calibration inputs."""
    shape: list[int]
    """Shape of the tensor; the number of elements for the weights of a block."""
    mean: float | None
    """Of the sample, to six digits; None where it is not finite or there is nothing to average."""
    std: float | None
    largest: float | None
    """Largest magnitude of the sample."""
    digest: str
    """First 16 digits of sha256 over dtypes, shapes, checksums and the bits of the sample."""


class Watch:
    """Marks the first output of every block, and of the head, while a model is evaluated.

    >>> from methodbench.torchkit.fingerprints import Watch
    >>> with Watch(model) as watch:  # doctest: +SKIP
    ...     task.evaluate(model, ctx)
    >>> watch.marks  # doctest: +SKIP
    """

    def __init__(self, model: LoadedModel | None) -> None:
        self.marks: list[Mark] = []
        """In the order of the computation."""
        self._model = model
        self._handles: dict[str, torch.utils.hooks.RemovableHandle] = {}

    def __enter__(self) -> Watch:
        for name, module in _parts(self._model):
            self._handles[name] = module.register_forward_hook(functools.partial(self._first_output, name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _first_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        handle = self._handles.pop(name, None)
        if handle is None:
            return
        handle.remove()
        tensor = next(_tensors(output), None)
        if tensor is None:
            return
        try:
            self.marks.append(mark("output", name, tensor))
        except _UNREADABLE as problem:
            _left_out("output", name, problem)


def mark(what: str, at: str, tensor: Tensor) -> Mark:
    """Return the mark of one tensor of any shape, dtype and device."""
    flat = tensor.detach().reshape(-1)
    # An odd stride meets every channel of a layout whose channels are a power of two.
    stride = max(1, flat.numel() // _OUTPUT_SAMPLE) | 1
    sample = flat[::stride] if stride > 1 else flat
    summed = flat if flat.numel() <= _OUTPUT_SUMMED else sample
    return _mark(what, at, list(tensor.shape), [("", summed, sample)])


def weight_marks(model: LoadedModel) -> list[Mark]:
    """Return one mark for the parameters and buffers of each block, in the order of the blocks."""
    marks = []
    for name, block in _blocks(model):
        held = [*block.named_parameters(), *block.named_buffers()]
        pieces = [(key, tensor, _sample(tensor.detach())) for key, tensor in held if _is_plain(tensor)]
        if pieces:
            count = sum(tensor.numel() for _, tensor, _ in pieces)
            try:
                marks.append(_mark("weights", name, [count], pieces))
            except _UNREADABLE as problem:
                _left_out("weights", name, problem)
    return marks


def _left_out(what: str, at: str, problem: Exception) -> None:
    """Say in the log that a mark is missing: one that cannot be taken costs a mark, not a result."""
    print(f"no fingerprint of the {what} of {at}: {problem}", file=sys.stderr)


def _sample(tensor: Tensor) -> Tensor:
    """Return the sample of a weight: evenly spread pieces, each contiguous in memory."""
    flat = tensor.reshape(-1)
    if flat.numel() <= _PIECES * _PIECE:
        return flat
    rows = flat[: flat.numel() // _PIECES * _PIECES].view(_PIECES, -1)
    return rows[:, :_PIECE].reshape(-1)


def _checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits, taken as 64-bit integers, modulo 2**64; threads do not change it."""
    flat = tensor.detach().reshape(-1).contiguous()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    whole = octets.numel() // 8 * 8
    total = int(octets[:whole].view(torch.int64).sum()) if whole else 0
    return (total + int(octets[whole:].sum())) % 2**64


def _mark(what: str, at: str, shape: list[int], pieces: list[tuple[str, Tensor, Tensor]]) -> Mark:
    hasher = hashlib.sha256(f"{shape}\0".encode())
    numbers = []
    for name, whole, sample in pieces:
        values = sample.cpu().contiguous()
        hasher.update(f"{name}\0{whole.dtype}\0{tuple(whole.shape)}\0{_checksum(whole)}\0".encode())
        hasher.update(values.view(torch.uint8).numpy().data if values.numel() else b"")
        if values.is_floating_point():
            numbers.append(values)
        elif what != "weights":
            numbers.append(values.float())
    mean = std = largest = None
    if any(values.numel() for values in numbers):
        joined = torch.cat([values.float() for values in numbers])
        mean, std = _rounded(joined.mean()), _rounded(joined.std(correction=0))
        largest = _rounded(joined.abs().max())
    return Mark(what, at, shape, mean, std, largest, hasher.hexdigest()[:16])


def _rounded(value: Tensor) -> float | None:
    number = float(value)
    return float(f"{number:.{_DIGITS}g}") if abs(number) < float("inf") else None


def _blocks(model: LoadedModel | None) -> list[tuple[str, nn.Module]]:
    if model is None:
        return []
    try:
        names = model.adapter.block_names(model.module)
        return [(name, model.module.get_submodule(name)) for name in names]
    except AttributeError:
        # A method may put something else in the place of the model's blocks.
        return []


def _parts(model: LoadedModel | None) -> Iterator[tuple[str, nn.Module]]:
    yield from _blocks(model)
    if model is not None and model.adapter.head_name:
        head = model.adapter.head(model.module)
        if head is not None:
            yield model.adapter.head_name, head


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if _is_plain(output):
            yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and its bits can be looked at."""
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
