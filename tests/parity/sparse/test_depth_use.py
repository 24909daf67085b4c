"""Depth use against a reference of the authors' formulas, on a tiny random decoder."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_sparse.depth_use import Stack, contributions

pytestmark = pytest.mark.vectors("sparse", "depth_use")

NAMES = {
    "contribution-attention": "rel_att",
    "contribution-mlp": "rel_mlp",
    "contribution-layer": "rel_layer",
    "cosine-attention": "cos_att",
    "cosine-mlp": "cos_mlp",
    "cosine-layer": "cos_layer",
    "cosine-stream": "cos_io",
}


@pytest.fixture
def stack(vectors: Vectors) -> Stack:
    hyper = vectors.meta["hyper"]
    config = LlamaConfig(
        vocab_size=hyper["vocab"],
        hidden_size=hyper["hidden"],
        intermediate_size=hyper["intermediate"],
        num_hidden_layers=hyper["layers"],
        num_attention_heads=hyper["heads"],
        rms_norm_eps=hyper["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": hyper["rope_theta"]},
        tie_word_embeddings=False,
        use_cache=False,
    )
    module = LlamaForCausalLM(config).eval()
    state = {
        key.removeprefix("p__").replace("__", "."): vectors.tensor(key)
        for key in vectors
        if key.startswith("p__")
    }
    module.load_state_dict(state, strict=True)
    return Stack(LoadedModel("toy", "causal-lm", module, detect(module)))


def close(found: torch.Tensor, vectors: Vectors, name: str) -> None:
    rtol, atol = (stated_by(vectors.meta["tolerance"], rf"{kind} ([\d.e-]+)") for kind in ("rtol", "atol"))
    torch.testing.assert_close(
        found, vectors.tensor(name), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def test_contributions_and_the_lens_equal_the_reference(vectors: Vectors, stack: Stack) -> None:
    trace = stack.run(vectors.tensor("ids"))
    close(trace.logits, vectors, "logits")
    stack.check(trace)
    for ours, theirs in NAMES.items():
        close(contributions(trace)[ours], vectors, theirs)
    lens = stack.lens(trace, vectors.meta["hyper"]["K"])
    close(lens["lens-kl"], vectors, "lens_kl")
    close(lens["lens-overlap"], vectors, "lens_top5")


@pytest.mark.parametrize("part", ["layer", "mlp", "attention"])
def test_skip_effects_equal_the_reference(vectors: Vectors, stack: Stack, part: str) -> None:
    hyper = vectors.meta["hyper"]
    ids = vectors.tensor("ids")
    trace = stack.run(ids)
    cuts = {f"i{index}": cut for index, cut in enumerate(hyper["t_values"])} | {"all": None}
    for name, cut in cuts.items():
        effects, outputs = stack.skip_effects(ids, trace, part, [cut], hyper["no_skip_front"])  # type: ignore[arg-type]
        close(effects, vectors, f"effect_{part}_{name}")
        close(outputs, vectors, f"out_effect_{part}_{name}")
