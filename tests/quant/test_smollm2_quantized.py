"""What the cards of rtn, gptq and awq claim, on a pretrained language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import SourceError
from methodbench.sources import data_path, fetch
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import materialized
from methodbench_quant.llm.awq import AWQ
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.rtn import RTN
from methodbench_quant.models.causal_lm import GGUFCausalLM
from methodbench_quant.models.entries import MODELS

pytestmark = pytest.mark.slow

LENGTH = 512


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    entry = next(model for model in MODELS if model.name == "smollm2-135m")
    try:
        source = fetch(entry.source, sha256=entry.sha256).path
    except SourceError as error:
        pytest.skip(f"no weights: {error}")
    folder = tmp_path_factory.mktemp("smollm2")
    loader = GGUFCausalLM(**entry.options)
    loader.prepare(source, folder, Context())
    return loader.load(folder, Context())


def windows(model: LoadedModel, split: str, count: int) -> Tensor:
    """Return the first windows of a split of WikiText-2, [windows, tokens]."""
    path = data_path(f"wikitext2/{split}.txt")
    if path is None:
        pytest.skip("set METHODBENCH_DATA to a folder with wikitext2/")
    text = Path(path).read_text(encoding="utf-8")[: 16 * count * LENGTH]
    return torch.tensor(model.tokenizer(text)["input_ids"][: count * LENGTH]).view(count, LENGTH)


def perplexity(model: LoadedModel) -> float:
    losses = []
    with torch.no_grad(), materialized(model.module):
        for window in windows(model, "test", 4):
            logits = model.module(window[None], use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"), [(4, -1, 36.67), (4, 64, 31.71), (3, 64, 68.73), (3, -1, 564.5)]
)
def test_rtn_has_the_known_perplexity(
    smollm2: LoadedModel, bits: int, group_size: int, expected: float
) -> None:
    method = RTN(bits=bits, group_size=group_size, convention="gptq")  # type: ignore[arg-type]
    result = method.compress(smollm2, Calibration.none(), Context())
    assert perplexity(result) == pytest.approx(expected, rel=0.01)


def test_eight_bits_cost_less_than_a_hundredth(smollm2: LoadedModel) -> None:
    result = RTN(bits=8).compress(smollm2, Calibration.none(), Context())
    assert perplexity(result) == pytest.approx(perplexity(smollm2), rel=0.01)


@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("method", [GPTQ, AWQ])
def test_calibrated_methods_beat_rounding_at_three_bits(
    smollm2: LoadedModel, method: type[GPTQ] | type[AWQ], group_size: int
) -> None:
    calibration = windows(smollm2, "valid", 16)
    ctx = Context()
    result = method(bits=3, group_size=group_size).compress(smollm2, Calibration(calibration), ctx)
    nearest = RTN(bits=3, group_size=group_size).compress(smollm2, Calibration.none(), ctx)
    assert not ctx.warnings
    assert perplexity(result) < 0.9 * perplexity(nearest)
