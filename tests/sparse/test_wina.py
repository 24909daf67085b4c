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
from methodbench.torchkit.activation_sparsity import SparseInput, Threshold, TopK, forget, measured
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.rotation import RotatedBlock, right_singular_vectors, rotate
from methodbench_sparse.wina import WINA, ScoreHistogram, column_norms

seeds = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def sparsify(model: LoadedModel, data: Calibration | None = None, **hyper: Any) -> LoadedModel:
    return WINA(**hyper).compress(model, data or Calibration.none(), Context())


def masked(model: LoadedModel) -> dict[str, SparseInput]:
    found = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, SparseInput)}
    assert found.keys() == model.adapter.targets(model.module).keys()
    return found


def counted(model: LoadedModel, tokens: Tensor) -> dict[str, Any]:
    forget(model)
    logits(model, tokens)
    return measured(model)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, keep=st.integers(1, 7))
def test_with_orthogonal_columns_no_other_mask_of_its_size_errs_less(seed: int, keep: int) -> None:
    orthogonal = torch.linalg.qr(normal(seed, 12, 8)).Q
    weight = orthogonal * normal(seed + 1, 8).exp()
    x = normal(seed + 2, 8)

    def error(mask: Tensor) -> float:
        return float((weight @ x - weight @ (x * mask)).norm())

    chosen = TopK(keep, column_norms(weight))(x)
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
        mask = TopK(32, norms)(x)
        return float(((x - x * mask) @ weight.T).norm(dim=-1).mean())

    assert error(column_norms(weight)) < error(None)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, level=st.sampled_from([0.25, 1.0, 8.0]))
def test_equal_columns_make_its_masks_those_of_input_magnitude(seed: int, level: float) -> None:
    x = normal(seed, 2, 9, 16)
    equal = torch.full((16,), level, dtype=torch.float64)
    assert torch.equal(TopK(6, equal)(x), TopK(6)(x))


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
    rotated = sparsify(llama, data, sparsity=0, mask_by=mask_by, subtract_embed_mean=False)
    torch.testing.assert_close(logits(rotated, tokens), logits(llama, tokens), rtol=1e-4, atol=1e-4)


def test_every_linear_keeps_its_count_per_token_and_the_record_says_so(
    llama: LoadedModel, tokens: Tensor
) -> None:
    sparse = sparsify(llama, sparsity=0.4, transform=False)
    seen: dict[str, Tensor] = {}
    for name, layer in masked(sparse).items():
        layer.rule.register_forward_hook(lambda _, args, mask, name=name: seen.update({name: mask}))
    facts = counted(sparse, tokens)
    layers = masked(sparse)
    for name, mask in seen.items():
        assert mask.shape[:2] == (3, 39), "the first of forty tokens stays dense"
        assert (mask.sum(dim=-1) == int(mask.shape[-1] * 0.6)).all(), name
    kept = {name: int(layer.in_features * 0.6) / layer.in_features for name, layer in layers.items()}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    expected = 1 - sum(kept[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert facts["sparsity_model"] == pytest.approx(expected, abs=1e-9)
    assert facts["sparsity_touched_tokens"] == pytest.approx(39 / 40)
    assert facts["sparsity_inputs"].keys() == {"q", "k", "v", "o", "gate", "up", "down"}
    assert facts["positions"] == "last-99%"
    assert facts["sparsity_denominator"].startswith("weights of the Linears inside the blocks")
    assert sparse.storage == "simulated"


def test_thresholds_keep_about_the_share_and_differ_between_linears(
    llama: LoadedModel, data: Calibration
) -> None:
    sparse = sparsify(llama, data, sparsity=0.5, mask_by="threshold", transform=False)
    assert counted(sparse, data.inputs)["sparsity_model"] == pytest.approx(0.5, abs=0.05)
    rules = [layer.rule for layer in masked(sparse).values()]
    assert all(isinstance(rule, Threshold) for rule in rules)
    assert len({float(rule.threshold) for rule in rules}) > 8


def test_the_search_gives_linears_different_shares_of_the_same_sparsity(
    llama: LoadedModel, data: Calibration, tokens: Tensor
) -> None:
    sparse = sparsify(llama, data, sparsity=0.5, greedy=True, base_step=0.1, transform=False, positions="all")
    facts = counted(sparse, tokens)
    assert facts["sparsity_model"] == pytest.approx(0.5, abs=0.05)
    assert max(facts["sparsity_inputs"].values()) - min(facts["sparsity_inputs"].values()) > 0.1


def test_column_norms_go_where_the_code_or_the_paper_puts_them(llama: LoadedModel) -> None:
    code = masked(sparsify(llama, columns="code", transform=False))
    normed = {name.rpartition(".")[2] for name, layer in code.items() if layer.rule.scale is not None}
    assert normed == {"k_proj", "gate_proj"}
    for layer in masked(sparsify(llama, columns="paper", transform=False)).values():
        torch.testing.assert_close(layer.rule.scale, layer.weight.norm(dim=0))


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
