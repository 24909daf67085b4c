"""Lion-K against the reference trajectories of each member of the family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from methodbench.testing.parity import Vectors
from methodbench_optim.lion_k import KAPPAS, LionK

pytestmark = pytest.mark.vectors("optim", "lion_k")


@pytest.mark.parametrize("decayed", [False, True], ids=["wd0", "wd1"])
@pytest.mark.parametrize("kappa", list(KAPPAS))
def test_member_gives_the_recorded_parameters(
    vectors: Vectors,
    kappa: Any,
    decayed: bool,
    follow_given_gradients: Callable[[Any], Any],
    assert_matches: Callable[[Any, str], None],
) -> None:
    given = vectors.meta["hyperparameters"]
    beta1, beta2 = given["betas"]
    settings = vectors.meta["kinds"][kappa]
    decay = given["weight_decay"] if decayed else 0.0
    method = LionK(lr=given["lr"], beta1=beta1, beta2=beta2, weight_decay=decay, kappa=kappa, **settings)
    assert_matches(follow_given_gradients(method), f"{kappa}_wd{decayed:d}")


def test_every_recorded_member_is_there(vectors: Vectors) -> None:
    assert set(vectors.meta["kinds"]) <= set(KAPPAS)
