"""Tiny random models that quantizers run on, and the real one where it can be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import SourceError
from methodbench.sources import data_path, fetch
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import materialized
from methodbench_quant.models.causal_lm import GGUFCausalLM
from methodbench_quant.models.entries import MODELS

VOCABULARY = 64
LENGTH = 512

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {
    **_SIZES,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "opt": lambda: hf.OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "mixture": lambda: hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=1),
}


@pytest.fixture
def tiny() -> Callable[[str], LoadedModel]:
    """Builds a random decoder whose activations have outlier channels: ``llama``, ``opt`` or ``mixture``."""

    def build(name: str) -> LoadedModel:
        torch.manual_seed(0)
        module = hf.AutoModelForCausalLM.from_config(_CONFIGS[name]()).eval().requires_grad_(False)
        for key, parameter in module.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if "norm" in key and parameter.ndim == 1:
                parameter[::11] *= 8
        adapter = detect(module)
        return LoadedModel(name, adapter.kind, module, adapter)

    return build


@pytest.fixture
def tokens() -> Calibration:
    """Sixteen sequences of 24 tokens."""
    ids = torch.randint(VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(1))
    return Calibration(ids, "random tokens")


@pytest.fixture
def error() -> Callable[[LoadedModel, LoadedModel], float]:
    """Mean squared difference of two models' logits on tokens that calibration has not seen."""

    def measure(model: LoadedModel, reference: LoadedModel) -> float:
        ids = torch.randint(VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            return float((model.module(ids).logits - reference.module(ids).logits).square().mean())

    return measure


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """SmolLM2-135M in fp32; tests that use it are skipped where its weights cannot be had."""
    entry = next(model for model in MODELS if model.name == "smollm2-135m")
    try:
        source = fetch(entry.source, sha256=entry.sha256).path
    except SourceError as error:
        pytest.skip(f"no weights: {error}")
    folder = tmp_path_factory.mktemp("smollm2")
    loader = GGUFCausalLM(**entry.options)
    loader.prepare(source, folder, Context())
    return loader.load(folder, Context())


@pytest.fixture
def windows(smollm2: LoadedModel) -> Callable[[str, int], Tensor]:
    """Gives the first windows of a split of WikiText-2 for SmolLM2, [windows, 512]."""

    def read(split: str, count: int) -> Tensor:
        path = data_path(f"wikitext2/{split}.txt")
        if path is None:
            pytest.skip("set METHODBENCH_DATA to a folder with wikitext2/")
        text = Path(path).read_text(encoding="utf-8")[: 16 * count * LENGTH]
        return torch.tensor(smollm2.tokenizer(text)["input_ids"][: count * LENGTH]).view(count, LENGTH)

    return read


@pytest.fixture
def perplexity(windows: Callable[[str, int], Tensor]) -> Callable[[LoadedModel], float]:
    """Perplexity on the first four windows of WikiText-2's test split: 25.49 for dense SmolLM2."""

    def measure(model: LoadedModel) -> float:
        losses = []
        with torch.no_grad(), materialized(model.module):
            for window in windows("test", 4):
                logits = model.module(window[None], use_cache=False).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
        return float(torch.stack(losses).mean().exp())

    return measure
