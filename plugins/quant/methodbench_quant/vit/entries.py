"""Quantizers of vision transformers."""

from __future__ import annotations

from methodbench.entries import Method

METHODS: list[Method] = []
