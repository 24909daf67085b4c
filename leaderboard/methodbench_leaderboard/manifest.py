"""Which pages of an earlier site still hold: each is known by the digest of what it is made from.

The manifest lies in the site's folder. A page whose inputs are those of the earlier build, and whose bytes are still
those that were written, is taken over by a hard link; a copy where the file system has no links.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from methodbench import claims, comparison, stats

#: File in the site's folder; it also tells a folder of ours from anything else that must not be replaced.
MARKER = ".methodbench-site"
_TITLE = "A site built by methodbench; the next build replaces this folder."


def key_of(*inputs: Any) -> str:
    """Return the digest of inputs that JSON has a form for; others go in by ``repr``."""
    text = json.dumps(inputs, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return the digest of everything that makes pages: source and templates of this package, and statistics."""
    folder = Path(__file__).parent
    hasher = hashlib.sha256()
    others = [Path(str(module.__file__)) for module in (claims, comparison, stats)]
    for path in [*sorted([*folder.glob("*.py"), *folder.glob("templates/*.html")]), *others]:
        hasher.update(f"{path.name}\0".encode() + path.read_bytes())
    return hasher.hexdigest()


class Manifest:
    """Keys and digests of the files of a site that is being written."""

    def __init__(self, earlier: Path | None) -> None:
        """
        Args:
            earlier: folder of the site that is about to be replaced; None when there is none.
        """
        self._earlier = earlier
        self._known = _read(earlier) if earlier else {}
        self._written: dict[str, tuple[str, str]] = {}
        self.taken = 0
        """Files that were taken over."""

    def take(self, path: str, key: str, target: Path) -> bool:
        """Put the earlier file at ``target`` and return True, if it was made from the same inputs and is unharmed."""
        known = self._known.get(path)
        if known is None or known[0] != key or self._earlier is None:
            return False
        source = self._earlier / path
        try:
            if source.is_symlink() or hashlib.sha256(source.read_bytes()).hexdigest() != known[1]:
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
        except OSError:
            return False
        self._written[path] = known
        self.taken += 1
        return True

    def note(self, path: str, key: str, data: bytes) -> None:
        """Remember a file that was written."""
        self._written[path] = key, hashlib.sha256(data).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the manifest itself."""
        files = {path: list(known) for path, known in sorted(self._written.items())}
        document = json.dumps({"about": _TITLE, "files": files}, indent=0, sort_keys=True)
        (folder / MARKER).write_text(document + "\n", encoding="utf-8", newline="\n")


def _read(folder: Path) -> dict[str, tuple[str, str]]:
    """Return key and digest of the files of a site; nothing where its manifest is damaged or of another form."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return {str(path): (str(key), str(digest)) for path, (key, digest) in files.items()}
    return {}
