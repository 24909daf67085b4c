"""Tiny random models of every structure that the adapters know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

from methodbench.torchkit.adapters import detect, unfuse_experts
from methodbench.torchkit.model import Calibration, LoadedModel

VOCABULARY = 64

_WIDE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_FULL = {**_WIDE, "num_key_value_heads": 4}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
_EXPERTS = {**_FULL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_FULL),
    "llama-tied": lambda: hf.LlamaConfig(**_FULL, tie_word_embeddings=True, attention_bias=True),
    "llama-grouped-queries": lambda: hf.LlamaConfig(**_WIDE, num_key_value_heads=2),
    "gemma": lambda: hf.GemmaConfig(**_FULL, head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_FULL,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: hf.Phi3Config(**_FULL),
    "cohere": lambda: hf.CohereConfig(**_FULL),
    "opt": lambda: hf.OPTConfig(**_OPT),
    "opt-gelu": lambda: hf.OPTConfig(**_OPT, activation_function="gelu"),
    "opt-post-norm": lambda: hf.OPTConfig(**{**_OPT, "word_embed_proj_dim": 16}, do_layer_norm_before=False),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**_WIDE),
    "gpt-neox-serial": lambda: hf.GPTNeoXConfig(**_WIDE, use_parallel_residual=False),
    "mixtral": lambda: hf.MixtralConfig(**_FULL, num_local_experts=4),
    "olmoe": lambda: hf.OlmoeConfig(**_EXPERTS),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(
        **_EXPERTS, shared_expert_intermediate_size=40, decoder_sparse_step=2
    ),
}
MIXTURES = ("mixtral", "olmoe", "qwen2-moe")


def build_decoder(name: str, *, unfuse: bool = True, **options: Any) -> LoadedModel:
    """Return a random decoder in eval mode whose norms and biases are random, too."""
    torch.manual_seed(0)
    module = hf.AutoModelForCausalLM.from_config(DECODERS[name](), **options)
    return _loaded(name, module, unfuse=unfuse)


def _loaded(name: str, module: nn.Module, *, unfuse: bool = True) -> LoadedModel:
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    if unfuse:
        unfuse_experts(module)
    adapter = detect(module)
    return LoadedModel(name, adapter.kind, module, adapter)


@pytest.fixture
def decoder() -> Callable[..., LoadedModel]:
    """Builds a tiny random decoder by the name of its structure."""
    return build_decoder


@pytest.fixture(params=sorted(DECODERS))
def any_decoder(request: pytest.FixtureRequest) -> LoadedModel:
    """A tiny random decoder of every structure in turn, experts unfused."""
    return build_decoder(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest) -> LoadedModel:
    """A tiny random mixture of experts of every structure in turn, experts still fused."""
    return build_decoder(request.param, unfuse=False)


@pytest.fixture
def vit() -> LoadedModel:
    torch.manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=3, num_heads=3
    )
    return _loaded("vit", module)


@pytest.fixture
def cnn() -> LoadedModel:
    torch.manual_seed(0)
    return _loaded("cnn", timm.create_model("resnet18", num_classes=5))


@pytest.fixture
def bert() -> LoadedModel:
    torch.manual_seed(0)
    return _loaded("bert", hf.BertModel(hf.BertConfig(**_WIDE)))


@pytest.fixture
def tokens() -> Calibration:
    """Six sequences of 12 tokens."""
    return Calibration(torch.randint(VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def images() -> Calibration:
    """Five pictures of 16 x 16 pixels."""
    return Calibration(torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def logits() -> Callable[[nn.Module, Tensor], Tensor]:
    """Runs a model without gradients and returns its scores (or last hidden states)."""

    def run(module: nn.Module, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            out = module(inputs)
        return out if isinstance(out, Tensor) else out[0]

    return run
