"""Texts that language models are scored and calibrated on.

A text is one string. Evaluation and calibration texts of one corpus share no passage: the language reference
is calibrated on docstrings, WikiText-2's test set on its validation set.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from methodbench.errors import MissingExtraError, SourceError
from methodbench.sources import data_path, is_offline

Corpus = Literal["pydoc", "wikitext2"]

_HUB_WIKITEXT = "Salesforce/wikitext"


@dataclass(frozen=True)
class Text:
    """One string with what a record must say about it."""

    content: str
    source: str
    joining: str
    """How the pieces of the corpus were joined to one string."""

    @cached_property
    def sha256(self) -> str:
        """Digest of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def evaluation_text(corpus: Corpus) -> Text:
    """Return the text that ``corpus`` is scored on.

    Raises:
        SourceError: the text is neither on this machine nor to be fetched, or is not what its digest says.
    """
    return _EVALUATION[corpus]()


def calibration_text(corpus: Corpus) -> Text:
    """Return the text that a method may look at before it is scored on ``corpus``; raises as above."""
    return _CALIBRATION[corpus]()


def pydoc_topics() -> Text:
    """Return the chapters of the language reference that Python's ``help()`` shows."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    return Text("\n".join(topics.values()), "pydoc_data.topics", "values in their order, joined by a newline")


def stdlib_docstrings() -> Text:
    """Return the docstrings of the standard library's top-level modules, read from their source files.

    Lines that also stand in :func:`pydoc_topics` are left out, so that the two texts share none.

    Raises:
        SourceError: this Python has no source files of its library.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    reference = set(map(str.strip, pydoc_topics().content.splitlines()))
    docstrings = []
    for path in sorted(folder.glob("*.py")):
        for docstring in _docstrings(ast.parse(path.read_bytes(), str(path))):
            lines = docstring.splitlines()
            docstrings.append(
                "\n".join(line for line in lines if not line.strip() or line.strip() not in reference)
            )
    if not docstrings:
        raise SourceError(
            f"the standard library in {folder} has no source files, hence no docstrings to calibrate on",
            "Use a Python installation that contains its library's .py files.",
        )
    return Text(
        "\n\n".join(docstrings), "docstrings of the standard library", "by file name, joined by an empty line"
    )


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the docstrings of ``node``, its classes and their functions, in the order of the source."""
    if docstring := ast.get_docstring(node):
        yield docstring
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _docstrings(child)


def wikitext2(split: Literal["test", "validation"]) -> Text:
    """Return one split of WikiText-2 in the tokenized release, as it was published: lines as they are.

    Read from ``wikitext2/test.txt`` or ``valid.txt`` among the data folders, otherwise from the hub.

    Raises:
        SourceError: it cannot be had, or is another release.
    """
    relative = f"wikitext2/{_WIKITEXT_FILES[split]}"
    path = data_path(relative)
    content = path.read_text(encoding="utf-8") if path else _wikitext2_from_hub(split, relative)
    text = Text(content, f"WikiText-2 {split}", "the file as it is")
    if text.sha256 != _WIKITEXT_SHA256[split]:
        raise SourceError(
            f"{path or _HUB_WIKITEXT} is not the {split} set of WikiText-2's tokenized release "
            f"(sha256 {text.sha256[:12]}..., expected {_WIKITEXT_SHA256[split][:12]}...)",
            "Perplexities on another release cannot be compared; put the tokenized release there.",
        )
    return text


_WIKITEXT_FILES = {"test": "test.txt", "validation": "valid.txt"}
_WIKITEXT_SHA256 = {
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    "validation": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
}


def _wikitext2_from_hub(split: str, relative: str) -> str:
    if is_offline():
        raise SourceError(
            f"{relative} is in none of the data folders, and METHODBENCH_OFFLINE forbids the hub",
            f"Set METHODBENCH_DATA to the folder that holds {relative}, or allow the network.",
        )
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("WikiText-2", "datasets", "methodbench[quant]") from error
    try:
        rows = datasets.load_dataset(_HUB_WIKITEXT, "wikitext-2-v1", split=split)["text"]
    except Exception as error:  # whatever the hub's client raises when it cannot be reached
        raise SourceError(
            f"WikiText-2 could not be fetched from the hub: {error}",
            f"Set METHODBENCH_DATA to a folder that holds {relative}.",
        ) from error
    # The hub keeps blank lines as empty strings; in the file they hold one space.
    return "".join(row or " \n" for row in rows)


_EVALUATION: Mapping[Corpus, Callable[[], Text]] = {
    "pydoc": pydoc_topics,
    "wikitext2": lambda: wikitext2("test"),
}
_CALIBRATION: Mapping[Corpus, Callable[[], Text]] = {
    "pydoc": stdlib_docstrings,
    "wikitext2": lambda: wikitext2("validation"),
}
