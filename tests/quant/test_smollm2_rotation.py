"""What the cards of quarot, ostquant, abq-llm and cbq claim, on a pretrained language model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from methodbench.context import Context
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.llm.quarot import QuaRot
from methodbench_quant.llm.rtn import RTN

pytestmark = pytest.mark.slow

Perplexity = Callable[[LoadedModel], float]
Windows = Callable[[str, int], Tensor]


def test_rotation_alone_leaves_perplexity_and_centring_costs_half_a_percent(
    smollm2: LoadedModel, perplexity: Perplexity
) -> None:
    none = Calibration.none()
    exact = QuaRot(subtract_embed_mean=False).compress(smollm2, none, Context())
    assert perplexity(exact) == pytest.approx(perplexity(smollm2), rel=1e-4)
    centred = QuaRot().compress(smollm2, none, Context())
    assert perplexity(centred) == pytest.approx(perplexity(smollm2), rel=0.01)


def test_four_bit_activations_work_behind_the_rotation_only(
    smollm2: LoadedModel, perplexity: Perplexity
) -> None:
    none = Calibration.none()
    plain = RTN(bits=8, convention="absmax", symmetric=True, a_bits=4).compress(smollm2, none, Context())
    ours = QuaRot(w_bits=8, w_rounding="rtn", a_bits=4, a_clip_ratio=0.9).compress(smollm2, none, Context())
    assert perplexity(plain) > 1000
    assert perplexity(ours) < 60
