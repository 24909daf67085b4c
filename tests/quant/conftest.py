"""Tiny random models that quantizers run on, and the real one where it can be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel

VOCABULARY = 64

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
