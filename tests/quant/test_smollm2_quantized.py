"""What the cards of rtn, gptq, awq and lorc claim, on a pretrained language model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.size import bits_per_weight, tensor_bytes
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


@pytest.mark.parametrize("group_size", [-1, 192, 96, 64, 32])
def test_four_bits_take_what_arithmetic_says(smollm2: LoadedModel, group_size: int) -> None:
    result = RTN(bits=4, group_size=group_size).compress(smollm2, Calibration.none(), Context())
    shapes = [layer.weight.shape for layer in smollm2.adapter.targets(smollm2.module).values()]
    count = sum(shape.numel() for shape in shapes)
    grids = sum(shape.numel() // (shape[1] if group_size == -1 else group_size) for shape in shapes)
    # Four bits a weight; a scale of two bytes and a zero point of four bits for each group.
    least = count / 2 + grids * 2.5
    stored = tensor_bytes(result.module) - (tensor_bytes(smollm2.module) - 4 * count)
    assert least <= stored <= 1.02 * least
    assert bits_per_weight(result) == pytest.approx(8 * stored / count, rel=1e-6)


@pytest.mark.parametrize("method", [RTN, GPTQ, AWQ])
def test_groups_of_128_are_refused_by_name(
    smollm2: LoadedModel, windows: Windows, method: type[RTN] | type[GPTQ] | type[AWQ]
) -> None:
    data = Calibration(windows("valid", 1))
    with pytest.raises(NotApplicableError, match=r"layers\.0\..*576 input columns.* 128"):
        method(bits=4, group_size=128).compress(smollm2, data, Context())
