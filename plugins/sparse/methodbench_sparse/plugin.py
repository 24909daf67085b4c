"""Entries of the sparse family: pruned weights and sparse activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from methodbench.entries import Family, Method, Paper, SuiteFile
from methodbench.hookspecs import hookimpl

_WANDA_CODE = "locuslab/wanda@8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6"

_PRUNING_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "s30": {"sparsity": 0.3},
    "s50": {"sparsity": 0.5},
    "s70": {"sparsity": 0.7},
    "s50-2of4": {"sparsity": 0.5, "pattern": "2:4"},
    "s50-4of8": {"sparsity": 0.5, "pattern": "4:8"},
}
#: Sparsity of the inputs of all Linears in the blocks, which is the model-level sparsity.
_INPUT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "s25": {"sparsity": 0.25},
    "s40": {"sparsity": 0.4},
    "s50": {"sparsity": 0.5},
    "s65": {"sparsity": 0.65},
}
#: Model-level sparsity of methods that touch a part of the Linears.
_MODEL_PRESETS: Mapping[str, Mapping[str, Any]] = {
    name: {**values, "counted": "model"} for name, values in _INPUT_PRESETS.items()
}


@hookimpl
def methodbench_families() -> list[Family]:
    return [
        Family(
            name="sparse",
            title="Sparsity",
            summary="Weights and activations set to zero: what a model does with a part of its products.",
        )
    ]


@hookimpl
def methodbench_methods() -> list[Method]:
    return [
        Method(
            name="magnitude",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.magnitude:Magnitude",
            summary="Zeroes the weights of smallest absolute value, without data.",
            applies_to=("causal-lm", "vit", "cnn", "sentence-encoder"),
            paper=Paper(
                title="Learning both Weights and Connections for Efficient Neural Networks",
                arxiv="1506.02626",
                venue="NIPS",
                year=2015,
                authors="Song Han and Jeff Pool and John Tran and William J. Dally",
            ),
            presets={
                **_PRUNING_PRESETS,
                "s50-rows": {"sparsity": 0.5, "scope": "per-row"},
                "s50-global": {"sparsity": 0.5, "scope": "global"},
            },
            claims="magnitude.toml",
            fidelity="reimplementation",
            parity=_WANDA_CODE,
            vectors=("sparse/magnitude",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0",
                "exact-sparsity:sparsity",
                "monotone:-sparsity",
                "idempotent",
                "scale-equivariant",
                "channel-permutation-equivariant",
                "channel-permutation-equivariant:in",
                "batch-split-invariant",
                "dtype-stable",
            ),
        ),
        Method(
            name="wanda",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.wanda:Wanda",
            summary="Zeroes, in every row, the weights of lowest magnitude times input norm.",
            applies_to=("causal-lm", "vit"),
            paper=Paper(
                title="A Simple and Effective Pruning Approach for Large Language Models",
                arxiv="2306.11695",
                venue="ICLR",
                year=2024,
                authors="Mingjie Sun and Zhuang Liu and Anna Bair and J. Zico Kolter",
                code="locuslab/wanda",
            ),
            needs=("calibration",),
            presets={**_PRUNING_PRESETS, "s50-variant": {"sparsity": 0.5, "use_variant": True}},
            claims="wanda.toml",
            fidelity="authors-code",
            parity=_WANDA_CODE,
            vectors=("sparse/wanda",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0",
                "exact-sparsity:sparsity",
                "monotone:-sparsity",
                "idempotent",
                "scale-equivariant",
                "channel-permutation-equivariant",
                "channel-permutation-equivariant:in",
                "batch-split-invariant",
                "dtype-stable",
            ),
        ),
        Method(
            name="wina",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.wina:WINA",
            summary="Zeroes, token by token, the inputs of lowest magnitude times column norm.",
            applies_to=("causal-lm",),
            paper=Paper(
                title="WINA: Weight Informed Neuron Activation for Accelerating"
                " Large Language Model Inference",
                arxiv="2505.19427",
                year=2025,
                authors="Sihan Chen and Dan Zhao and Jongwoo Ko and Colby Banbury and Huiping Zhuang"
                " and Luming Liang and Tianyi Chen",
                code="microsoft/wina",
            ),
            needs=("calibration",),
            presets={
                **_INPUT_PRESETS,
                "s50-greedy": {"sparsity": 0.5, "greedy": True},
                "s50-paper": {"sparsity": 0.5, "columns": "paper", "subtract_embed_mean": False},
                "s50-plain": {"sparsity": 0.5, "transform": False},
                "s50-threshold": {"sparsity": 0.5, "mask_by": "threshold"},
            },
            claims="wina.toml",
            fidelity="authors-code",
            parity="microsoft/wina@8153dbf72ab4a05b0dc2032018c09d3256cf4541",
            vectors=("sparse/wina",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0,transform=false",
                "monotone:-sparsity",
                "batch-split-invariant",
                "dtype-stable",
            ),
            positions="{positions}",
        ),
        Method(
            name="teal",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.teal:TEAL",
            summary="Zeroes, token by token, the inputs below a calibrated magnitude.",
            applies_to=("causal-lm",),
            paper=Paper(
                title="Training-Free Activation Sparsity in Large Language Models",
                arxiv="2408.14690",
                venue="ICLR",
                year=2025,
                authors="James Liu and Pragaash Ponnusamy and Tianle Cai and Han Guo and Yoon Kim"
                " and Ben Athiwaratkun",
                code="FasterDecoding/TEAL",
            ),
            needs=("calibration",),
            presets={
                **_INPUT_PRESETS,
                "s50-topk": {"sparsity": 0.5, "mask_by": "topk"},
                "s50-greedy": {"sparsity": 0.5, "greedy": True},
            },
            claims="teal.toml",
            fidelity="authors-code",
            parity="FasterDecoding/TEAL@5baaec8645ce76368bd49eb05efb23f1da7edec6",
            vectors=("sparse/teal",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0",
                "monotone:-sparsity",
                "batch-split-invariant",
                "dtype-stable",
            ),
            positions="{positions}",
        ),
        Method(
            name="cats",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.cats:CATS",
            summary="Zeroes the neurons of feed-forward networks whose gate is below a calibrated magnitude.",
            applies_to=("causal-lm",),
            paper=Paper(
                title="CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
                arxiv="2404.08763",
                venue="COLM",
                year=2024,
                authors="Donghyun Lee and Je-Yong Lee and Genghan Zhang and Mo Tiwari and Azalia Mirhoseini",
                code="ScalingIntelligence/CATS",
            ),
            needs=("calibration",),
            presets={
                "f50": {"sparsity": 0.5},
                "f70": {"sparsity": 0.7},
                "f90": {"sparsity": 0.9},
                **_MODEL_PRESETS,
            },
            claims="cats.toml",
            fidelity="authors-code",
            parity="ScalingIntelligence/CATS@679959c3323790be0a7d7d9af78e0580f8b88ed8",
            vectors=("sparse/cats",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0",
                "monotone:-sparsity",
                "batch-split-invariant",
                "dtype-stable",
            ),
            positions="{positions}",
        ),
    ]


@hookimpl
def methodbench_suites() -> list[SuiteFile]:
    return [
        SuiteFile(
            name="demo-sparse",
            package="methodbench_sparse",
            path="suites/demo.yaml",
            summary="magnitude, wanda and wina at 50 % on SmolLM2-135M.",
            role="demo",
        ),
        SuiteFile(
            name="demo-quick-sparse",
            package="methodbench_sparse",
            path="suites/demo-quick.yaml",
            summary="magnitude and wanda at 50 % on SmolLM2-135M.",
            role="demo-quick",
        ),
    ]
