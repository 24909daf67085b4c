"""Pruned weights without their zeros: what comes back, what it takes, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench import api
from methodbench.catalog import load_catalog
from methodbench.context import Context
from methodbench.engine.driver import run_plan
from methodbench.errors import NotApplicableError, ParameterError, SourceError
from methodbench.params import build
from methodbench.sources import fetch
from methodbench.store import open_store
from methodbench.suite import Suite
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.compressed import (
    BitmaskLinear,
    CompressedLayer,
    Masked,
    MaskedGroups,
    NMLinear,
    semi_structured,
    store_pruned,
)
from methodbench.torchkit.kernels import graph_of
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss
from methodbench.torchkit.packed import decoding, materialized, pack_linear, packed_configs, rebuild
from methodbench.torchkit.size import bits_per_weight, tensor_bytes
from methodbench_quant.llm.rtn import RTN
from methodbench_quant.models.entries import MODELS
from methodbench_sparse.gblm_pruner import GBLMPruner
from methodbench_sparse.magnitude import Magnitude
from methodbench_sparse.masks import nm_mask, row_mask
from methodbench_sparse.sparsegpt import SparseGPT
from methodbench_sparse.wanda import Wanda

PRUNERS: dict[str, Callable[..., Any]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "gblm-pruner": GBLMPruner,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Of the Linears in a block of SmolLM2-135M, [out, in].
SMOLLM2 = ((576, 576), (192, 576), (1536, 576), (576, 1536))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in every bit, signs of zeros and payloads of NaN included."""
    assert a.dtype == b.dtype
    as_integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def pruned(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight.masked_fill(row_mask(weight.abs(), sparsity), 0)


def pruned_nm(
    rows: int, columns: int, zeros: int, group: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight.masked_fill(nm_mask(weight.abs(), zeros, group), 0)


def linear(weight: Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data = weight
    return layer.requires_grad_(False).eval()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.99]),
    dtype=st.sampled_from(DTYPES),
    empty=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_bitmask_gives_every_bit_back(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype, empty: bool, seed: int
) -> None:
    weight = pruned(rows, columns, sparsity, dtype, seed)
    if empty:
        weight[seed % rows] = 0
    layer = BitmaskLinear.from_quantized(Masked(weight))
    assert same_bits(layer.weight, weight)
    assert layer.values.numel() == int(weight.count_nonzero())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 6),
    pattern=st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8), (3, 5), (15, 16), (1, 40)]),
    dtype=st.sampled_from(DTYPES),
    more=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_groups_give_every_bit_back(
    rows: int, groups: int, pattern: tuple[int, int], dtype: torch.dtype, more: float, seed: int
) -> None:
    weight = pruned_nm(rows, groups * pattern[1], *pattern, dtype=dtype, seed=seed)
    # Rows may hold more zeros than the pattern asks for, up to all.
    weight[0] = weight[0].masked_fill(
        torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) < more, 0
    )
    layer = NMLinear.from_quantized(MaskedGroups(weight, *pattern))
    assert same_bits(layer.weight, weight)
    assert layer.values.numel() == rows * groups * (pattern[1] - pattern[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zeros_and_nan_are_values(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, -0.0, math.nan, 0.0], [0.0, 0.0, math.inf, -1.0]], dtype=dtype)
    assert same_bits(BitmaskLinear.from_quantized(Masked(weight)).weight, weight)
    assert same_bits(NMLinear.from_quantized(MaskedGroups(weight, 2, 4)).weight, weight)
    with pytest.raises(NotApplicableError, match=r"not 3:4: 2 groups keep more than 1 of 4"):
        NMLinear.from_quantized(MaskedGroups(weight, 3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SMOLLM2)
def test_bytes_are_those_of_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    count, digits = shape[0] * shape[1], 8 * dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    for sparsity in (0.0, 0.5, 0.9):
        weight = torch.ones(shape, dtype=dtype).masked_fill(
            torch.rand(shape, generator=generator) < sparsity, 0
        )
        layer = BitmaskLinear.from_quantized(Masked(weight))
        assert 8 * tensor_bytes(layer) / count == pytest.approx(digits * (1 - sparsity) + 1, rel=0.01)
    for zeros, group, places in ((2, 4, 2), (4, 8, 3), (3, 4, 2)):
        weight = torch.ones(shape, dtype=dtype).unflatten(1, (-1, group))
        weight[..., :zeros] = 0
        layer = NMLinear.from_quantized(MaskedGroups(weight.flatten(1), zeros, group))
        kept = (group - zeros) / group
        assert 8 * tensor_bytes(layer) / count == pytest.approx(kept * (digits + places), rel=0.01)


@pytest.mark.parametrize("masked", [lambda w: Masked(w), lambda w: MaskedGroups(w, 2, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_that_of_the_dense_layer(
    masked: Callable[[Tensor], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    dense = linear(pruned_nm(24, 64, 2, 4, dtype))
    layer = pack_linear(dense, masked(dense.weight))
    x = torch.randn(3, 7, 64).to(dtype)
    assert same_bits(layer(x), dense(x))
    assert same_bits(layer(x[0, :1]), dense(x[0, :1]))
    with materialized(layer):
        assert same_bits(layer(x), dense(x))
    # The state dict fills an empty layer of the same configuration.
    holder, other = nn.ModuleDict({"a": layer}), nn.ModuleDict({"a": nn.Linear(64, 24)})
    torch.save(holder.state_dict(), tmp_path / "state.pt")
    rebuild(other, packed_configs(holder))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same_bits(other["a"](x), dense(x))
    assert tensor_bytes(other) == tensor_bytes(layer)


@pytest.mark.parametrize("masked", [lambda w: Masked(w), lambda w: MaskedGroups(w, 2, 4)])
def test_conversions_of_the_module_convert_the_values(masked: Callable[[Tensor], Any]) -> None:
    dense = linear(pruned_nm(8, 32, 2, 4))
    layer = pack_linear(dense, masked(dense.weight))
    before = tensor_bytes(layer)
    layer.to(torch.bfloat16)
    dense.to(torch.bfloat16)
    assert layer.dtype == layer.weight.dtype == torch.bfloat16
    assert same_bits(layer.weight, dense.weight)
    assert before - tensor_bytes(layer) == 2 * (8 * 16 + 8)
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    assert same_bits(layer(x), dense(x))
    assert layer.to("meta").weight.shape == (8, 32)


@pytest.mark.parametrize(
    ("weight", "pattern", "message"),
    [
        (pruned_nm(4, 12, 2, 4)[:, :10], (2, 4), r"10 inputs does not divide into groups of 4 \(2:4\)"),
        (torch.ones(4, 8), (2, 4), r"not 2:4: 8 groups keep more than 2 of 4 inputs \(the first: row 0"),
        (torch.eye(8), (7, 8), ""),
        (torch.zeros(4, 8), (4, 4), "4:4 is no pattern"),
        (torch.zeros(2, 1024), (256, 512), "256:512 is no pattern"),
    ],
)
def test_weights_outside_of_the_pattern_are_refused(
    weight: Tensor, pattern: tuple[int, int], message: str
) -> None:
    if not message:
        assert same_bits(NMLinear.from_quantized(MaskedGroups(weight, *pattern)).weight, weight)
        return
    with pytest.raises(NotApplicableError, match=message):
        NMLinear.from_quantized(MaskedGroups(weight, *pattern))


@pytest.mark.parametrize(
    ("name", "hyper", "bits"),
    [
        ("magnitude", {"sparsity": 0.0, "weights": "bitmask"}, 17),
        ("magnitude", {"sparsity": 0.75, "weights": "bitmask"}, 5),
        ("magnitude", {"pattern": "2:4", "weights": "nm"}, 9),
        ("wanda", {"sparsity": 0.75, "weights": "bitmask"}, 5),
        ("wanda", {"pattern": "4:8", "weights": "nm"}, 9.5),
        ("sparsegpt", {"sparsity": 0.0, "weights": "bitmask"}, 17),
        ("sparsegpt", {"pattern": "2:4", "weights": "bitmask"}, 9),
        ("sparsegpt", {"pattern": "2:4", "weights": "nm"}, 9),
        ("gblm-pruner", {"pattern": "4:8", "weights": "nm"}, 9.5),
    ],
)
def test_a_pruner_stores_the_model_that_it_makes_anyway(
    llama: LoadedModel, data: Calibration, tokens: Tensor, name: str, hyper: dict[str, Any], bits: float
) -> None:
    llama.module.bfloat16()
    context = Context()
    dense = PRUNERS[name](**{**hyper, "weights": "dense"}).compress(llama, data, context)
    small = PRUNERS[name](**hyper).compress(llama, data, context)
    assert next_token_loss(small, tokens) == next_token_loss(dense, tokens)
    for where, layer in small.adapter.targets(small.module).items():
        assert isinstance(layer, CompressedLayer), where
        assert same_bits(layer.weight, dense.module.get_submodule(where).get_parameter("weight")), where
    assert (dense.storage, small.storage) == ("simulated", "real")
    assert bits_per_weight(dense) == 16
    # Thresholds take one weight more in every Linear, or in every block of columns.
    assert bits_per_weight(small) == pytest.approx(bits, rel=0.01)
    assert small.accounted_bits == bits_per_weight(small)
    # Everything outside of the blocks is the input's, tied embeddings included.
    assert small.module.lm_head.weight is small.module.model.embed_tokens.weight
    assert small.module.lm_head.weight.data_ptr() == llama.module.lm_head.weight.data_ptr()
    weights = sum(layer.weight.numel() for layer in dense.adapter.targets(dense.module).values())
    saved = tensor_bytes(dense.module) - tensor_bytes(small.module)
    assert saved == pytest.approx((16 - bits_per_weight(small)) * weights / 8)
    assert {key: small.facts[key] for key in dense.facts} == dense.facts


def test_a_layer_that_is_used_twice_is_stored_once(llama: LoadedModel) -> None:
    attention = [block.self_attn for block in llama.adapter.blocks(llama.module)]
    attention[1].q_proj = attention[0].q_proj
    small = Magnitude(weights="bitmask").compress(llama, Calibration.none(), Context())
    found = [block.self_attn.q_proj for block in small.adapter.blocks(small.module)]
    assert found[0] is found[1]


def test_what_is_compressed_cannot_be_compressed_again(llama: LoadedModel, data: Calibration) -> None:
    small = Magnitude(weights="bitmask").compress(llama, data, Context())
    with pytest.raises(NotApplicableError, match=r"is compressed already \(pruned, 50% of the weights"):
        Wanda().compress(small, data, Context())
    with pytest.raises(NotApplicableError, match="q_proj is compressed already"):
        RTN().compress(small, data, Context())


def test_convolutions_stay_dense() -> None:
    stages = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    module = nn.Sequential(*stages).requires_grad_(False)
    model = LoadedModel("tiny-cnn", "cnn", module, detect(module))
    with pytest.raises(NotApplicableError, match=r"layer 0\.0 is a Conv2d"):
        Magnitude(weights="bitmask").compress(model, Calibration.none(), Context())


@pytest.mark.parametrize("name", PRUNERS)
def test_groups_need_a_pattern(name: str) -> None:
    with pytest.raises(ParameterError) as caught:
        build(PRUNERS[name], {"weights": "nm"}, name)
    assert "weights nm needs a pattern such as 2:4" in str(caught.value)
    with pytest.raises(ParameterError) as caught:
        build(PRUNERS[name], {"weights": "csr"}, name)
    assert "weights = 'csr'" in str(caught.value)


def test_without_cuda_no_layer_multiplies_by_semi_structured_kernels(llama: LoadedModel) -> None:
    llama.module.bfloat16()
    small = Magnitude(pattern="2:4", weights="nm").compress(llama, Calibration.none(), Context())
    with semi_structured(small.module) as names:
        assert names == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_kernels_give_the_dense_product(dtype: torch.dtype) -> None:
    dense = linear(pruned_nm(256, 512, 2, 4, dtype)).cuda()
    holder = nn.ModuleDict({"a": pack_linear(dense, MaskedGroups(dense.weight, 2, 4))}).cuda()
    x = torch.randn(5, 33, 512, device="cuda", dtype=dtype)
    layer = holder["a"]
    before, stored = layer(x), tensor_bytes(holder)
    assert same_bits(before, dense(x))
    with semi_structured(holder) as names:
        assert names == ["a"]
        exact = torch.nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
        error = (layer(x).double() - exact).abs().max() / exact.abs().max()
        assert 0 < float(error) < 4 * torch.finfo(dtype).eps
        assert tensor_bytes(holder) == stored
    assert same_bits(layer(x), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_decoding_takes_a_product_that_reads_less() -> None:
    dense = [linear(pruned_nm(4096, 4096, 2, 4, torch.float16)).cuda() for _ in range(4)]
    layers = [pack_linear(one, MaskedGroups(one.weight, 2, 4)) for one in dense]
    holder = nn.Sequential(*layers).cuda()
    x = torch.randn(1, 1, 4096, device="cuda", dtype=torch.float16)
    with torch.no_grad(), decoding(holder) as kernels:
        assert len(set(kernels.values())) == 1
        assert "2:4" in kernels["0"]
        assert set(kernels) == {"0", "1", "2", "3"}
        exact = torch.nn.functional.linear(x.double(), dense[0].weight.double(), dense[0].bias.double())
        error = (holder[0](x).double() - exact).abs().max() / exact.abs().max()
        assert float(error) < 4 * torch.finfo(torch.float16).eps
        graph = graph_of(lambda: holder(x))
        graph.replay()
        torch.cuda.synchronize()
    assert same_bits(holder[0](x), dense[0](x))


def test_a_format_needs_a_known_model_part(llama: LoadedModel) -> None:
    with pytest.raises(ValueError, match="needs a pattern"):
        store_pruned(llama.clone(), "nm")


@pytest.mark.slow
def test_records_hold_the_same_perplexity_and_the_smaller_size(tmp_path: Path) -> None:
    entry = next(model for model in MODELS if model.name == "smollm2-135m")
    try:
        fetch(entry.source, sha256=entry.sha256)
    except SourceError as error:
        pytest.skip(f"no weights: {error}")
    catalog = load_catalog()
    uses = [
        {"name": "magnitude", "params": {"sparsity": 0.5, **more}}
        for more in (
            {},
            {"weights": "bitmask"},
            {"pattern": "2:4"},
            {"pattern": "2:4", "weights": "nm"},
        )
    ]
    suite = Suite.model_validate(
        {
            "name": "storage",
            "comparisons": [
                {
                    "methods": uses,
                    "models": ["smollm2-135m"],
                    "tasks": [{"name": "pydoc-ppl", "params": {"windows": 1, "length": 128}}],
                }
            ],
        }
    )
    with open_store(str(tmp_path / "runs.db")) as store:
        report = run_plan(api.plan(suite, catalog=catalog), store, catalog, cores=1)
        assert report.complete
        runs = {(run.params["pattern"], run.params["weights"]): run for run in report.runs.values()}
        losses = {
            key: [metric.unit_scores().tolist() for metric in store.metrics([run.id])]
            for key, run in runs.items()
        }
    for pattern, weights in (("unstructured", "bitmask"), ("2:4", "nm")):
        dense, small = runs[pattern, "dense"], runs[pattern, weights]
        assert losses[pattern, weights] == losses[pattern, "dense"]
        assert (dense.storage, small.storage) == ("simulated", "real")
        # Weights are float32 here: half of 32 bits and one for the place.
        assert small.bits_per_weight == pytest.approx(17, rel=0.01)
        assert dense.bits_per_weight == 32
        assert small.model_bytes < 0.75 * dense.model_bytes
