"""The baselines against torch.optim run by hand with the recorded settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from methodbench.testing.parity import Vectors
from methodbench_optim.baselines import SGD, Adam, AdamW

pytestmark = pytest.mark.vectors("optim", "optim_baselines")

METHODS: Mapping[str, type] = {
    "sgdm": SGD,
    "nesterov": SGD,
    "adam": Adam,
    "amsgrad": Adam,
    "adamw": AdamW,
}


def configured(name: str, given: Mapping[str, Any], weight_decay: float) -> Any:
    """Return the method with the recorded hyperparameters under our names."""
    fields = {key: value for key, value in given.items() if key not in ("betas", "decay", "note")}
    # Ours has no dampening: the records must not use any.
    assert fields.pop("dampening", 0) == 0
    if "betas" in given:
        fields["beta1"], fields["beta2"] = given["betas"]
    return METHODS[name](**fields, weight_decay=weight_decay)


@pytest.mark.parametrize("decayed", [False, True], ids=["wd0", "wd1"])
@pytest.mark.parametrize("name", list(METHODS))
def test_baseline_gives_the_recorded_parameters(
    vectors: Vectors,
    name: str,
    decayed: bool,
    follow_given_gradients: Callable[[Any], Any],
    assert_matches: Callable[[Any, str], None],
) -> None:
    decay = vectors.meta["weight_decay"] if decayed else 0.0
    method = configured(name, vectors.meta["hyperparameters"][name], decay)
    assert_matches(follow_given_gradients(method), f"{name}_wd{decayed:d}")
