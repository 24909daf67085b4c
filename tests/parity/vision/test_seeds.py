"""Seed mIoU over thresholds against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from methodbench.testing.parity import Vectors
from methodbench_vision.tasks.weak import confusions, miou

pytestmark = pytest.mark.vectors("vision", "vision_protocol")


def test_seed_miou_at_every_threshold(vectors: Vectors, tolerance: float) -> None:
    maps, labels, truth = (vectors[f"seed.{name}"] for name in ("maps", "labels", "gt"))
    tables = confusions(maps, labels, truth.astype(np.int64), vectors["seed.thresholds"])
    np.testing.assert_allclose(miou(tables.sum(1)), vectors["seed.miou_own"], rtol=0, atol=tolerance)
