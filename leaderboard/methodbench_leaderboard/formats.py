"""Values as text: numbers with the digits that matter, sizes, times, and strings of records made harmless."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from markupsafe import Markup

from methodbench_leaderboard.records import utc

MINUS = "−"
NOTHING = "–"

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_RUN_ID = re.compile(r"[0-9a-f]{6,64}")
_ARXIV = re.compile(r"[0-9a-z./-]{4,40}", re.IGNORECASE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+")
# Control characters, marks that turn the direction of text, and halves of surrogate pairs: they would change how the
# page around them reads, or cannot be written at all.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def harmless(value: Any) -> Any:
    """Return text with invisible and direction-changing characters spelled out; anything else as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        # Most text is plain, and every piece of every page comes through here.
        if value.isascii() and value.isprintable():
            return value
        return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", value)
    return value


def slug(name: str) -> str:
    """Return a file name for ``name``: itself where it is a plain name, else a digest of it."""
    if _SLUG.fullmatch(name) and not name.endswith((".html", ".")):
        return name
    return "x-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def run_slug(run_id: str) -> str:
    """Return a file name for a run id."""
    return run_id if _RUN_ID.fullmatch(run_id) else slug(run_id)


def arxiv_url(identifier: str) -> str:
    """Return the address of an arXiv paper; empty for what is no identifier."""
    return f"https://arxiv.org/abs/{identifier}" if _ARXIV.fullmatch(identifier) else ""


def repository_url(name: str) -> str:
    """Return the address of ``owner/name`` on GitHub; empty for anything else."""
    return f"https://github.com/{name}" if _REPOSITORY.fullmatch(name) else ""


def number(value: float | None) -> str:
    """Return ``value`` with four significant digits; what is not finite in words."""
    if value is None:
        return NOTHING
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return f"diverged ({'' if value > 0 else MINUS}inf)"
    return _digits(value)


def _digits(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.1f}"
    elif size >= 10:
        text = f"{value:.2f}"
    elif size >= 1:
        text = f"{value:.3f}"
    else:
        text = f"{value:.4f}"
    return text.replace("-", MINUS)


def signed(value: float | None) -> str:
    """Return a difference with its sign."""
    text = number(value)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text


def compact(value: float) -> str:
    """Return a short label for the tick of an axis."""
    size = abs(value)
    if size >= 1e5 or (size and size < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    return f"{value:,.10g}".replace("-", MINUS)


def size(value: float | None) -> str:
    """Return bytes in decimal units."""
    if value is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return (
                f"{value:.0f} {unit}"
                if unit == "B"
                else f"{value:.3g} {unit}"
                if value < 100
                else f"{value:,.0f} {unit}"
            )
        value /= 1000
    raise AssertionError("unreachable")


def seconds(value: float | None) -> str:
    """Return a time span."""
    if value is None:
        return NOTHING
    if value < 0.001:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    if value < 100:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def moment(value: datetime | None) -> str:
    """Return a time to the minute, in UTC."""
    return utc(value).strftime("%Y-%m-%d %H:%M UTC") if value else NOTHING


def plain(value: Any) -> str:
    """Return a setting as it would be typed; JSON for lists and mappings."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return repr(value).removesuffix(".0") if math.isfinite(value) and abs(value) < 1e15 else number(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def shorten(text: Any, length: int = 60) -> str:
    """Return ``text`` cut to ``length`` characters."""
    line = str(text)
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


#: How kinds of models are called on pages; another kind goes by its name.
_KINDS = {
    "causal-lm": "language models", "vit": "vision transformers", "cnn": "convolutional networks",
    "sentence-encoder": "sentence encoders",
}  # fmt: skip
#: What the score of a cell is of the scores of its units.
_REDUCTIONS = {
    "mean": "their mean", "exp-mean": "the exponential of their mean", "median": "their median",
    "single": "a single score",
}  # fmt: skip


def kind_title(kind: str) -> str:
    """Return what readers call a kind of models."""
    return _KINDS.get(kind, kind)


def reduction(aggregate: str) -> str:
    """Return in words how the scores of units become one number."""
    return _REDUCTIONS.get(aggregate, aggregate)


def flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Return nested settings by dotted names, as they would be typed; sizes in bytes for people."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{name}.{key}": text for key, text in flat(value).items()}
        elif str(name).endswith("_bytes") and isinstance(value, int) and not isinstance(value, bool):
            found[str(name).removesuffix("_bytes")] = size(value)
        elif isinstance(value, (list, Mapping)) and not value:
            found[str(name)] = "none"
        else:
            found[str(name)] = plain(value)
    return found


def short_digest(value: str) -> str:
    """Return the first digits of a digest."""
    return value.rpartition(":")[2][:12]
