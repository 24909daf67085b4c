"""WINA against the authors' code: masks, thresholds, and the rotation of a toy decoder."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.activation_sparsity import Site, SparseInput, Threshold, TopK, dense_tokens, score
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_sparse.rotation import rotate
from methodbench_sparse.wina import ScoreHistogram, column_norms

pytestmark = pytest.mark.vectors("sparse", "wina")


def limit(vectors: Vectors, pattern: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], pattern + r" ([\d.e-]+)")


def masked_linear(vectors: Vectors, rule: nn.Module) -> SparseInput:
    weight = vectors.tensor("W")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return SparseInput(linear, rule, Site("input", "last-99%", {"": 1.0}))


def topk(vectors: Vectors, sparsity: float) -> TopK:
    weight = vectors.tensor("W")
    return TopK(int(weight.shape[1] * (1 - sparsity)), column_norms(weight))


def whole_mask(rule: nn.Module, x: Tensor) -> Tensor:
    """The mask of all tokens: True for those at the start that stay dense."""
    mask = torch.ones_like(x, dtype=torch.bool)
    first = dense_tokens("last-99%", x.shape[1])
    mask[:, first:] = rule(x[:, first:])
    return mask


def test_column_norms_equal_the_reference(vectors: Vectors) -> None:
    torch.testing.assert_close(column_norms(vectors.tensor("W")), vectors.tensor("c"))


def test_topk_masks_and_outputs_equal_the_reference_at_every_sparsity(vectors: Vectors) -> None:
    x = vectors.tensor("x")
    for index, sparsity in enumerate(vectors["ss"].tolist()):
        rule = topk(vectors, sparsity)
        expected = vectors.tensor(f"topk_mask_{index}").bool()
        got = whole_mask(rule, x)
        assert_equal_up_to_ties(got, expected, score(x, rule.scale))
        assert torch.equal(got.sum(dim=-1), expected.sum(dim=-1))
        same = (got == expected).all(dim=-1)
        got_y = masked_linear(vectors, rule)(x)
        torch.testing.assert_close(got_y[same], vectors.tensor(f"topk_y_{index}")[same])


def test_a_single_token_is_masked_as_in_the_reference(vectors: Vectors) -> None:
    token = vectors.tensor("x")[:, :1]
    for index, sparsity in enumerate(vectors["ss"].tolist()):
        expected = vectors.tensor(f"topk_mask_tok_{index}").bool()
        rule = topk(vectors, sparsity)
        assert_equal_up_to_ties(whole_mask(rule, token), expected, score(token, rule.scale))


def test_thresholds_equal_the_reference_at_every_sparsity(vectors: Vectors) -> None:
    histogram = ScoreHistogram()
    for part in vectors.tensor("score_calib").abs().split(7):
        histogram.add(part)
    got = [histogram.quantile(sparsity) for sparsity in vectors["ss"].tolist()]
    expected = vectors["thresholds"].tolist()
    assert got == pytest.approx(expected, rel=limit(vectors, "thresholds rtol"))


def test_threshold_mask_equals_the_reference(vectors: Vectors) -> None:
    x, threshold = vectors.tensor("x"), float(vectors["thresholds"][1])
    rule = Threshold(threshold, column_norms(vectors.tensor("W")))
    clear = (score(x, rule.scale) - threshold).abs() > limit(vectors, "thresholds rtol") * threshold
    clear[:, : dense_tokens("last-99%", x.shape[1])] = True
    assert clear.float().mean() > 0.9
    assert torch.equal(whole_mask(rule, x)[clear], vectors.tensor("thr_mask").bool()[clear])


def assert_equal_up_to_ties(got: Tensor, expected: Tensor, scores: Tensor) -> None:
    for token in (got != expected).any(dim=-1).nonzero():
        where = tuple(token.tolist())
        differing = scores[where][got[where] != expected[where]]
        assert differing.max() - differing.min() <= torch.finfo(scores.dtype).eps * 8 * differing.max(), (
            f"masks differ at {where}"
        )


class RMSNorm(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Causal attention with ``heads`` queries on ``kv_heads`` keys, without positions."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        def split(x: Tensor, heads: int) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2).repeat_interleave(self.heads // heads, dim=1)

        q = split(self.q_proj(hidden_states), self.heads)
        k = split(self.k_proj(hidden_states), self.kv_heads)
        v = split(self.v_proj(hidden_states), self.kv_heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None


class MLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """``meta["toy"]``: pre-norm attention and gated MLP."""

    def __init__(self, heads: int, kv_heads: int, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(tensors.pop("g1"))
        self.self_attn = Attention(heads, kv_heads)
        self.post_attention_layernorm = RMSNorm(tensors.pop("g2"))
        self.mlp = MLP()
        for name, weight in tensors.items():
            owner = self.self_attn if name[0] in "qkvo" else self.mlp
            owner.add_module(name, linear(weight))

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = hidden_states + self.self_attn(self.input_layernorm(hidden_states))[0]
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, embedding: Tensor, blocks: list[Block], gain: Tensor, head: Tensor) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(embedding)
        self.model.layers = nn.ModuleList(blocks)
        self.model.norm = RMSNorm(gain)
        self.lm_head = linear(head)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            x = block(x)
        return self.lm_head(self.model.norm(x))


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.fixture
def decoder(vectors: Vectors) -> LoadedModel:
    blocks: dict[int, dict[str, Tensor]] = {}
    for key in vectors:
        match = re.fullmatch(r"tr_block(\d+)_(\w+)", key)
        if match and not match[2].endswith("_norms"):
            blocks.setdefault(int(match[1]), {})[match[2]] = vectors.tensor(key)
    heads = vectors.meta["hyper"]["nh"], vectors.meta["hyper"]["nkv"]
    module = Decoder(
        vectors.tensor("tr_E"),
        [Block(*heads, blocks[index]) for index in sorted(blocks)],
        vectors.tensor("tr_g"),
        vectors.tensor("tr_H"),
    ).eval()
    return LoadedModel("toy", "causal-lm", module, detect(module))


def logits(model: LoadedModel, vectors: Vectors) -> Tensor:
    with torch.no_grad():
        return model.module(vectors.tensor("tr_ids")[None])[0]


def test_the_toy_decoder_is_the_one_of_the_vectors(vectors: Vectors, decoder: LoadedModel) -> None:
    expected = vectors.tensor("logits_original")
    torch.testing.assert_close(logits(decoder, vectors), expected, rtol=0, atol=limit(vectors, "atol"))


def test_rotated_logits_and_norms_equal_the_reference(vectors: Vectors, decoder: LoadedModel) -> None:
    before = logits(decoder, vectors)
    rotated = decoder.clone()
    rotate(rotated, subtract_embed_mean=True)
    expected = vectors.tensor("logits_transformed")
    torch.testing.assert_close(logits(rotated, vectors), expected, rtol=0, atol=limit(vectors, "atol"))
    for index, block in enumerate(rotated.adapter.blocks(rotated.module)):
        for key, layer in (("k_norms", block.self_attn.k_proj), ("gate_norms", block.mlp.gate_proj)):
            expected = vectors.tensor(f"tr_block{index}_{key}")
            # Beyond the rank of a weight a norm is zero but for rounding, of which each library has its own.
            rounding = len(expected) * torch.finfo(expected.dtype).eps * float(expected.max())
            torch.testing.assert_close(
                column_norms(layer.weight), expected, rtol=limit(vectors, "norms rtol"), atol=rounding
            )
    assert torch.equal(logits(decoder, vectors), before)


def test_without_mean_subtraction_the_rotation_keeps_the_logits(
    vectors: Vectors, decoder: LoadedModel
) -> None:
    rotated = decoder.clone()
    rotate(rotated, subtract_embed_mean=False)
    torch.testing.assert_close(
        logits(rotated, vectors), vectors.tensor("logits_original"), rtol=0, atol=limit(vectors, "atol")
    )
