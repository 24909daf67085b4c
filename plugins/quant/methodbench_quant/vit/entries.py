"""Quantizers of vision transformers."""

from __future__ import annotations

from methodbench.entries import Method, Paper

_PER_TENSOR = {"reparameterize": False, "softmax": "uniform"}

METHODS: list[Method] = [
    Method(
        name="vit-minmax",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.minmax:MinMaxViT",
        summary="Min-max grids, fixed by calibration: one per activation tensor, one per output channel.",
        applies_to=("vit",),
        needs=("calibration",),
        presets={f"w{bits}a{bits}": {"w_bits": bits, "a_bits": bits} for bits in (8, 6, 4)},
        fidelity="baseline",
        properties=(
            "deterministic",
            "no-input-mutation",
            "monotone:w_bits",
            "monotone:a_bits",
            "batch-split-invariant",
        ),
        extra="quant",
    ),
    Method(
        name="repq-vit",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.repq_vit:RepQViT",
        summary="Searches LayerNorm outputs per channel and folds the scales into the layers around them.",
        applies_to=("vit",),
        paper=Paper(
            title="RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers",
            arxiv="2212.08254",
            venue="ICCV",
            year=2023,
            authors="Zhikai Li and Junrui Xiao and Lianwei Yang and Qingyi Gu",
            code="zkkli/RepQ-ViT",
        ),
        needs=("calibration",),
        presets={
            **{f"w{bits}a{bits}": {"w_bits": bits, "a_bits": bits} for bits in (8, 6, 4)},
            **{
                f"per-tensor-w{bits}a{bits}": {"w_bits": bits, "a_bits": bits, **_PER_TENSOR}
                for bits in (8, 6, 4)
            },
        },
        claims="repq-vit.toml",
        fidelity="authors-code",
        parity="zkkli/RepQ-ViT a160561",
        vectors=("quant_vision/repq_vit",),
        properties=(
            "deterministic",
            "no-input-mutation",
            "batch-split-invariant",
        ),
        extra="quant",
    ),
]
