"""What a quantizer of language models does with input that it cannot serve, one table over all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from methodbench.catalog import load_catalog, load_implementation
from methodbench.context import Context
from methodbench.entries import Method
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench_quant.llm.entries import METHODS

Tiny = Callable[[str], LoadedModel]

#: Settings with which every method of the table runs on a model of 32 channels.
OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 4, "group_size": 16},
    "gptq": {"bits": 4, "group_size": 16},
    "awq": {"bits": 4, "group_size": 16},
    "smoothquant": {},
    "lorc": {"bits": 4, "group_size": 16, "rank": 2},
    "adadim": {"bits": 4, "group_size": 16},
    "dgq-llm": {"bits": 4, "group_size": 16},
    "llm-fp4": {"candidates": 10, "rounds": 1, "head_and_embedding": False},
    "quarot": {"w_bits": 4, "w_group_size": 16},
    "ostquant": {"w_group_size": 16, "steps": 2, "batch_size": 4, "top_k": 20},
    "abq-llm": {"group_size": 16, "epochs": 1},
    "cbq": {"group_size": 16, "symmetric": False, "epochs": 1},
    "shiftaddllm": {"rounds": 2},
    "nupes": {},
    "adaquant": {"iterations": 2},
    "agile-quant": {"group_size": 16},
    "eaquant": {"block_size": 16, "rotation_steps": 4},
}
ENTRIES = [entry for entry in METHODS if entry.name in OPTIONS]
CALIBRATED = [entry for entry in ENTRIES if entry.name not in ("rtn", "lorc", "nupes")]
GROUPED = [entry for entry in ENTRIES if any("group_size" in option for option in OPTIONS[entry.name])]


#: These fold rotations into the embedding and into the head, which then are no longer the same.
ROTATING = ("quarot", "ostquant")


def subject(entry: Method) -> str:
    """The tiny model that a method runs on."""
    return "mixture" if entry.name == "eaquant" else "llama"


def option_named(entry: Method, end: str) -> str:
    """The name of the hyperparameter of the weights that ends so."""
    fields = [field.name for field in dataclasses.fields(load_implementation(entry.impl))]
    return end if end in fields else f"w_{end}"


def by_name(entries: list[Method]) -> Any:
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def compressed(
    entry: Method, model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: Any
) -> LoadedModel:
    implementation = load_implementation(entry.impl)
    method = build(implementation, {**OPTIONS[entry.name], **options}, entry.name)
    result: LoadedModel = method.compress(model, data, ctx or Context())
    return result


def logits(model: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.module(torch.arange(12)[None], use_cache=False).logits
    return out


@by_name(GROUPED)
def test_a_group_that_does_not_divide_a_width_names_layer_and_group(
    entry: Method, tiny: Tiny, tokens: Calibration
) -> None:
    with pytest.raises(NotApplicableError, match=r"layers\.0\.\S+ has 32 .* group size 24"):
        compressed(entry, tiny(subject(entry)), tokens, **{option_named(entry, "group_size"): 24})


@by_name(ENTRIES)
def test_tied_embeddings_stay_tied_but_for_rotations(entry: Method, tiny: Tiny, tokens: Calibration) -> None:
    model = tiny(subject(entry))
    before = model.adapter.embedding(model.module).weight.clone()
    result = compressed(entry, model, tokens)
    embedding, head = result.adapter.embedding(result.module), result.adapter.head(result.module)
    assert embedding is not None
    assert head is not None
    original = model.adapter.embedding(model.module)
    assert original is not None
    assert torch.equal(original.weight, before)
    if entry.name in ROTATING:
        assert head.weight is not embedding.weight
    else:
        assert head.weight is embedding.weight
        assert torch.equal(embedding.weight, before)


@by_name(ENTRIES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_name_the_layer(
    entry: Method, bad: float, tiny: Tiny, tokens: Calibration
) -> None:
    model = tiny(subject(entry))
    name = "self_attn.o_proj" if subject(entry) == "mixture" else "mlp.down_proj"
    layer = model.module.get_submodule(f"model.layers.1.{name}")
    weight = layer.weight.clone()
    weight[3, 5] = bad
    set_weight(layer, weight)
    with pytest.raises(DivergedError, match=name.rpartition(".")[2]):
        compressed(entry, model, tokens)


@by_name(CALIBRATED)
def test_activations_that_are_not_finite_say_where(entry: Method, tiny: Tiny, tokens: Calibration) -> None:
    model = tiny(subject(entry))
    norm = model.module.get_submodule("model.layers.1.input_layernorm")
    set_weight(norm, torch.full_like(norm.weight, torch.nan))
    with pytest.raises(DivergedError, match=r"q_proj|logits of llama|loss of model\.layers\.\d"):
        compressed(entry, model, tokens)


@by_name(ENTRIES)
def test_silent_channels_give_finite_logits(entry: Method, tiny: Tiny, tokens: Calibration) -> None:
    model = tiny(subject(entry))
    other = "self_attn.o_proj" if subject(entry) == "mixture" else "mlp.up_proj"
    for name in ("model.layers.0.self_attn.v_proj", f"model.layers.1.{other}"):
        layer = model.module.get_submodule(name)
        weight = layer.weight.clone()
        weight[2], weight[:, 7] = 0, 0
        set_weight(layer, weight)
    norm = model.module.get_submodule("model.layers.1.post_attention_layernorm")
    gain = norm.weight.clone()
    gain[4] = 0
    set_weight(norm, gain)
    assert bool(torch.isfinite(logits(compressed(entry, model, tokens))).all())


@by_name(CALIBRATED)
def test_one_token_of_calibration_is_remarked_and_survived(entry: Method, tiny: Tiny) -> None:
    ctx = Context()
    result = compressed(entry, tiny(subject(entry)), Calibration(torch.tensor([[5]])), ctx)
    assert bool(torch.isfinite(logits(result)).all())
    if entry.name != "awq":
        assert any("calibration is short" in warning for warning in ctx.warnings)


@by_name(CALIBRATED)
def test_no_calibration_at_all_is_refused(entry: Method, tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match=r"needs (calibration )?inputs"):
        compressed(entry, tiny(subject(entry)), Calibration.none())


@by_name(ENTRIES)
@pytest.mark.parametrize("bits", [0, 1, 17])
def test_bits_out_of_range_are_named(entry: Method, bits: int) -> None:
    if bits == 1 and entry.name in ("shiftaddllm", "abq-llm"):
        pytest.skip("one bit is in range: a binary matrix, or three levels")
    options = {**OPTIONS[entry.name], option_named(entry, "bits"): bits}
    with pytest.raises(ParameterError, match="bits"):
        build(load_implementation(entry.impl), options, entry.name)


@by_name(ENTRIES)
def test_a_model_that_is_quantized_already_is_refused(entry: Method, tiny: Tiny, tokens: Calibration) -> None:
    once = compressed(entry, tiny(subject(entry)), tokens)
    with pytest.raises(NotApplicableError, match="quantized already"):
        compressed(entry, once, tokens)


@by_name(ENTRIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_in_half_precision(
    entry: Method, dtype: torch.dtype, tiny: Tiny, tokens: Calibration
) -> None:
    model = tiny(subject(entry))
    model.module.to(dtype)
    found = logits(compressed(entry, model, tokens))
    assert found.dtype == dtype
    assert bool(torch.isfinite(found).all())


def test_the_table_names_methods_that_exist() -> None:
    assert set(OPTIONS) <= set(load_catalog().methods)
