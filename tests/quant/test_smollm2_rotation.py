"""What the cards of quarot, ostquant, abq-llm and cbq claim, on a pretrained language model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.params import build
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import materialized
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


def test_rotation_beats_rounding_at_four_bits_for_weights_and_activations(
    smollm2: LoadedModel, perplexity: Perplexity
) -> None:
    none = Calibration.none()
    plain = RTN(convention="absmax", symmetric=True, a_bits=4).compress(smollm2, none, Context())
    ours = QuaRot(w_bits=4, w_rounding="rtn", a_bits=4, a_clip_ratio=0.9).compress(smollm2, none, Context())
    assert perplexity(ours) < 0.1 * perplexity(plain)


def test_gptq_lowers_what_rotation_leaves_with_a_little_calibration(
    smollm2: LoadedModel, windows: Windows
) -> None:
    model = first_blocks_of(smollm2, 4)
    calibration, held_out = Calibration(windows("valid", 8)), windows("test", 2)

    def divergence(method: QuaRot) -> float:
        ours = method.compress(model, calibration, Context())
        with torch.no_grad(), materialized(ours.module):
            p, q = (part.module(held_out, use_cache=False).logits.log_softmax(-1) for part in (model, ours))
        return float((p.exp() * (p - q)).sum(-1).mean())

    bits = {"w_bits": 4, "a_bits": 4, "a_clip_ratio": 0.9}
    rounded, ours = (divergence(build(QuaRot, {**bits, "w_rounding": w}, "quarot")) for w in ("rtn", "gptq"))
    assert ours < rounded


def first_blocks_of(model: LoadedModel, count: int) -> LoadedModel:
    """The model with its first blocks alone: GPTQ takes seconds on them."""
    module = model.clone().module
    module.model.layers = module.model.layers[:count]
    adapter = detect(module)
    return LoadedModel("first blocks", adapter.kind, module, adapter)
