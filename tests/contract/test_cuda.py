"""Every compressor on a GPU: what is written for a CPU alone shows here."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from methodbench.catalog import load_catalog, load_implementation
from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import build
from methodbench.protocols import Oracle
from methodbench.testing import planted
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import decoding, materialized

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

_COMPRESSORS = sorted(
    (method.name, kind)
    for method in load_catalog().methods.values()
    if method.kind == "compressor"
    for kind in ("llama", "mixture")
)


def _of_images(what: str) -> list[tuple[str, str]]:
    """Return the methods of a kind that apply to image models, and the kinds of these."""
    return sorted(
        (method.name, kind)
        for method in load_catalog().methods.values()
        if method.kind == what
        for kind in ("vit", "cnn")
        if {"*", kind} & set(method.applies_to)
    )


def tiny(kind: str) -> LoadedModel:
    """Return a random decoder on the GPU, of widths that every default group size divides."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = hf.LlamaConfig(**sizes) if kind == "llama" else hf.MixtralConfig(**sizes, num_local_experts=4)
    torch.manual_seed(0)
    module = hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).cuda()
    return LoadedModel(kind, "causal-lm", module, detect(module))


@pytest.mark.parametrize(("name", "kind"), _COMPRESSORS)
def test_compressor_runs_on_a_gpu(name, kind):
    generator = torch.Generator().manual_seed(1)
    data = Calibration(torch.randint(128, (16, 64), generator=generator), "random tokens")
    method = build(load_implementation(load_catalog().methods[name].impl), {}, name)
    torch.manual_seed(0)
    try:
        compressed = method.compress(tiny(kind), data, Context(device="cuda"))
    except NotApplicableError as error:
        pytest.skip(error.message)
    ids = torch.randint(128, (1, 32), generator=generator).cuda()
    with torch.no_grad(), materialized(compressed.module):
        logits = compressed.module(ids).logits
    assert logits.is_cuda
    assert bool(torch.isfinite(logits).all())
    with torch.no_grad(), decoding(compressed.module):
        one = compressed.module(ids[:1, :1]).logits
    assert bool(torch.isfinite(one).all())


@pytest.mark.parametrize(("name", "kind"), _of_images("compressor"))
def test_compressor_of_images_runs_on_a_gpu(name, kind):
    entry = load_catalog().methods[name]
    method = build(load_implementation(entry.impl), dict(entry.check_params), name)
    model, data = planted.build(kind), planted.inputs(kind, 16, 1)
    model.module.cuda()
    try:
        compressed = method.compress(model, data, Context(device="cuda"))
    except NotApplicableError as error:
        pytest.skip(error.message)
    y = planted.output(compressed.module, data.inputs.cuda())
    assert y.is_cuda
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize(("name", "kind"), _of_images("explainer"))
def test_explainer_runs_on_a_gpu(name, kind):
    entry = load_catalog().methods[name]
    method = build(load_implementation(entry.impl), dict(entry.check_params), name)
    model = planted.build(kind)
    model.module.cuda()
    seen = planted.evidence_images(4, 1)
    try:
        if isinstance(method, Oracle):
            maps = method.explain_known(seen.masks.cuda())
        else:
            maps = method.explain(model, seen.images.cuda(), seen.labels.cuda())
    except NotApplicableError as error:
        pytest.skip(error.message)
    assert maps.shape == (4, *seen.images.shape[2:])
    assert bool(torch.isfinite(maps).all())


@pytest.mark.parametrize("variant", ["centered", "paper"])
@pytest.mark.parametrize("sign", ["raw", "flip", "corr"])
def test_principal_components_on_a_gpu_are_those_of_the_processor(variant, sign):
    from methodbench_vision.eigen_cam import first_projection

    maps = torch.rand(6, 24, 5, 4, generator=torch.Generator().manual_seed(0)) ** 4
    expected = first_projection(maps, variant, sign)
    torch.testing.assert_close(
        first_projection(maps.cuda(), variant, sign).cpu(), expected, atol=1e-4, rtol=1e-4
    )
