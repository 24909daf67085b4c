"""The baselines against torch.optim and pytorch_optimizer run by hand with the recorded settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from methodbench.testing.parity import Vectors
from methodbench_optim.adafactor import Adafactor
from methodbench_optim.baselines import SGDM, AdaDelta, AdaGrad, Adam, AdamW, AMSGrad, RMSProp
from methodbench_optim.lion import Lion

pytestmark = pytest.mark.vectors("optim", "optim_baselines")

METHODS: Mapping[str, Any] = {
    "sgdm": SGDM,
    "nesterov": SGDM,
    "adam": Adam,
    "amsgrad": AMSGrad,
    "adamw": AdamW,
    "adagrad": AdaGrad,
    "rmsprop": RMSProp,
    "adadelta": AdaDelta,
    "adafactor_torch": Adafactor,
    "adafactor_paper": Adafactor,
    "signsgd_momentum": Lion,
}

#: Recorded settings that ours do not have, with the one value that they may have.
FIXED: Mapping[str, Any] = {"dampening": 0, "amsgrad": True, "relative_step": False}


def configured(name: str, given: Mapping[str, Any], weight_decay: float) -> Any:
    """Return the method with the recorded hyperparameters under our names."""
    fields = {key: value for key, value in given.items() if key not in ("decay", "note")}
    for key, only in FIXED.items():
        assert fields.pop(key, only) == only
    if "betas" in fields:
        fields["beta1"], fields["beta2"] = fields.pop("betas")
    if name == "signsgd_momentum":
        # Lion whose step and memory decay alike is sign descent along an average.
        fields["beta1"] = fields["beta2"] = fields.pop("momentum")
    if name == "adafactor_torch":
        eps1, eps2 = fields.pop("eps")
        fields |= {"form": "torch", "eps1": eps1, "eps2": eps2}
        fields["decay_rate"], fields["clip_threshold"] = fields.pop("beta2_decay"), fields.pop("d")
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
