"""Parity vectors: inputs, hyperparameters and outputs of the authors' (or a trusted) implementation.

A vector file is an ``.npz`` with an entry ``meta`` (JSON): everything that a test needs to know, so that the same
test also passes on vectors that its author has never seen. The folder is ``METHODBENCH_VECTORS``; by default the
test suite's own ``tests/vectors``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from methodbench.errors import SourceError


@dataclass(frozen=True, slots=True)
class Vectors(Mapping[str, np.ndarray]):
    """Arrays of one vector file by name, beside its ``meta``."""

    path: Path
    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]
    read: set[str] = field(default_factory=set, compare=False)
    """Names of the arrays that were looked at, for the record of what was compared."""

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.arrays[name]
        self.read.add(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def tensor(self, name: str, dtype: Any = None) -> Any:
        """Return an array as a torch tensor of its own memory, cast to ``dtype`` when given."""
        import torch

        tensor = torch.from_numpy(np.array(self[name]))
        return tensor if dtype is None else tensor.to(dtype)


def stated(text: str) -> list[float]:
    """Return the numbers of a sentence in which ``meta`` states tolerances or settings; percentages as shares."""
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?(?:e-?\d+)?) ?(%?)", text)
    return [float(number) / (100 if percent else 1) for number, percent in found]


def stated_by(text: str, pattern: str) -> float:
    """Return the number that ``pattern`` captures in its first group; before a ``%`` sign, as a share.

    Raises:
        ValueError: the text states no such number.
    """
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"nothing like {pattern!r} in {text!r}")
    rest = text[match.end(1) :].lstrip()
    return float(match[1]) / (100 if rest.startswith("%") else 1)


def vectors_folder() -> Path:
    """Return the folder of vector files: ``METHODBENCH_VECTORS`` or ``tests/vectors`` below the current folder."""
    return Path(os.environ.get("METHODBENCH_VECTORS") or "tests/vectors")


def load_vectors(family: str, name: str) -> Vectors:
    """Load ``<folder>/<family>/<name>.npz``.

    Raises:
        SourceError: the file is missing, truncated, or carries no ``meta``.
    """
    path = vectors_folder() / family / f"{name}.npz"
    if not path.is_file():
        raise SourceError(
            f"no parity vectors at {path}", "Set METHODBENCH_VECTORS to the folder that holds them."
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if key != "meta"}
            meta = json.loads(str(archive["meta"]))
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"cannot read parity vectors {path}: {error}") from error
    return Vectors(path, arrays, meta)
