"""Chains with quantizers on tiny models: what one link leaves is what the next one works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from methodbench.catalog import Catalog, load_catalog, load_implementation
from methodbench.composition import describe_links
from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import build
from methodbench.torchkit.chain import Chain, zeros_share
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import packed_layers

Tiny = Callable[[str], LoadedModel]
Error = Callable[[LoadedModel, LoadedModel], float]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def apply(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    data: Calibration,
    ctx: Context | None = None,
    **params: Any,
) -> LoadedModel:
    """Run a method or a chain; hyperparameters as ``link__name=value``."""
    method = catalog.method(name)
    settings = {key.replace("__", "."): value for key, value in params.items()}
    if not method.links:
        return build(load_implementation(method.impl), settings, name).compress(model, data, ctx or Context())
    links = [
        (link, build(load_implementation(link["impl"]), link["params"], link["name"]))
        for link in describe_links(method, settings)
    ]
    return Chain(method.name, links).compress(model, data, ctx or Context())


def test_rounding_then_compensation_is_the_compensated_quantizer(
    catalog: Catalog, tiny: Tiny, tokens: Calibration
) -> None:
    model = tiny("llama")
    chain = apply(catalog, "rtn + lorc", model, tokens, rtn__bits=2, lorc__rank=4)
    alone = apply(catalog, "lorc", model, tokens, bits=2, group_size=-1, rank=4)
    ids = tokens.inputs[:2]
    assert torch.equal(chain.module(ids).logits, alone.module(ids).logits)
    assert [step["method"] for step in chain.facts["links"]] == ["rtn", "lorc"]
    assert all(layer.unrounded is None for layer in packed_layers(chain.module).values())


def test_compensation_aims_at_the_weights_that_were_scaled_before_rounding(
    catalog: Catalog, tiny: Tiny, tokens: Calibration, error: Error
) -> None:
    model = tiny("llama")
    settings = {"bits": 2, "group_size": -1, "clip": False}
    awq = apply(catalog, "awq", model, tokens, **settings)
    chained = {f"awq__{key}": value for key, value in settings.items()}
    chain = apply(catalog, "awq + lorc", model, tokens, **chained, lorc__rank=64)
    assert error(chain, model) < 1e-3 * error(awq, model)


def test_pruned_weights_stay_zero_where_the_grid_holds_zero(
    catalog: Catalog, tiny: Tiny, tokens: Calibration
) -> None:
    ctx = Context()
    chain = apply(catalog, "wanda + rtn", tiny("llama"), tokens, ctx, wanda__sparsity=0.5, rtn__bits=8)
    share = zeros_share(chain)
    assert share is not None
    assert share >= 0.5
    assert chain.storage == "real"
    assert not [message for message in ctx.warnings if "undoes" in message]


def test_error_feedback_undoes_zeros_and_says_so(catalog: Catalog, tiny: Tiny, tokens: Calibration) -> None:
    ctx = Context()
    apply(
        catalog,
        "wanda + gptq",
        tiny("llama"),
        tokens,
        ctx,
        wanda__sparsity=0.5,
        gptq__bits=8,
        gptq__group_size=-1,
    )
    assert any("gptq undoes zeros of wanda: 50.0%" in message for message in ctx.warnings)


def test_a_rotation_and_then_a_quantizer_are_the_rotation_with_rounding_of_its_own(
    catalog: Catalog, tiny: Tiny, tokens: Calibration
) -> None:
    model = tiny("llama")
    grid = {"rtn__bits": 4, "rtn__symmetric": True, "rtn__convention": "absmax"}
    chain = apply(catalog, "quarot + rtn", model, tokens, **grid)
    alone = apply(catalog, "quarot", model, tokens, w_bits=4, w_rounding="rtn")
    ids = tokens.inputs[:2]
    assert torch.equal(chain.module(ids).logits, alone.module(ids).logits)
    assert packed_layers(chain.module)


def test_a_quantizer_behind_a_rotation_that_rounds_already_is_refused(
    catalog: Catalog, tiny: Tiny, tokens: Calibration
) -> None:
    settings = {"quarot__w_bits": 4, "quarot__w_rounding": "rtn"}
    with pytest.raises(
        NotApplicableError, match=r"quarot turns layers of \S+ into PackedLinear, and rtn would undo"
    ):
        apply(catalog, "quarot + rtn", tiny("llama"), tokens, **settings)


def test_masked_activations_are_not_silently_dropped(
    catalog: Catalog, tiny: Tiny, tokens: Calibration
) -> None:
    with pytest.raises(
        NotApplicableError, match=r"wina turns layers of \S+ into SparseInput, and rtn would undo"
    ):
        apply(catalog, "wina + rtn", tiny("llama"), tokens, wina__transform=False)
