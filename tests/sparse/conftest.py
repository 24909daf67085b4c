"""Beds of the sparse family: random decoders of a few thousand weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel


@pytest.fixture
def llama() -> LoadedModel:
    """Two blocks of width 32, grouped queries, tied embeddings; random gains, so that folding them shows."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        use_cache=False,
    )
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    return LoadedModel("tiny-llama", "causal-lm", module, detect(module))


@pytest.fixture
def data() -> Calibration:
    """Six sequences of forty tokens."""
    return Calibration(torch.randint(96, (6, 40), generator=torch.Generator().manual_seed(1)), "random")


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three sequences that the calibration data do not contain."""
    return torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(2))
