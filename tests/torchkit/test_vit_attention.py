"""Explicit attention computes what timm's attention computes, and shows its products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.vit_attention import (
    ExplicitAttention,
    MatMul,
    explicit_attention,
    recorded_attention,
    use_explicit_attention,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"qkv_bias": False, "proj_bias": False},
    "norms": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True},
    "wide-heads": {"attn_head_dim": 12},
}


def random_attention(variant: str) -> Attention:
    torch.manual_seed(0)
    try:
        attention = Attention(24, num_heads=3, **{"qkv_bias": True, **VARIANTS[variant]})
    except TypeError as error:
        pytest.skip(f"this timm has no such attention: {error}")
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention.eval().requires_grad_(False)


def masks() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(7, 7, generator=generator) < 0.6
    seen.fill_diagonal_(True)
    return {
        "none": {},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": torch.randn(7, 7, generator=generator)},
        "causal": {"is_causal": True},
    }


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_output_is_that_of_the_fused_attention(variant: str, mask: str) -> None:
    attention = random_attention(variant)
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))
    options = masks()[mask]
    torch.testing.assert_close(
        explicit_attention(attention)(x, **options), attention(x, **options), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("windows", [0, 4])
def test_window_attention_has_its_bias_and_its_mask(windows: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(24, num_heads=3, window_size=2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    attention.eval().requires_grad_(False)
    x = torch.randn(8, 4, 24, generator=torch.Generator().manual_seed(2))
    mask = None
    if windows:
        hidden = torch.rand(windows, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.3
        mask = torch.zeros(windows, 4, 4).masked_fill(hidden, -100.0)
    explicit = explicit_attention(attention)
    torch.testing.assert_close(explicit(x, mask), attention(x, mask), rtol=1e-4, atol=1e-5)
    assert sorted(explicit.state_dict()) == sorted(attention.state_dict())


def test_a_windowed_model_keeps_its_function_and_shows_its_structure() -> None:
    torch.manual_seed(0)
    module = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=5
    )
    module.eval().requires_grad_(False)
    adapter, x = detect(module), torch.randn(2, 3, 32, 32)
    expected = module(x)
    with pytest.raises(NotApplicableError, match="within windows"), recorded_attention(module, adapter):
        pass
    replaced = use_explicit_attention(module, adapter)
    assert list(replaced) == [f"layers.{i}.blocks.{j}.attn" for i in range(2) for j in range(2)]
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert adapter.head(module) is module.head.fc
    assert adapter.merging_norms == (("layers.1.downsample.norm", "layers.1.downsample.reduction"),)
    assert adapter.patch_grid(module) is None


def test_products_see_queries_keys_probabilities_and_values() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Recorder(MatMul):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            seen.append((a, b))
            return super().forward(a, b)

    attention = explicit_attention(random_attention("plain"))
    attention.matmul1, attention.matmul2 = Recorder(), Recorder()
    x = torch.randn(2, 7, 24)
    attention(x)
    (q, k), (probabilities, v) = seen
    expected = attention.qkv(x).reshape(2, 7, 3, 3, 8)
    torch.testing.assert_close(q, expected[:, :, 0].transpose(1, 2))
    torch.testing.assert_close(k, expected[:, :, 1].permute(0, 2, 3, 1))
    torch.testing.assert_close(v, expected[:, :, 2].transpose(1, 2))
    assert probabilities.shape == (2, 3, 7, 7)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 7))


def test_every_block_of_a_model_is_changed_and_its_state_dict_is_not() -> None:
    torch.manual_seed(0)
    module = VisionTransformer(img_size=8, patch_size=4, embed_dim=24, num_heads=3, depth=2, num_classes=5)
    module.eval().requires_grad_(False)
    x, before = torch.randn(2, 3, 8, 8), list(module.state_dict())
    expected = module(x)
    replaced = use_explicit_attention(module, detect(module))
    assert list(replaced) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(isinstance(module.get_submodule(name), ExplicitAttention) for name in replaced)
    assert sorted(module.state_dict()) == sorted(before)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


class Cosine(Attention):
    """Has the parts of plain attention and another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.nn.functional.normalize(x, dim=-1))


@pytest.mark.parametrize(
    "attention",
    [
        BeitAttention(24, num_heads=3, window_size=(2, 2)),
        Cosine(24, num_heads=3),
        nn.MultiheadAttention(24, 3),
    ],
    ids=lambda attention: type(attention).__name__,
)
def test_attention_of_another_kind_is_refused_by_name(attention: nn.Module) -> None:
    with pytest.raises(NotApplicableError, match=rf"blocks\.0\.attn \({type(attention).__name__}\)"):
        explicit_attention(attention.eval(), "blocks.0.attn")
