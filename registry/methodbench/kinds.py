"""Names of the kinds of methods, apart from their protocols so that start-up stays light."""

from __future__ import annotations

KIND_NAMES = ("compressor", "optimizer", "training", "explainer", "segmenter", "probe")

#: Kinds whose result is a model that a task then scores; the other kinds are run by the task itself.
MODEL_KINDS = frozenset({"compressor"})
