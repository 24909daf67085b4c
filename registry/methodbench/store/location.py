"""Where the database is, known without importing the database."""

from __future__ import annotations

import os


def default_url() -> str:
    """Return ``METHODBENCH_DB`` or ``methodbench.db`` in the current folder."""
    return os.environ.get("METHODBENCH_DB") or "methodbench.db"
