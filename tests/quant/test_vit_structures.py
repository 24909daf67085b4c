"""Quantizers of vision transformers on structures beside the plain one: they work, or say why not."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_quant.vit.entries import METHODS

SIZE: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}

WINDOWS: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (2, 2),
    "window_size": 4,
    "num_classes": 5,
}


def loaded(build: Callable[[], nn.Module]) -> LoadedModel:
    torch.manual_seed(0)
    module = build()
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    module.eval().requires_grad_(False)
    return LoadedModel(type(module).__name__, "vit", module, detect(module))


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "class-token": lambda: VisionTransformer(**SIZE),
    "no-class-token": lambda: VisionTransformer(**SIZE, class_token=False, global_pool="avg"),
    "registers": lambda: VisionTransformer(**SIZE, reg_tokens=3),
    "distilled": lambda: VisionTransformerDistilled(**SIZE),
    "layer-scale": lambda: VisionTransformer(**SIZE, init_values=0.5),
    "qk-norm": lambda: VisionTransformer(**SIZE, qk_norm=True),
    "windows": lambda: SwinTransformer(**WINDOWS),
}


def method(name: str, bits: int | None = None, **changed: object) -> Any:
    """Return a method, with weights and activations of some bits where they are given, and other fields changed."""
    (entry,) = [entry for entry in METHODS if entry.name == name]
    module, _, attribute = entry.impl.partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    more: dict[str, Any] = {}
    if bits is not None and "target_bits" in entry_fields(kind):
        more = {"target_bits": bits, "product_bits": bits}
    elif bits is not None:
        more = {"w_bits": bits, "a_bits": bits}
    return kind(**{**entry.check_params, **more, **changed})


def entry_fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def images(count: int = 12) -> Calibration:
    return Calibration(torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


#: Attention on whole powers of two stays coarse at any number of bits.
COARSE = {"is-vit": 0.4}

#: Relevance has rules for one head and for blocks that follow one another.
REFUSED = {("lrp-qvit", "distilled"): "head alone", ("lrp-qvit", "windows"): "equal blocks"}

NAMES = [entry.name for entry in METHODS if "vit" in entry.applies_to]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_every_vision_transformer_can_be_quantized(name: str, structure: str) -> None:
    model = loaded(STRUCTURES[structure])
    if (name, structure) in REFUSED:
        with pytest.raises(NotApplicableError, match=REFUSED[name, structure]):
            method(name).compress(model, images(), Context())
        return
    quantized = method(name, bits=8).compress(model, images(), Context())
    with torch.no_grad():
        exact, found = model.module(images().inputs), quantized.module(images().inputs)
    assert found.shape == exact.shape
    assert float((found - exact).norm() / exact.norm()) < COARSE.get(name, 0.15)


@pytest.mark.parametrize("name", ["repq-vit", "is-vit"])
def test_padded_windows_are_refused_where_scales_are_folded(name: str) -> None:
    model = loaded(lambda: SwinTransformer(**{**WINDOWS, "img_size": 20, "strict_img_size": False}))
    pictures = Calibration(torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(NotApplicableError, match="padded windows"):
        method(name).compress(model, pictures, Context())


@pytest.mark.parametrize("name", NAMES)
def test_fused_attention_makes_no_difference(name: str) -> None:
    outputs = []
    for fused in (True, False):
        model = loaded(STRUCTURES["class-token"])
        for block in model.adapter.blocks(model.module):
            block.get_submodule("attn").fused_attn = fused
        # Learning rounds the last digits, in which the kernels of the float model differ, to other levels.
        unlearned = {"iterations": 0} if name == "is-vit" else {}
        quantized = method(name, bits=4, **unlearned).compress(model, images(), Context(seed=0))
        with torch.no_grad():
            outputs.append(quantized.module(images().inputs))
    first, second = outputs
    assert float((first - second).norm() / first.norm()) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_constant_pictures_and_single_ones_are_met_in_words(name: str) -> None:
    model = loaded(STRUCTURES["class-token"])
    ctx = Context()
    found = method(name).compress(model, images(1), ctx)
    assert torch.isfinite(found.module(images().inputs)).all()
    assert any("calibrated on 1 images" in warning for warning in ctx.warnings)
    try:
        flat = method(name).compress(model, Calibration(torch.zeros(4, 3, 16, 16)), Context())
    except DivergedError as error:
        assert "constant" in str(error) or "finite" in str(error)  # noqa: PT017
    else:
        assert torch.isfinite(flat.module(torch.zeros(2, 3, 16, 16))).all()
    with pytest.raises(NotApplicableError, match="calibration images"):
        method(name).compress(model, Calibration.none(), Context())
