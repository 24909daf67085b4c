"""Rules of their own against the authors' code: on given gradients, and on least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from methodbench.testing.parity import Vectors
from methodbench_optim.diffgrad import DiffGrad
from methodbench_optim.lion import Lion

RULES = [
    pytest.param(rule, id=name, marks=pytest.mark.vectors("optim", name))
    for name, rule in (("lion", Lion), ("diffgrad", DiffGrad))
]
pytestmark = [
    pytest.mark.parametrize("decayed", [False, True], ids=["wd0", "wd1"]),
    pytest.mark.parametrize("rule", RULES),
]


def configured(rule: Any, vectors: Vectors, decayed: bool) -> Any:
    """Return the rule with the recorded hyperparameters under our names."""
    names = {name for name in ("lr", "eps") if name in vectors.meta["hyperparameters"]}
    given = {name: vectors.meta["hyperparameters"][name] for name in names}
    beta1, beta2 = vectors.meta["hyperparameters"]["betas"]
    decay = vectors.meta["weight_decay"] if decayed else 0.0
    return rule(**given, beta1=beta1, beta2=beta2, weight_decay=decay)


def test_given_gradients_give_the_authors_parameters(
    vectors: Vectors,
    rule: Any,
    decayed: bool,
    follow_given_gradients: Callable[[Any], Any],
    assert_matches: Callable[[Any, str], None],
) -> None:
    assert_matches(follow_given_gradients(configured(rule, vectors, decayed)), f"open_wd{decayed:d}")


def test_least_squares_gives_the_authors_parameters_and_losses(
    vectors: Vectors,
    rule: Any,
    decayed: bool,
    fit_least_squares: Callable[[Any], Any],
    assert_matches: Callable[[Any, str], None],
) -> None:
    assert_matches(fit_least_squares(configured(rule, vectors, decayed)), f"closed_wd{decayed:d}")
