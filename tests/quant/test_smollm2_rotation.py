"""What the cards of quarot, ostquant, abq-llm and cbq claim, on a pretrained language model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.llm.abq_llm import ABQLLM
from methodbench_quant.llm.cbq import CBQ
from methodbench_quant.llm.ostquant import OSTQuant
from methodbench_quant.llm.quarot import QuaRot
from methodbench_quant.llm.rtn import RTN

pytestmark = pytest.mark.slow

Perplexity = Callable[[LoadedModel], float]
Windows = Callable[[str, int], Tensor]
Divergence = Callable[[LoadedModel, LoadedModel], float]


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


@pytest.fixture
def stub(smollm2: LoadedModel) -> LoadedModel:
    """SmolLM2 cut off behind its fourth block: real weights and activations, a seventh of the work."""
    short = smollm2.clone()
    short.module.model.layers = short.module.model.layers[:4]
    short.module.config.num_hidden_layers = 4
    return short


@pytest.fixture
def divergence(windows: Windows) -> Divergence:
    """Mean divergence of a model's next-token distribution from another's on text that calibration has not seen."""

    def measure(model: LoadedModel, reference: LoadedModel) -> float:
        tokens = windows("test", 2)
        with torch.no_grad():
            p, q = (m.module(tokens, use_cache=False).logits.log_softmax(-1) for m in (reference, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    return measure


def test_learned_transformations_beat_the_first_ones_and_those_beat_rounding(
    stub: LoadedModel, windows: Windows, divergence: Divergence
) -> None:
    data = Calibration(windows("valid", 4).view(8, 256))
    plain = RTN(bits=8, convention="omni", a_bits=4, a_convention="omni").compress(stub, data, Context())
    start, learned = (
        OSTQuant(w_bits=8, w_rounding="rtn", w_clip=False, steps=steps, batch_size=1).compress(
            stub, data, Context()
        )
        for steps in (0, 12)
    )
    assert learned.facts["losses"][1] < learned.facts["losses"][0]
    assert divergence(learned, stub) < divergence(start, stub) < divergence(plain, stub)


def test_blocks_learned_with_scales_and_clipping_beat_rounding(
    stub: LoadedModel, windows: Windows, divergence: Divergence
) -> None:
    data = Calibration(windows("valid", 4).view(8, 256))
    nearest = RTN(bits=2, group_size=64, convention="omni").compress(stub, data, Context())
    ours = ABQLLM(bits=2, group_size=64, epochs=2).compress(stub, data, Context())
    assert divergence(ours, stub) < divergence(nearest, stub)


def test_windows_learned_with_rounding_and_steps_beat_rounding(
    stub: LoadedModel, windows: Windows, divergence: Divergence
) -> None:
    data = Calibration(windows("valid", 4).view(8, 256))
    options = {"bits": 2, "group_size": 64, "symmetric": False}
    nearest = CBQ(**options, epochs=0, cfp="none").compress(stub, data, Context())  # type: ignore[arg-type]
    ours = CBQ(**options, epochs=1).compress(stub, data, Context())  # type: ignore[arg-type]
    assert divergence(ours, stub) < divergence(nearest, stub)
