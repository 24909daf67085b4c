"""Records of the contract suite: what came of a method's checks, and which version of it they are of.

``methodbench check NAME --record`` writes one JSON file per method into the package of the plugin that registers it
(``<package>/checks/<name>.json``). The records ship with the plugin, so that a method's page tells them without
running anything. A record of failures is kept as well: it is what the last checks came to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from methodbench import __version__
from methodbench.errors import MethodbenchError
from methodbench.parity import package_folder
from methodbench.provenance import digest, source_digest

if TYPE_CHECKING:
    from methodbench.catalog import Catalog
    from methodbench.entries import Method

Status = Literal["passed", "failed", "skipped", "expected-failure", "unexpected-pass"]

#: Every outcome of a check, in words for a count of them.
LABELS: Mapping[Status, str] = {
    "passed": "passed",
    "skipped": "skipped",
    "expected-failure": "failed as expected",
    "unexpected-pass": "passed unexpectedly",
    "failed": "failed",
}
#: Outcomes after which nothing has to be mended.
GOOD: frozenset[Status] = frozenset(("passed", "skipped", "expected-failure"))
#: Checks that score a method where the right answer is known; their remarks are results.
SCORES = "planted-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one check."""

    name: str
    status: Status
    detail: str
    """Remark, reason or message, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRecord:
    """What came of all checks of one method."""

    method: str
    digest: str
    """What was checked; see :func:`digest_of`."""
    methodbench: str
    """Version that ran the checks."""
    checked_on: str
    """Day, UTC."""
    outcomes: tuple[Outcome, ...]

    @property
    def good(self) -> bool:
        """Whether nothing has to be mended."""
        return all(one.status in GOOD for one in self.outcomes)

    @property
    def wrong(self) -> list[Outcome]:
        """Checks that failed, or passed although they are declared to fail."""
        return [one for one in self.outcomes if one.status not in GOOD]

    @property
    def scores(self) -> list[Outcome]:
        """What the method came to where the right answer is known."""
        return [one for one in self.outcomes if one.name.startswith(SCORES) and one.status == "passed"]

    def summary(self) -> str:
        """Return the counts in one line, for example ``17 passed, 2 skipped``."""
        return counted(one.status for one in self.outcomes)

    def is_of(self, method: Method) -> bool:
        """Return whether it is of the method as it is today."""
        return self.digest == digest_of(method)


def digest_of(method: Method) -> str:
    """Return sha256 over what checks follow from: the method's source, the shared code it imports, and its entry."""
    promised = [list(method.applies_to), list(method.needs), list(method.properties), list(method.vectors)]
    settings = {name: dict(values) for name, values in method.presets.items()}
    expected, light = dict(method.expected_failures), dict(method.check_params)
    return digest([source_digest(method.impl), method.kind, promised, settings, expected, light])


def counted(statuses: Iterable[Status]) -> str:
    """Return how many checks ended how, in words."""
    counts = Counter(statuses)
    return ", ".join(f"{counts[status]} {label}" for status, label in LABELS.items() if counts[status])


def check_record_of(method: Method, catalog: Catalog) -> CheckRecord | None:
    """Return the record that ships with the method's plugin; None where there is none that can be read."""
    path = _path(method, catalog)
    if path is None:
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return CheckRecord(**{**data, "outcomes": tuple(_outcome(one) for one in data["outcomes"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_check_record(method: Method, catalog: Catalog, outcomes: Iterable[Outcome]) -> Path:
    """Write the record of a method beside its plugin, and return its path.

    Raises:
        MethodbenchError: the plugin's package is no folder that can be written.
    """
    path = _path(method, catalog)
    if path is None:
        raise MethodbenchError(
            f"the package of {method.name} lies in no folder: its checks cannot be recorded"
        )
    record = CheckRecord(
        method=method.name,
        digest=digest_of(method),
        methodbench=__version__,
        checked_on=datetime.now(UTC).date().isoformat(),
        outcomes=tuple(outcomes),
    )
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise MethodbenchError(
            f"cannot write {path}: {error.strerror}", "Records go into the package that registers the method."
        ) from error
    return path


def _outcome(data: Mapping[str, Any]) -> Outcome:
    if data["status"] not in LABELS:
        raise ValueError(data["status"])
    return Outcome(**data)


def _path(method: Method, catalog: Catalog) -> Path | None:
    folder = package_folder(catalog, method)
    return folder / "checks" / f"{method.name}.json" if folder else None
