"""What the family does to a pretrained language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import SourceError
from methodbench.sources import data_path, fetch
from methodbench.torchkit.activation_sparsity import forget, measured
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.models.causal_lm import GGUFCausalLM
from methodbench_quant.models.entries import MODELS
from methodbench_sparse.magnitude import Magnitude
from methodbench_sparse.teal import TEAL
from methodbench_sparse.wanda import Wanda
from methodbench_sparse.wina import WINA

pytestmark = pytest.mark.slow

WINDOWS, LENGTH = 4, 512


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


def windows(model: LoadedModel, name: str) -> Tensor:
    """Return the first windows of a split of WikiText-2, [windows, tokens]."""
    path = data_path(f"wikitext2/{name}.txt")
    if path is None:
        pytest.skip("set METHODBENCH_DATA to a folder with wikitext2/")
    text = Path(path).read_text(encoding="utf-8")[: 16 * WINDOWS * LENGTH]
    return torch.tensor(model.tokenizer(text)["input_ids"][: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


@pytest.fixture(scope="module")
def calibration(smollm2: LoadedModel) -> Calibration:
    return Calibration(windows(smollm2, "valid"), "wikitext2 valid")


@pytest.fixture(scope="module")
def held_out(smollm2: LoadedModel) -> Tensor:
    return windows(smollm2, "test")


def perplexity(model: LoadedModel, tokens: Tensor) -> float:
    with torch.no_grad():
        logits = model.module(tokens).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).exp())


def test_at_half_the_weights_wanda_beats_magnitude(
    smollm2: LoadedModel, calibration: Calibration, held_out: Tensor
) -> None:
    dense = perplexity(smollm2, held_out)
    wanda = perplexity(Wanda(sparsity=0.5).compress(smollm2, calibration, Context()), held_out)
    magnitude = perplexity(Magnitude(sparsity=0.5).compress(smollm2, calibration, Context()), held_out)
    assert dense < wanda < 0.8 * magnitude
    assert perplexity(smollm2, held_out) == dense


def test_the_rotation_keeps_perplexity_and_half_the_inputs_cost_some(
    smollm2: LoadedModel, held_out: Tensor
) -> None:
    def wina(sparsity: float) -> float:
        method = WINA(sparsity=sparsity, subtract_embed_mean=False)
        return perplexity(method.compress(smollm2, Calibration.none(), Context()), held_out)

    dense = perplexity(smollm2, held_out)
    assert wina(0) == pytest.approx(dense, rel=1e-3)
    assert dense < wina(0.25) < wina(0.5)


def test_at_half_of_the_inputs_wina_is_as_good_as_teal_to_a_twentieth(
    smollm2: LoadedModel, held_out: Tensor
) -> None:
    # Both keep exact counts on all tokens; calibration changes nothing but thresholds, which neither uses.
    some = Calibration(held_out[:1, :64], "wikitext2 test")
    wina = WINA(sparsity=0.5, transform=False, columns="paper", positions="all")
    teal = TEAL(sparsity=0.5, mask_by="topk", positions="all")
    scores = []
    for method in (wina, teal):
        sparse = method.compress(smollm2, some, Context())
        forget(sparse)
        scores.append(perplexity(sparse, held_out))
        assert measured(sparse)["sparsity_model"] == pytest.approx(0.5, abs=1e-3)
    # Paired over ten windows of another text the two are a tie, so no more than this is sure of four windows.
    assert perplexity(smollm2, held_out) < scores[0] < 1.05 * scores[1]
