"""QuaRot: rotation keeps the function, takes outliers away, and rounds behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.packed import PackedLayer
from methodbench.torchkit.rotation import Hadamard, TransformedInput, fuse_norms, residual_stream
from methodbench_quant.llm.quarot import QuaRot
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]


def rotated(
    model: LoadedModel, data: Calibration | None = None, ctx: Context | None = None, **options: object
) -> LoadedModel:
    method = build(QuaRot, options, "quarot")
    return method.compress(model, data or Calibration.none(), ctx or Context())


def logits(model: LoadedModel, data: Calibration) -> torch.Tensor:
    with torch.no_grad():
        return model.module(data.inputs).logits


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("mode", ["hadamard", "random"])
def test_rotation_alone_keeps_the_logits(tiny: Tiny, tokens: Calibration, name: str, mode: str) -> None:
    model = tiny(name)
    ours = rotated(model, rotate_mode=mode, subtract_embed_mean=False)
    expected = logits(model, tokens)
    torch.testing.assert_close(
        logits(ours, tokens), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    assert ours.storage == "real"
    assert ours.accounted_bits == 32


@pytest.mark.parametrize(("name", "same"), [("llama", False), ("opt", True)])
def test_the_authors_centring_of_embeddings_moves_models_with_rms_norm(
    tiny: Tiny, tokens: Calibration, name: str, same: bool
) -> None:
    model = tiny(name)
    expected = logits(model, tokens)
    moved = float((logits(rotated(model), tokens) - expected).abs().max() / expected.std())
    assert (moved < 1e-3) is same


def test_keys_and_queries_rotated_after_the_rotary_embedding_cancel(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    # At 15 bits rounding moves the logits by less than the tolerance.
    ours = rotated(model, subtract_embed_mean=False, k_bits=15, v_bits=15)
    expected = logits(model, tokens)
    torch.testing.assert_close(
        logits(ours, tokens), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())
    )


@pytest.mark.parametrize("heads", [4, 3])
def test_heads_without_a_hadamard_matrix_get_the_one_of_their_width(tokens: Calibration, heads: int) -> None:
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=heads * 16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    module = hf.LlamaForCausalLM(config).eval().requires_grad_(False)
    model = LoadedModel("heads", "causal-lm", module, detect(module))
    ours = rotated(model, subtract_embed_mean=False)
    layer = ours.module.model.layers[0].self_attn.o_proj
    assert isinstance(layer, TransformedInput)
    assert isinstance(layer.transform, Hadamard)
    assert layer.transform.heads == (4 if heads == 4 else 0)
    torch.testing.assert_close(logits(ours, tokens), logits(model, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_four_bits_everywhere_hurt_less_than_in_the_fused_model(
    tiny: Tiny,
    tokens: Calibration,
    error: Callable[[LoadedModel, LoadedModel], float],
    rounding: str,
) -> None:
    model = tiny("llama")
    # Planted outliers: three channels of the residual stream carry fifteen times more, behind equal gains.
    for name in ("model.embed_tokens", "lm_head"):
        layer = model.module.get_submodule(name)
        weight = layer.weight.clone()
        weight[:, 3::11] *= 15
        set_weight(layer, weight)
    fused = model.clone()
    fuse_norms(residual_stream(fused))
    plain = RTN(bits=4, convention="absmax", symmetric=True, a_bits=4).compress(fused, tokens, Context())
    ours = rotated(
        model, tokens, subtract_embed_mean=False, w_bits=4, w_rounding=rounding, w_clip=True, a_bits=4
    )
    assert error(ours, model) < 0.7 * error(plain, model)
    assert all(isinstance(layer, PackedLayer) for layer in ours.adapter.targets(ours.module).values())
    assert ours.storage == "real"
    assert ours.facts["activations"] == "4 bits, simulated"


def test_more_bits_come_closer_to_the_dense_model(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("llama")
    errors = [
        error(
            rotated(
                model, subtract_embed_mean=False, w_bits=b, w_rounding="rtn", a_bits=b, k_bits=b, v_bits=b
            ),
            model,
        )
        for b in (3, 4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_seed_draws_the_rotation_and_nothing_else_is_random(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    first, again, other = (
        logits(rotated(model, tokens, Context(seed=seed), w_bits=3, a_bits=4), tokens) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(model.module.state_dict()[key], value) for key, value in before.items())


def test_it_generates_with_its_cache_what_it_computes_without(tiny: Tiny) -> None:
    model = rotated(tiny("llama"), w_bits=8, w_rounding="rtn", a_bits=8, k_bits=8, v_bits=8, k_asym=True)
    prompt = torch.arange(6)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.module.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.module.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 12}, "w_bits is 2 to 8"),
        ({"a_bits": 1}, "a_bits"),
        ({"k_group_size": 0}, "k_group_size"),
        ({"a_clip_ratio": 0}, "a_clip_ratio"),
        ({"rotate_mode": "haar"}, "rotate_mode"),
        ({"clip": 0.9}, "no parameter 'clip'"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(QuaRot, options, "quarot")


def test_what_cannot_be_done_says_why(tiny: Tiny, tokens: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="calibration needs inputs"):
        rotated(tiny("llama"), w_bits=4)
    quantized = RTN(bits=4).compress(tiny("llama"), tokens, Context())
    with pytest.raises(NotApplicableError, match="quantized already"):
        rotated(quantized)
    with pytest.raises(NotApplicableError, match="multiple of the group size 5"):
        rotated(tiny("llama"), w_bits=4, w_rounding="rtn", w_group_size=5)
    broken = tiny("llama")
    broken.module.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="NaN or infinity"):
        rotated(broken, w_bits=4, w_rounding="rtn")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(tiny: Tiny, tokens: Calibration, dtype: torch.dtype) -> None:
    model = tiny("llama")
    model.module.to(dtype)
    ours = rotated(model, tokens, w_bits=4, w_rounding="rtn", a_bits=8)
    assert logits(ours, tokens).dtype == dtype
    assert torch.isfinite(logits(ours, tokens)).all()
