"""Parity vectors: inputs, hyperparameters and outputs of the authors' (or a trusted) implementation.

A vector file is an ``.npz`` with an entry ``meta`` (JSON): everything that a test needs to know, so that the same
test also passes on vectors that its author has never seen. The folder is ``METHODBENCH_VECTORS``; by default the
test suite's own ``tests/vectors``.
"""

from __future__ import annotations

import json
import os
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
