"""Neuron Path against the authors' code, on a tiny transformer rebuilt from their weights."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.neuron_path import (
    class_logits,
    class_token_activations,
    greedy_path,
    joint_attribution,
    scaled,
)

pytestmark = pytest.mark.vectors("vision", "neuron_path")


def renamed(vectors: Vectors, layers: int) -> dict[str, Tensor]:
    """The authors' weights under timm's names; their three projections become one layer."""

    def get(name: str) -> Tensor:
        return vectors.tensor(f"w.{name}")

    embeddings = "transformer.embeddings"
    state = {
        "cls_token": get(f"{embeddings}.cls_token"),
        "pos_embed": get(f"{embeddings}.position_embeddings"),
    }
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = get(f"{embeddings}.patch_embeddings.{part}")
        state[f"norm.{part}"] = get(f"transformer.encoder.encoder_norm.{part}")
        state[f"head.{part}"] = get(f"head.{part}")
        for layer in range(layers):
            theirs, ours = f"transformer.encoder.layer.{layer}", f"blocks.{layer}"
            state[f"{ours}.norm1.{part}"] = get(f"{theirs}.attention_norm.{part}")
            state[f"{ours}.norm2.{part}"] = get(f"{theirs}.ffn_norm.{part}")
            state[f"{ours}.mlp.fc1.{part}"] = get(f"{theirs}.ffn.fc1.{part}")
            state[f"{ours}.mlp.fc2.{part}"] = get(f"{theirs}.ffn.fc2.{part}")
            state[f"{ours}.attn.proj.{part}"] = get(f"{theirs}.attn.out.{part}")
            state[f"{ours}.attn.qkv.{part}"] = torch.cat(
                [get(f"{theirs}.attn.{name}.{part}") for name in ("query", "key", "value")]
            )
    return state


@pytest.fixture
def model(vectors: Vectors) -> LoadedModel:
    config = vectors.meta["config"]
    module = timm.models.VisionTransformer(
        img_size=config["img"],
        patch_size=config["patch"],
        embed_dim=config["hidden"],
        depth=config["layers"],
        num_heads=config["heads"],
        mlp_ratio=config["mlp"] / config["hidden"],
        num_classes=config["classes"],
    )
    module.load_state_dict(renamed(vectors, config["layers"]))
    return LoadedModel("neuron-net", "vit", module.eval(), detect(module))


def test_scores_paths_and_interventions_equal_the_reference(
    vectors: Vectors, model: LoadedModel, tolerance: float
) -> None:
    x = vectors.tensor("x", torch.float32)
    label = torch.full((len(x),), int(vectors["label"]))
    steps = vectors.meta["m"]

    def check(ours: Tensor, key: str) -> None:
        theirs = vectors.tensor(key)
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance, msg=key)

    check(class_logits(model, x), "logits")
    hidden = class_token_activations(model, x)
    check(torch.stack(hidden), "ffn_cls")
    path, scores = greedy_path(model, x, label, hidden, steps)
    check(torch.stack(scores), "ja")
    assert torch.equal(path, vectors.tensor("path"))
    check(joint_attribution(model, x, label, hidden, path, steps)[:, None], "jas")
    base = torch.stack([activation.argmax(1) for activation in hidden])
    assert torch.equal(base, vectors.tensor("base_path"))
    check(joint_attribution(model, x, label, hidden, base, steps)[:, None], "base_jas")
    check(class_logits(model, x, scaled(path, 0.0)), "logits_remove")
    check(class_logits(model, x, scaled(path, 2.0)), "logits_enhance")
