"""Quantizers of activations, keys and values as parts of a model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.activations import (
    ActivationQuantizer,
    FloatActivationQuantizer,
    QuantizedInputLinear,
    StaticQuantizer,
    quantize_cache,
    quantize_inputs,
)
from methodbench.torchkit.adapters import Adapter, detect
from methodbench.torchkit.attention import transform_operands
from methodbench.torchkit.floats import FloatFormat, FloatGrid
from methodbench.torchkit.model import LoadedModel, set_submodule
from methodbench.torchkit.packed import PackedLinear, pack_linear
from methodbench.torchkit.quantizers import fake_quantize, quantize, quantize_static, static_grid

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "opt": lambda: hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZES, intermediate_size=48),
}


def decoder(name: str = "llama") -> LoadedModel:
    torch.manual_seed(0)
    module = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return LoadedModel(name, "causal-lm", module, detect(module))


def logits(model: LoadedModel) -> Tensor:
    ids = torch.arange(24).view(2, 12) % 64
    with torch.no_grad():
        out: Tensor = model.module(ids, use_cache=False).logits
    return out


def test_groups_of_features_are_quantized_on_grids_of_their_own() -> None:
    x = torch.randn(2, 3, 16)
    x[..., 4] *= 100
    grouped = ActivationQuantizer(4, group_size=4)(x)
    by_hand = torch.cat([fake_quantize(part, 4) for part in x.split(4, -1)], -1)
    assert torch.equal(grouped, by_hand)
    assert float((grouped - x).abs()[..., 8:].max()) < float((fake_quantize(x, 4) - x).abs()[..., 8:].max())
    with pytest.raises(NotApplicableError, match="the activation has 16"):
        ActivationQuantizer(4, group_size=5)(x)


def test_a_clip_factor_narrows_the_range() -> None:
    x = torch.linspace(-1, 1, 100)[None]
    assert float(ActivationQuantizer(4, clip=0.5)(x).max()) == pytest.approx(0.5 * 7 / 7, rel=0.2)


@pytest.mark.parametrize(
    "grid",
    [
        static_grid(2.0, 8),
        static_grid(torch.linspace(1, 3, 16), 4),
        FloatGrid(torch.linspace(0.5, 2, 16), FloatFormat(2, 1)),
    ],
)
def test_a_static_quantizer_holds_its_grid_through_a_state_dict(grid: FloatGrid) -> None:
    x = torch.randn(2, 3, 16)
    quantizer = StaticQuantizer(grid)
    assert torch.equal(quantizer(x), grid.snap(x))
    other = copy.deepcopy(quantizer)
    other.scale.zero_()
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16


def test_a_static_grid_is_that_of_the_calibrated_maximum() -> None:
    x = torch.randn(40) * 3
    assert torch.equal(StaticQuantizer(static_grid(1.5, 8))(x), quantize_static(x, 1.5, 8))


def test_floating_point_tokens_do_not_see_each_other() -> None:
    x = torch.randn(5, 16)
    quantizer = FloatActivationQuantizer(FloatFormat(2, 1))
    alone = torch.cat([quantizer(token[None]) for token in x])
    assert torch.equal(quantizer(x), alone)


def test_dense_and_packed_layers_both_take_a_quantizer() -> None:
    model = decoder().clone()
    packed = "model.layers.0.self_attn.o_proj"
    weight = model.module.get_submodule(packed).weight
    set_submodule(model.module, packed, pack_linear(model.module.get_submodule(packed), quantize(weight, 8)))
    quantize_inputs(model, lambda name: None if name.endswith("down_proj") else ActivationQuantizer(8))
    for name, layer in model.adapter.targets(model.module).items():
        if name.endswith("down_proj"):
            assert type(layer) is nn.Linear
            continue
        assert isinstance(layer, PackedLinear if name == packed else QuantizedInputLinear), name
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(x), nn.functional.linear(fake_quantize(x, 8), layer.weight, layer.bias))


def test_packing_a_layer_keeps_the_quantizer_of_its_input() -> None:
    layer = QuantizedInputLinear(nn.Linear(16, 4), ActivationQuantizer(4))
    packed = pack_linear(layer, quantize(layer.weight.detach(), 8))
    assert packed.input_quantizer is layer.input_quantizer


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_identity_in_every_place_keeps_the_logits(name: str) -> None:
    dense, model = decoder(name), decoder(name).clone()
    quantize_inputs(model, lambda _: nn.Identity())
    transform_operands(model, lambda _: {key: nn.Identity() for key in ("query", "key", "value")})
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_keys_and_values_are_rounded_after_the_rotary_embedding(name: str) -> None:
    model = decoder(name)
    clone = model.clone()
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return fake_quantize(x, 4)

    quantize_cache(clone, Spy)
    seen.clear()
    changed = logits(clone)
    heads = 2 if name == "llama" else 4
    assert len(seen) == 4
    assert {tuple(x.shape) for x in seen} == {(2, heads, 12, 8)}
    assert not torch.equal(changed, logits(model))
    # The first position is not rotated; a constant sequence tells whether later ones are.
    keys = seen[0]
    if name != "opt":
        with torch.no_grad():
            clone.module(torch.full((1, 6), 5), use_cache=False)
        keys = seen[4]
        assert not torch.allclose(keys[:, :, 0], keys[:, :, 5], atol=1e-3)


def test_rotating_queries_and_keys_alike_keeps_the_logits() -> None:
    model = decoder()
    turned = model.clone()
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))

    class Rotate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ rotation

    transform_operands(turned, lambda _: {"query": Rotate(), "key": Rotate()})
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-4, atol=1e-4)
    assert model.module.config._attn_implementation == "sdpa"


def test_a_cache_gives_what_the_whole_sequence_gives() -> None:
    model = decoder().clone()
    quantize_cache(model, lambda: ActivationQuantizer(4, convention="omni", symmetric=False))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        whole = model.module(ids, use_cache=False).logits
        first = model.module(ids[:, :7], use_cache=True)
        rest = model.module(ids[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-4, atol=1e-4)


def test_fewer_bits_in_the_cache_cost_more() -> None:
    model = decoder()
    errors = []
    for bits in (2, 4, 8):
        clone = model.clone()
        quantize_cache(clone, lambda bits=bits: ActivationQuantizer(bits))
        errors.append(float((logits(clone) - logits(model)).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_a_model_without_the_place_is_refused() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    model = LoadedModel("toy", "causal-lm", module, Adapter(kind="causal-lm", stages=("0",)))
    with pytest.raises(NotApplicableError, match="toy offers no place"):
        quantize_cache(model, lambda: ActivationQuantizer(4))
    eager = decoder()
    eager.module.set_attn_implementation("eager")
    with pytest.raises(NotApplicableError, match="llama offers no place"):
        quantize_cache(eager, lambda: ActivationQuantizer(4))
