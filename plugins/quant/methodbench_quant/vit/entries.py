"""Quantizers of vision transformers."""

from __future__ import annotations

from methodbench.entries import Method, Paper

_PER_TENSOR = {"reparameterize": False, "softmax": "uniform"}


def _bits(*widths: int, **options: object) -> dict[str, dict[str, object]]:
    """Return presets of equal width for weights and activations, with further hyperparameters."""
    return {f"w{bits}a{bits}": {"w_bits": bits, "a_bits": bits, **options} for bits in widths}


METHODS: list[Method] = [
    Method(
        name="minmax-vit",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.minmax:MinMaxViT",
        summary="Min-max grids, fixed by calibration: one per activation tensor, one per output channel.",
        applies_to=("vit",),
        needs=("calibration",),
        presets=_bits(8, 6, 4, 3),
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
        name="percentile-vit",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.percentile:PercentileViT",
        summary="Percentile grids of least squared error: one per activation tensor, one per output channel.",
        applies_to=("vit",),
        needs=("calibration",),
        presets=_bits(8, 6, 4, 3),
        fidelity="baseline",
        properties=("deterministic", "no-input-mutation", "batch-split-invariant"),
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
            **_bits(8, 6, 4, 3),
            **{f"per-tensor-{name}": preset for name, preset in _bits(8, 6, 4, 3, **_PER_TENSOR).items()},
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
    Method(
        name="is-vit",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.is_vit:ISViT",
        summary="Shifted logarithmic grids for attention, and blocks learned before and after scales are folded.",
        applies_to=("vit",),
        paper=Paper(
            title="I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of Post-Training ViTs Quantization",
            arxiv="2311.10126",
            venue="TPAMI",
            year=2025,
            code="zysxmu/IaS-ViT",
        ),
        needs=("calibration",),
        presets={
            **_bits(6, iterations=200),
            **_bits(4, 3),
            **{f"unlearned-{name}": preset for name, preset in _bits(6, 4, 3, iterations=0).items()},
            **{f"short-{name}": preset for name, preset in _bits(4, 3, iterations=150).items()},
        },
        claims="is-vit.toml",
        fidelity="authors-code",
        parity="zysxmu/IaS-ViT@9300cea8db6292d9d3d6727321c7f1100360e191",
        vectors=("quant_vision/is_vit",),
        properties=("deterministic", "no-input-mutation", "batch-split-invariant"),
        check_params={"iterations": 5, "batch": 8},
        extra="quant",
    ),
    Method(
        name="repquant",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.repquant:RepQuant",
        summary="RepQ-ViT with both bounds of every channel learned, and weights that answer for rounded inputs.",
        applies_to=("vit",),
        paper=Paper(
            title=(
                "RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models "
                "via Scale Reparameterization"
            ),
            arxiv="2402.05628",
            year=2024,
        ),
        needs=("calibration",),
        presets={
            **_bits(6, 4, 3),
            **{f"clip-only-{name}": preset for name, preset in _bits(4, 3, recon="none").items()},
            **{f"recon-only-{name}": preset for name, preset in _bits(4, 3, clip_steps=0).items()},
            **{f"adaround-{name}": preset for name, preset in _bits(4, 3, recon="adaround").items()},
        },
        claims="repquant.toml",
        fidelity="partial",
        properties=("deterministic", "no-input-mutation", "batch-split-invariant"),
        check_params={"clip_steps": 20},
        extra="quant",
    ),
    Method(
        name="dopq-vit",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.dopq_vit:DopQViT",
        summary="Attention on a tangent grid that is fine at both ends, and shared scales that are medians.",
        applies_to=("vit",),
        paper=Paper(
            title=(
                "DopQ-ViT: Towards Distribution-Friendly and Outlier-Aware Post-Training Quantization "
                "for Vision Transformers"
            ),
            arxiv="2408.03291",
            year=2024,
        ),
        needs=("calibration",),
        presets={
            **_bits(6, 4, 3),
            **{f"mean-{name}": preset for name, preset in _bits(4, 3, shared="mean").items()},
            **{
                f"learned-{name}": {**preset, "calibration_images": 1024}
                for name, preset in _bits(4, 3, iterations=1000).items()
            },
        },
        claims="dopq-vit.toml",
        fidelity="partial",
        properties=("deterministic", "no-input-mutation", "batch-split-invariant"),
        extra="quant",
    ),
    Method(
        name="lrp-qvit",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.lrp_qvit:LRPQViT",
        summary="Bits of layers by the relevance that reaches them from the predicted class, and clipped channels.",
        applies_to=("vit",),
        paper=Paper(
            title="LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance Propagation",
            arxiv="2401.11243",
            year=2024,
            authors="Navin Ranjan and Andreas Savakis",
        ),
        needs=("calibration",),
        presets={
            "mp6": {"target_bits": 6, "product_bits": 6},
            "mp4": {"target_bits": 4},
            "fixed-mp4": {"target_bits": 4, "candidates": [4]},
            "mp3": {"target_bits": 3, "candidates": [2, 3, 4, 5, 6]},
            "fixed-mp3": {"target_bits": 3, "candidates": [3]},
            "inverted-mp3": {"target_bits": 3, "candidates": [2, 3, 4, 5, 6], "scores": "inverted"},
            "mp2.5": {"target_bits": 2.5, "candidates": [2, 3, 4, 5, 6]},
            "inverted-mp2.5": {"target_bits": 2.5, "candidates": [2, 3, 4, 5, 6], "scores": "inverted"},
            "unclipped-mp4": {"target_bits": 4, "kappa": float("inf")},
        },
        claims="lrp-qvit.toml",
        fidelity="partial",
        properties=("deterministic", "no-input-mutation", "batch-split-invariant"),
        extra="quant",
    ),
    Method(
        name="noisyquant",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.noisyquant:NoisyQuant",
        summary="Adds a fixed vector to each Linear's input before rounding and takes it off again in the bias.",
        applies_to=("vit",),
        paper=Paper(
            title="NoisyQuant: Noisy Bias-Enhanced Post-Training Activation Quantization for Vision Transformers",
            arxiv="2211.16056",
            venue="CVPR",
            year=2023,
            code="kriskrisliu/NoisyQuant",
        ),
        needs=("calibration",),
        presets={
            **_bits(8, 6, 4, 3),
            **{
                f"clip-only-{name}": {**preset, "search_mean": False, "search_noise": False}
                for name, preset in _bits(8, 6, 4, 3).items()
            },
        },
        claims="noisyquant.toml",
        fidelity="authors-code",
        parity="kriskrisliu/NoisyQuant ba544d1",
        vectors=("quant_vision/noisyquant",),
        properties=("deterministic", "no-input-mutation", "batch-split-invariant"),
        check_params={"clip_steps": 30, "mean_steps": 6, "noise_steps": 30, "search_tokens": 200},
        extra="quant",
    ),
    Method(
        name="adaround",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.vit.adaround:AdaRound",
        summary="Learns whether each weight is rounded up or down, layer by layer or, as BRECQ, block by block.",
        applies_to=("vit", "cnn"),
        paper=Paper(
            title="Up or Down? Adaptive Rounding for Post-Training Quantization",
            arxiv="2004.10568",
            venue="ICML",
            year=2020,
            code="yhhhli/BRECQ",
        ),
        needs=("calibration",),
        presets={
            **{f"w{bits}": {"w_bits": bits} for bits in (4, 3, 2)},
            **{f"nearest-w{bits}": {"w_bits": bits, "iterations": 0} for bits in (4, 3, 2)},
            **{f"brecq-w{bits}": {"w_bits": bits, "unit": "block"} for bits in (4, 3, 2)},
            **{f"brecq-{name}": preset for name, preset in _bits(6, 4, 3, unit="block").items()},
        },
        claims="adaround.toml",
        fidelity="authors-code",
        parity="yhhhli/BRECQ e455d62",
        vectors=("quant_vision/adaround",),
        properties=("deterministic", "no-input-mutation", "batch-split-invariant"),
        check_params={"iterations": 10, "a_iterations": 5, "lr": 0.05, "batch": 8},
        extra="quant",
    ),
]
