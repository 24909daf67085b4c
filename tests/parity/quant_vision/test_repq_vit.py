"""RepQ-ViT against the authors' code: quantizers, one folding, and a tiny ViT from images to logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.vit.repq_vit import (
    RepQViT,
    fold_channels,
    log_sqrt2,
    reparameterize,
    search_log_sqrt2,
    search_uniform,
)
from methodbench_quant.vit.sites import Uniform

pytestmark = pytest.mark.vectors("quant_vision", "repq_vit")

PERCENTILES = RepQViT().percentiles

#: Names of quantizers in the authors' code and here.
NAMES = (("quantizer_A", "left"), ("quantizer_B", "right"), (".delta", ".scale"), (".zp", ".zero"))


def close(actual: Tensor, vectors: Vectors, name: str) -> None:
    tolerance = vectors.meta["tolerance"]
    expected = vectors.tensor(name)
    torch.testing.assert_close(
        actual.reshape(expected.shape), expected, rtol=tolerance["rtol"], atol=tolerance["atol"]
    )


def bound(vectors: Vectors, name: str, pattern: str) -> float:
    """A number out of the sentence in which the vectors state a tolerance."""
    return stated_by(vectors.meta["tolerance"][name], pattern)


def check_quantizer(grouped: Tensor, layout: Any, vectors: Vectors, prefix: str, bits: int) -> None:
    """Compare the grid of ``grouped`` [groups, n] and its levels, put back by ``layout``."""
    grid = search_uniform(grouped, bits, PERCENTILES)
    assert grid.zero is not None
    close(grid.scale, vectors, f"{prefix}_delta")
    close(grid.zero, vectors, f"{prefix}_zp")
    close(layout(grid.snap(grouped)), vectors, f"{prefix}_y")


def test_per_tensor_quantizer_is_the_authors(vectors: Vectors) -> None:
    x = vectors.tensor("x")
    check_quantizer(x.flatten(), lambda y: y.view_as(x), vectors, "u", vectors.meta["a_bits"])


def test_per_channel_quantizer_is_the_authors(vectors: Vectors) -> None:
    x = vectors.tensor("x")
    grouped = x.flatten(0, -2).T
    check_quantizer(grouped, lambda y: y.T.reshape(x.shape), vectors, "uc", vectors.meta["a_bits"])


@pytest.mark.parametrize("name", ["w", "cw"])
def test_weight_quantizers_of_linears_and_convolutions_are_the_authors(vectors: Vectors, name: str) -> None:
    weight = vectors.tensor(name)
    grouped = weight.flatten(1)
    check_quantizer(grouped, lambda y: y.view_as(weight), vectors, name, vectors.meta["w_bits"])


def test_log_sqrt2_quantizer_is_the_authors(vectors: Vectors) -> None:
    x, bits = vectors.tensor("attn"), vectors.meta["a_bits"]
    scale = search_log_sqrt2(x, bits, PERCENTILES)
    close(scale, vectors, "ls2_delta")
    close(log_sqrt2(x, scale, bits), vectors, "ls2_y")


def test_folding_of_one_layernorm_is_the_authors(vectors: Vectors) -> None:
    norm = nn.LayerNorm(len(vectors["rp_ln_w"]))
    linear = nn.Linear(*reversed(vectors["rp_w"].shape))
    norm.weight, norm.bias = nn.Parameter(vectors.tensor("rp_ln_w")), nn.Parameter(vectors.tensor("rp_ln_b"))
    linear.weight, linear.bias = nn.Parameter(vectors.tensor("rp_w")), nn.Parameter(vectors.tensor("rp_b"))
    folded = reparameterize(norm, linear, vectors.tensor("rp_act_delta"), vectors.tensor("rp_act_zp"))
    close(folded.scale, vectors, "rp_target_delta")
    close(folded.zero, vectors, "rp_target_zp")
    close(folded.ratio, vectors, "rp_r")
    close(folded.shift, vectors, "rp_shift")
    close(folded.gamma, vectors, "rp_ln_w_new")
    close(folded.beta, vectors, "rp_ln_b_new")
    close(folded.weight, vectors, "rp_w_new")
    close(folded.bias, vectors, "rp_b_new")


@pytest.fixture
def model(vectors: Vectors) -> LoadedModel:
    size = vectors.meta["tiny_vit"]
    module = VisionTransformer(
        img_size=size["img"],
        patch_size=size["p"],
        embed_dim=size["d"],
        num_heads=size["h"],
        mlp_ratio=size["r"],
        depth=size["depth"],
        num_classes=size["nc"],
    )
    module.load_state_dict(
        {name.removeprefix("sd::"): vectors.tensor(name) for name in vectors if name.startswith("sd::")}
    )
    module.eval().requires_grad_(False)
    return LoadedModel("tiny", "vit", module, detect(module))


@pytest.fixture
def method(vectors: Vectors) -> RepQViT:
    meta = vectors.meta
    return RepQViT(w_bits=meta["w_bits"], a_bits=meta["a_bits"], calibration_images=len(vectors["calib"]))


@pytest.fixture
def images(vectors: Vectors) -> Calibration:
    return Calibration(vectors.tensor("calib"))


def check_logits(module: nn.Module, vectors: Vectors, name: str) -> None:
    with torch.no_grad():
        difference = module(vectors.tensor("test")) - vectors.tensor(name)
    assert float(difference.abs().mean()) < bound(vectors, "q_logits", r"below ([\d.e-]+)")


def test_float_logits_are_the_authors(vectors: Vectors, model: LoadedModel) -> None:
    with torch.no_grad():
        close(model.module(vectors.tensor("test")), vectors, "fp_logits")


def test_logits_before_reparameterization_are_the_authors(
    vectors: Vectors, model: LoadedModel, method: RepQViT, images: Calibration
) -> None:
    draft = method.calibrate(model, images, Context())
    check_logits(draft.model.module, vectors, "q_logits_before_reparam")


def test_logits_after_reparameterization_are_the_authors(
    vectors: Vectors, model: LoadedModel, method: RepQViT, images: Calibration
) -> None:
    draft = method.calibrate(model, images, Context())
    fold_channels(draft, model, draft.requantize)
    check_logits(draft.model.module, vectors, "q_logits_after_reparam")


def test_packing_keeps_the_authors_logits(
    vectors: Vectors, model: LoadedModel, method: RepQViT, images: Calibration
) -> None:
    compressed = method.compress(model, images, Context())
    check_logits(compressed.module, vectors, "q_logits_after_reparam")


def test_every_scale_of_the_finished_model_is_the_authors(
    vectors: Vectors, model: LoadedModel, method: RepQViT, images: Calibration
) -> None:
    rtol = bound(vectors, "compare_quantizer_state", r"rtol ([\d.e-]+)")
    module = method.compress(model, images, Context()).module
    state = module.state_dict()
    expected = {name for name in vectors if name.startswith("q::")}
    grids = sum(2 if isinstance(m, Uniform) else hasattr(m, "scale") for m in _quantizers(module))
    assert len(expected) == grids
    for name in expected:
        ours = name.removeprefix("q::")
        for theirs, here in NAMES:
            ours = ours.replace(theirs, here)
        torch.testing.assert_close(
            state[ours], vectors.tensor(name), rtol=rtol, atol=vectors.meta["tolerance"]["atol"], msg=name
        )


def _quantizers(module: nn.Module) -> list[nn.Module]:
    names = ("input_quantizer", "left", "right")
    return [m for name, m in module.named_modules() if name.rpartition(".")[2] in names]
