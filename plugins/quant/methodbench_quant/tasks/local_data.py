"""Data of lm-eval tasks from files on this machine, in the columns that the tasks expect.

lm-eval reads JSON lines through ``datasets`` without any hub. The files are converted once, into a folder
named by the digest of what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methodbench.errors import SourceError
from methodbench.sources import data_path

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class LocalData:
    """Where a task's data is."""

    overrides: Mapping[str, Any]
    """Fields that replace those of the task's own configuration."""
    files: Mapping[str, Path]
    """File of each split, JSON lines."""
    sha256: str
    """Digest of what the files hold."""
    remark: str = ""
    """What a reader must know when the local data changes the task's procedure."""


def local_data(task: str, cache: Path) -> LocalData | None:
    """Return the local data of lm-eval's ``task``, or None when there is none on this machine.

    Args:
        cache: folder for converted files.

    Raises:
        SourceError: files that are damaged.
    """
    for start, find in _FINDERS:
        if task.startswith(start):
            try:
                found = find(task.removeprefix(start))
            except (OSError, ValueError, KeyError) as error:
                raise SourceError(f"the local data of {task} cannot be read: {error}") from error
            if found is None:
                return None
            splits, overrides, remark = found
            return _written(task, splits, overrides, remark, cache)
    return None


Found = tuple[dict[str, Rows], dict[str, Any], str]


def _piqa(rest: str) -> Found | None:
    items, labels = data_path("piqa/valid.jsonl"), data_path("piqa/valid-labels.lst")
    if rest or items is None or labels is None:
        return None
    answers = [int(line) for line in labels.read_text().split()]
    rows = [{**row, "label": label} for row, label in zip(_rows(items), answers, strict=True)]
    return {"validation": rows}, {"training_split": None}, ""


def _blimp(paradigm: str) -> Found | None:
    path = data_path(f"blimp/{paradigm}.jsonl")
    return None if path is None else ({"train": _rows(path)}, {}, "")


def _gsm8k(rest: str) -> Found | None:
    test, train = data_path("gsm8k/test.jsonl"), data_path("gsm8k/train.jsonl")
    if rest or test is None:
        return None
    if train is not None:
        return {"train": _rows(train), "test": _rows(test)}, {}, ""
    remark = "without gsm8k/train.jsonl the examples of a prompt come from the other items of the test set"
    return {"test": _rows(test)}, {"training_split": None, "fewshot_split": "test"}, remark


#: Beginning of a task's name -> what finds its data, given the rest of the name.
_FINDERS: tuple[tuple[str, Callable[[str], Found | None]], ...] = (
    ("piqa", _piqa),
    ("blimp_", _blimp),
    ("gsm8k", _gsm8k),
)


def _rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _written(
    task: str, splits: Mapping[str, Rows], overrides: Mapping[str, Any], remark: str, cache: Path
) -> LocalData:
    texts = {
        split: "".join(f"{json.dumps(row, sort_keys=True, ensure_ascii=False)}\n" for row in rows)
        for split, rows in splits.items()
    }
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    folder = cache / f"{task}-{digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, text in texts.items():
        files[split] = folder / f"{split}.jsonl"
        if not files[split].is_file():
            partial = folder / f"{split}.{os.getpid()}.tmp"
            partial.write_text(text, encoding="utf-8")
            partial.replace(files[split])
    dataset = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file) for split, file in files.items()},
            "cache_dir": str(cache / "datasets"),
        },
    }
    return LocalData({**dataset, **overrides}, files, digest, remark)
