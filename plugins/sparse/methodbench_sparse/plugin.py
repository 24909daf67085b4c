"""Entries of the sparse family: pruned weights and sparse activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from methodbench.entries import Family, Method, Paper, SuiteFile
from methodbench.hookspecs import hookimpl
from methodbench_sparse.activation_entries import METHODS as ACTIVATION_METHODS
from methodbench_sparse.activation_entries import PROBES
from methodbench_sparse.training_entries import METHODS as TRAINING_METHODS

_WANDA_CODE = "locuslab/wanda@8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6"

_PRUNING_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "s30": {"sparsity": 0.3},
    "s50": {"sparsity": 0.5},
    "s60": {"sparsity": 0.6},
    "s70": {"sparsity": 0.7},
    "s50-2of4": {"sparsity": 0.5, "pattern": "2:4"},
    "s50-4of8": {"sparsity": 0.5, "pattern": "4:8"},
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
            name="sparsegpt",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.sparsegpt:SparseGPT",
            summary="Prunes column by column and makes up for each loss with the columns that follow.",
            applies_to=("causal-lm", "vit"),
            paper=Paper(
                title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
                arxiv="2301.00774",
                venue="ICML",
                year=2023,
                authors="Elias Frantar and Dan Alistarh",
                code="IST-DASLab/sparsegpt",
            ),
            needs=("calibration",),
            presets={**_PRUNING_PRESETS, "s50-w4": {"sparsity": 0.5, "bits": 4}},
            claims="sparsegpt.toml",
            fidelity="authors-code",
            parity="IST-DASLab/sparsegpt@147d2159dc4f3e9f73e47b32c04d7b3708f44436",
            vectors=("sparse/sparsegpt",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0",
                "monotone:-sparsity",
                "channel-permutation-equivariant",
                "batch-split-invariant",
                "dtype-stable",
            ),
        ),
        Method(
            name="gblm-pruner",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.gblm_pruner:GBLMPruner",
            summary="Wanda's score plus magnitude times the gradients of calibration text at the dense model.",
            applies_to=("causal-lm",),
            paper=Paper(
                title="Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
                arxiv="2311.04902",
                year=2023,
                code="VILA-Lab/GBLM-Pruner",
            ),
            needs=("calibration",),
            presets={
                **_PRUNING_PRESETS,
                "s50-l1": {"sparsity": 0.5, "norm": "l1"},
                "s50-inverse": {"sparsity": 0.5, "inverse": True},
            },
            claims="gblm-pruner.toml",
            fidelity="authors-code",
            parity="VILA-Lab/GBLM-Pruner@9e8aea22e37c15f083f4a85fb7498b1aed75f30e",
            vectors=("sparse/gblm_pruner",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0",
                "exact-sparsity:sparsity",
                "monotone:-sparsity",
                "batch-split-invariant",
            ),
        ),
        Method(
            name="cfsp",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.cfsp:CFSP",
            summary="Cuts hidden neurons that activate little, more of them in blocks that do little.",
            applies_to=("causal-lm",),
            paper=Paper(
                title="CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation"
                " Information",
                arxiv="2409.13199",
                venue="COLING",
                year=2025,
                authors="Wang and Ma and Wang and Chen and Fan and Shan and Yang and Xu and Liu and Qin",
                code="wyxscir/CFSP",
            ),
            needs=("calibration",),
            presets={
                "s20": {"sparsity": 0.2},
                "s50": {"sparsity": 0.5},
                "s20-uniform": {"sparsity": 0.2, "sharpness": 0.0},
                "s20-paper": {"sparsity": 0.2, "score": "paper"},
                "s20-random": {"sparsity": 0.2, "score": "random", "sharpness": 0.0},
                "s20-recovered": {"sparsity": 0.2, "recovery_steps": 100},
                "s50-uniform": {"sparsity": 0.5, "sharpness": 0.0},
                "s50-random": {"sparsity": 0.5, "score": "random", "sharpness": 0.0},
            },
            claims="cfsp.toml",
            fidelity="authors-code",
            parity="wyxscir/CFSP@b2d5b13af87ce41df60994af092e5c4245977af9",
            vectors=("sparse/cfsp",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0",
                "batch-split-invariant",
                "dtype-stable",
            ),
        ),
        Method(
            name="unified-sparsity",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.unified_sparsity:UnifiedSparsity",
            summary="Leaves out layers or neurons, or deals a network's neurons out to experts of which a part is on.",
            applies_to=("causal-lm",),
            paper=Paper(
                title="Understanding and Harnessing Sparsity in Unified Multimodal Models",
                arxiv="2512.02351",
                year=2025,
                authors="Shwai He and Chaorui Deng and Ang Li and Shen Yan",
                code="Shwai-He/SparseUnifiedModel",
            ),
            needs=("calibration",),
            presets={
                "w25": {"sparsity": 0.25},
                "w50": {},
                "d25": {"mode": "depth", "sparsity": 0.25},
                "d25-stream": {"mode": "depth", "sparsity": 0.25, "output": "stream"},
                "d25-attention": {"mode": "depth", "sparsity": 0.25, "drop": "attention", "output": "stream"},
                "d25-mlp": {"mode": "depth", "sparsity": 0.25, "drop": "mlp", "output": "stream"},
                "e32k16": {"mode": "experts"},
                "e32k16-routers": {"mode": "experts", "steps": 100},
            },
            claims="unified-sparsity.toml",
            fidelity="partial",
            parity="Shwai-He/SparseUnifiedModel@322cee155e533b6c36647331aea116d6a8b71d8b",
            vectors=("sparse/unified_sparsity",),
            properties=(
                "deterministic",
                "no-input-mutation",
                "identity-at:sparsity=0",
                "batch-split-invariant",
                "dtype-stable",
            ),
        ),
        Method(
            name="read-me",
            kind="compressor",
            stage="prune",
            family="sparse",
            impl="methodbench_sparse.read_me:ReadMe",
            summary="Neurons of domains become experts, and a small router of token ids picks one for all layers.",
            applies_to=("causal-lm",),
            paper=Paper(
                title="Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
                arxiv="2410.19123",
                venue="NeurIPS",
                year=2024,
                authors="Cai and Ro and Kim and Wang and Bejnordi and Akella and Wang",
                code="VITA-Group/READ-ME",
            ),
            needs=("calibration",),
            presets={
                "s50": {},
                "s50-untrained": {"rounds": 0},
                "s50-tuned": {"rounds": 2, "model_steps": 50},
                "s25": {"sparsity": 0.25},
            },
            claims="read-me.toml",
            fidelity="partial",
            parity="VITA-Group/READ-ME@1df7e684d4f5693024f448ec6e7afcf8ab40682b",
            vectors=("sparse/read_me",),
            properties=("deterministic", "no-input-mutation", "dtype-stable"),
            check_params={"experts": 2, "width": 16, "heads": 2, "router_steps": 3},
        ),
        *TRAINING_METHODS,
        *ACTIVATION_METHODS,
        *PROBES,
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
            name="llm-prune",
            package="methodbench_sparse",
            path="suites/llm-prune.yaml",
            summary="Pruned weights of SmolLM2-135M, at 50 to 70 % and in patterns.",
        ),
        SuiteFile(
            name="cnn-prune",
            package="methodbench_sparse",
            path="suites/cnn-prune.yaml",
            summary="Pruned weights of ResNet-20 and ResNet-56 on CIFAR-10, at 50 to 95 % and in patterns.",
        ),
        SuiteFile(
            name="llm-activation-sparsity",
            package="methodbench_sparse",
            path="suites/llm-activation-sparsity.yaml",
            summary="Ways to zero activations of SmolLM2-135M, at 25 to 65 % of the weights not read.",
        ),
        SuiteFile(
            name="demo-quick-sparse",
            package="methodbench_sparse",
            path="suites/demo-quick.yaml",
            summary="magnitude and wanda at 50 % on SmolLM2-135M.",
            role="demo-quick",
        ),
    ]
