"""What the cards of rtn, gptq, awq and lorc claim, on a pretrained language model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from methodbench.context import Context
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.llm.awq import AWQ
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.lorc import LoRC
from methodbench_quant.llm.rtn import RTN

pytestmark = pytest.mark.slow

Perplexity = Callable[[LoadedModel], float]
Windows = Callable[[str, int], Tensor]


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"), [(4, -1, 36.67), (4, 64, 31.71), (3, 64, 68.73), (3, -1, 564.5)]
)
def test_rtn_has_the_known_perplexity(
    smollm2: LoadedModel, perplexity: Perplexity, bits: int, group_size: int, expected: float
) -> None:
    method = RTN(bits=bits, group_size=group_size, convention="gptq")  # type: ignore[arg-type]
    result = method.compress(smollm2, Calibration.none(), Context())
    assert perplexity(result) == pytest.approx(expected, rel=0.01)


def test_eight_bits_cost_less_than_a_hundredth(smollm2: LoadedModel, perplexity: Perplexity) -> None:
    result = RTN(bits=8).compress(smollm2, Calibration.none(), Context())
    assert perplexity(result) == pytest.approx(perplexity(smollm2), rel=0.01)


@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("method", [GPTQ, AWQ])
def test_calibrated_methods_beat_rounding_at_three_bits(
    smollm2: LoadedModel,
    perplexity: Perplexity,
    windows: Windows,
    method: type[GPTQ] | type[AWQ],
    group_size: int,
) -> None:
    calibration = windows("valid", 16)
    ctx = Context()
    result = method(bits=3, group_size=group_size).compress(smollm2, Calibration(calibration), ctx)
    nearest = RTN(bits=3, group_size=group_size).compress(smollm2, Calibration.none(), ctx)
    assert not ctx.warnings
    assert perplexity(result) < 0.95 * perplexity(nearest)


def test_low_rank_compensation_beats_rounding_at_three_bits(
    smollm2: LoadedModel, perplexity: Perplexity
) -> None:
    ctx = Context()
    nearest = RTN(bits=3).compress(smollm2, Calibration.none(), ctx)
    result = LoRC(bits=3, group_size=-1, rank=8).compress(smollm2, Calibration.none(), ctx)
    assert perplexity(result) < 0.9 * perplexity(nearest)
