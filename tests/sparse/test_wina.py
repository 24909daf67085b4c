"""WINA: which inputs stay, where, and what the rotation keeps."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.rotation import RotatedBlock, right_singular_vectors, rotate
from methodbench_sparse.wina import (
    WINA,
    MaskedInput,
    ScoreHistogram,
    column_norms,
    input_mask,
    input_score,
    masked_tokens,
)

seeds = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def sparsify(model: LoadedModel, data: Calibration | None = None, **hyper: Any) -> LoadedModel:
    return WINA(**hyper).compress(model, data or Calibration.none(), Context())


def masked(model: LoadedModel) -> dict[str, MaskedInput]:
    found = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, MaskedInput)}
    assert found.keys() == model.adapter.targets(model.module).keys()
    return found


@settings(max_examples=20, deadline=None)
@given(seed=seeds, keep=st.integers(1, 7))
def test_with_orthogonal_columns_no_other_mask_of_its_size_errs_less(seed: int, keep: int) -> None:
    orthogonal = torch.linalg.qr(normal(seed, 12, 8)).Q
    weight = orthogonal * normal(seed + 1, 8).exp()
    x = normal(seed + 2, 8)

    def error(mask: Tensor) -> float:
        return float((weight @ x - weight @ (x * mask)).norm())

    scores = input_score(x[None, None], column_norms(weight))
    chosen = input_mask(scores, keep)[0, 0]
    others = (torch.isin(torch.arange(8), torch.tensor(kept)) for kept in combinations(range(8), keep))
    assert error(chosen) <= min(map(error, others)) + 1e-12
    dropped = (x.square() * column_norms(weight).square())[~chosen].sum()
    assert error(chosen) ** 2 == pytest.approx(float(dropped), rel=1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_unequal_columns_make_it_err_less_than_input_magnitude_on_average(seed: int) -> None:
    weight = normal(seed, 64, 64) * normal(seed + 1, 64).exp()
    x = normal(seed + 2, 1, 400, 64) / normal(seed + 3, 1, 400, 64).abs().sqrt()

    def error(norms: Tensor | None) -> float:
        mask = input_mask(input_score(x, norms), 32)
        return float(((x - x * mask) @ weight.T).norm(dim=-1).mean())

    assert error(column_norms(weight)) < error(None)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, level=st.sampled_from([0.25, 1.0, 8.0]))
def test_equal_columns_make_its_masks_those_of_input_magnitude(seed: int, level: float) -> None:
    x = normal(seed, 2, 9, 16)
    equal = torch.full((16,), level, dtype=torch.float64)
    assert torch.equal(input_mask(input_score(x, equal), 6), input_mask(input_score(x, None), 6))


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 250), keep=st.integers(0, 6))
def test_the_last_99_percent_of_tokens_keep_their_count_and_the_first_stay_dense(
    tokens: int, keep: int
) -> None:
    mask = input_mask(normal(tokens, 2, tokens, 6).abs(), keep)
    count = masked_tokens(tokens)
    assert count == (max(1, int(0.99 * tokens)))
    assert mask[:, : tokens - count].all()
    assert (mask[:, tokens - count :].sum(dim=-1) == keep).all()


def test_a_threshold_keeps_what_lies_above_it() -> None:
    scores = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    assert input_mask(scores, 0, threshold=1.0).tolist() == [[[False, False, True, True]]]


@settings(max_examples=20, deadline=None)
@given(seed=seeds, share=st.floats(0.02, 0.98))
def test_the_threshold_splits_the_scores_at_the_share(seed: int, share: float) -> None:
    scores = normal(seed, 3000).abs()
    histogram = ScoreHistogram()
    for part in scores.split(700):
        histogram.add(part)
    assert int(histogram.counts.sum()) == 3000
    assert float((scores <= histogram.quantile(share)).double().mean()) == pytest.approx(share, abs=2e-3)
    assert histogram.quantile(0) == 0


def test_a_histogram_without_scores_masks_nothing() -> None:
    assert ScoreHistogram().quantile(0.5) == 0


@pytest.mark.parametrize("mask_by", ["topk", "threshold"])
def test_at_sparsity_zero_the_output_is_the_dense_one(
    llama: LoadedModel, data: Calibration, tokens: Tensor, mask_by: str
) -> None:
    sparse = sparsify(llama, data, sparsity=0, mask_by=mask_by, transform=False)
    assert torch.equal(logits(sparse, tokens), logits(llama, tokens))
    assert sparse.facts["kept_share"] == pytest.approx(1, abs=1e-4)
    rotated = sparsify(llama, data, sparsity=0, mask_by=mask_by, subtract_embed_mean=False)
    torch.testing.assert_close(logits(rotated, tokens), logits(llama, tokens), rtol=1e-4, atol=1e-4)


def test_every_linear_keeps_its_count_per_token_and_the_facts_say_so(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    sparse = sparsify(llama, data, sparsity=0.4, transform=False)
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: seen.update({name: layer.mask(args[0])})
        )
        for name, layer in masked(sparse).items()
    ]
    logits(sparse, tokens)
    for handle in handles:
        handle.remove()
    for name, mask in seen.items():
        assert mask[:, :1].all(), name
        assert (mask[:, 1:].sum(dim=-1) == int(mask.shape[-1] * 0.6)).all(), name
    layers = masked(sparse).values()
    expected = sum(layer.weight.numel() * layer.keep / layer.in_features for layer in layers)
    assert sparse.facts["kept_share"] == pytest.approx(
        expected / sum(layer.weight.numel() for layer in layers), abs=1e-9
    )
    assert sparse.facts["positions"] == "last-99%"
    assert sparse.facts["kept_denominator"].startswith("inputs of the Linears inside the blocks")
    assert sparse.storage == "simulated"


def test_without_calibration_inputs_the_counts_are_the_same(llama: LoadedModel, data: Calibration) -> None:
    with_data, without = (sparsify(llama, d, sparsity=0.4, transform=False).facts for d in (data, None))
    assert with_data == pytest.approx(without)


def test_a_threshold_keeps_about_the_share_on_the_data_it_was_calibrated_on(
    llama: LoadedModel, data: Calibration
) -> None:
    sparse = sparsify(llama, data, sparsity=0.5, mask_by="threshold", transform=False)
    assert sparse.facts["kept_share"] == pytest.approx(0.5, abs=0.05)
    assert sparse.facts["kept_share_min"] < sparse.facts["kept_share_max"]
    thresholds = {layer.threshold for layer in masked(sparse).values()}
    assert None not in thresholds
    assert len(thresholds) > 8


def test_column_norms_go_where_the_code_or_the_paper_puts_them(llama: LoadedModel) -> None:
    code = masked(sparsify(llama, columns="code", transform=False))
    normed = {name.rpartition(".")[2] for name, layer in code.items() if layer.norms is not None}
    assert normed == {"k_proj", "gate_proj"}
    for layer in masked(sparsify(llama, columns="paper", transform=False)).values():
        assert layer.norms is not None
        torch.testing.assert_close(layer.norms, layer.weight.norm(dim=0))


def test_the_input_model_is_untouched_and_stays_tied(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    dense = logits(llama, tokens)
    sparse = sparsify(llama, data, sparsity=0.5)
    for name, tensor in llama.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(logits(llama, tokens), dense)
    assert llama.module.lm_head.weight is llama.module.model.embed_tokens.weight
    assert llama.module.config.tie_word_embeddings
    assert sparse.module.lm_head.weight is not sparse.module.model.embed_tokens.weight
    assert not sparse.module.config.tie_word_embeddings


def test_the_rotation_keeps_the_logits_and_makes_columns_of_k_and_gate_orthogonal(
    llama: LoadedModel, tokens: Tensor
) -> None:
    rotated = llama.clone()
    error = rotate(rotated, subtract_embed_mean=False)
    assert 0 < error < 1e-3
    torch.testing.assert_close(logits(rotated, tokens), logits(llama, tokens), rtol=1e-4, atol=1e-4)
    blocks = rotated.adapter.blocks(rotated.module)
    assert all(isinstance(block, RotatedBlock) for block in blocks)
    for block, dense in zip(blocks, llama.adapter.blocks(llama.module), strict=True):
        folded = dense.self_attn.k_proj.weight * dense.input_layernorm.weight
        norms = column_norms(block.self_attn.k_proj.weight)
        torch.testing.assert_close(norms[:16], torch.linalg.svdvals(folded), rtol=1e-4, atol=1e-5)
        assert (norms[16:] < 1e-5).all(), "grouped keys have as many columns as the keys are wide"
        for weight in (block.self_attn.k_proj.weight, block.mlp.gate_proj.weight):
            gram = weight.T @ weight
            off = gram - torch.diag(gram.diagonal())
            assert off.abs().max() < 1e-4 * gram.diagonal().max()
        assert torch.equal(block.input_layernorm.weight, torch.ones(32))


def test_centring_the_embeddings_changes_the_function(llama: LoadedModel, tokens: Tensor) -> None:
    centred = llama.clone()
    rotate(centred, subtract_embed_mean=True)
    assert (logits(centred, tokens) - logits(llama, tokens)).abs().max() > 1e-2


@settings(max_examples=15, deadline=None)
@given(seed=seeds, rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_right_singular_vectors_are_a_full_orthogonal_basis(seed: int, rows: int, columns: int) -> None:
    weight = normal(seed, rows, columns)
    basis = right_singular_vectors(weight)
    torch.testing.assert_close(basis.T @ basis, torch.eye(columns, dtype=torch.float64))
    gram = (weight @ basis).T @ (weight @ basis)
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-9, rtol=0)


def test_biases_are_rotated_with_the_residual_stream() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=True, mlp_bias=True))
    for module in (llama, Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))):
        module.eval().requires_grad_(False)
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        model = LoadedModel("biased", "causal-lm", module, detect(module))
        rotated = model.clone()
        assert rotate(rotated, subtract_embed_mean=False) < 1e-4
        tokens = torch.arange(10)[None]
        torch.testing.assert_close(logits(rotated, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_a_rotated_model_generates_with_its_cache_what_the_dense_one_does(llama: LoadedModel) -> None:
    rotated = llama.clone()
    rotate(rotated, subtract_embed_mean=False)
    prompt = torch.arange(5, 12)[None]
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = llama.module.generate(prompt, **options)
    assert torch.equal(rotated.module.generate(prompt, **options), expected)


def test_decoding_masks_every_token(llama: LoadedModel) -> None:
    sparse = sparsify(llama, sparsity=0.5, transform=False)
    layer = masked(sparse)["model.layers.0.mlp.down_proj"]
    token = torch.randn(1, 1, layer.in_features)
    assert int(layer.mask(token).sum()) == layer.in_features // 2
    routed = torch.randn(7, layer.in_features)
    assert (layer.mask(routed).sum(dim=-1) == layer.in_features // 2).all()


def test_a_decoder_of_another_shape_is_masked_but_not_rotated() -> None:
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48)
    module = OPTForCausalLM(config).eval().requires_grad_(False)
    model = LoadedModel("opt", "causal-lm", module, detect(module))
    with pytest.raises(NotApplicableError, match="opt cannot be rotated") as caught:
        sparsify(model, sparsity=0.5)
    assert "transform=false" in caught.value.hint
    sparse = sparsify(model, sparsity=0.5, transform=False)
    assert torch.isfinite(logits(sparse, torch.arange(8)[None])).all()


def test_a_block_that_computes_something_else_is_refused(llama: LoadedModel) -> None:
    class Doubled(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight = norm.weight
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * 2 + 1

    odd = llama.clone()
    for block in odd.adapter.blocks(odd.module):
        block.input_layernorm = Doubled(block.input_layernorm)
    with pytest.raises(NotApplicableError, match="its logits differ"):
        rotate(odd, subtract_embed_mean=False)


def test_thresholds_without_calibration_inputs_are_not_applicable(llama: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="calibration"):
        sparsify(llama, mask_by="threshold")


@pytest.mark.parametrize(
    ("passed", "field"),
    [({"sparsity": 1}, "sparsity"), ({"mask_by": "rank"}, "mask_by"), ({"columns": "q"}, "columns")],
)
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match=field):
        build(WINA, passed, "wina")
