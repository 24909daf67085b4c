"""Lion against lion-pytorch, which equals the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from methodbench.testing.parity import Vectors
from methodbench_optim.lion import Lion

pytestmark = pytest.mark.vectors("optim", "lion")


def lion(vectors: Vectors, decayed: bool) -> Lion:
    given = vectors.meta["hyperparameters"]
    beta1, beta2 = given["betas"]
    decay = vectors.meta["weight_decay"] if decayed else 0.0
    return Lion(lr=given["lr"], beta1=beta1, beta2=beta2, weight_decay=decay)


@pytest.mark.parametrize("decayed", [False, True], ids=["wd0", "wd1"])
def test_given_gradients_give_the_authors_parameters(
    vectors: Vectors,
    decayed: bool,
    follow_given_gradients: Callable[[Any], Any],
    assert_matches: Callable[[Any, str], None],
) -> None:
    assert_matches(follow_given_gradients(lion(vectors, decayed)), f"open_wd{decayed:d}")


@pytest.mark.parametrize("decayed", [False, True], ids=["wd0", "wd1"])
def test_least_squares_gives_the_authors_parameters_and_losses(
    vectors: Vectors,
    decayed: bool,
    fit_least_squares: Callable[[Any], Any],
    assert_matches: Callable[[Any, str], None],
) -> None:
    assert_matches(fit_least_squares(lion(vectors, decayed)), f"closed_wd{decayed:d}")
