"""Quantizers of language models."""

from __future__ import annotations

from typing import Any

from methodbench.entries import Method, Paper

_GRIDS: dict[str, dict[str, Any]] = {
    "w8": {"bits": 8, "group_size": -1},
    "w4": {"bits": 4, "group_size": -1},
    "w3": {"bits": 3, "group_size": -1},
    "w2": {"bits": 2, "group_size": -1},
    "w4g128": {"bits": 4, "group_size": 128},
    "w4g64": {"bits": 4, "group_size": 64},
    "w4g32": {"bits": 4, "group_size": 32},
    "w3g128": {"bits": 3, "group_size": 128},
    "w3g64": {"bits": 3, "group_size": 64},
    "w3g32": {"bits": 3, "group_size": 32},
    "w2g64": {"bits": 2, "group_size": 64},
    "w2g32": {"bits": 2, "group_size": 32},
}

_FINE = {name: _GRIDS[name] for name in ("w4", "w3", "w2", "w4g128", "w3g128", "w4g64", "w3g64", "w2g64")}

ADADIM = Method(
    name="adadim",
    kind="compressor",
    family="quant",
    stage="quantize",
    impl="methodbench_quant.llm.adadim:AdaDim",
    summary="Lets each layer choose whether weights share a scale along its inputs or along its outputs.",
    applies_to=("causal-lm", "vit"),
    paper=Paper(
        title=(
            "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language "
            "Models"
        ),
        arxiv="2309.15531",
        venue="ICLR",
        year=2024,
        authors=(
            "Jung Hwan Heo and Jeonghoon Kim and Beomseok Kwon and Byeongwook Kim and Se Jung Kwon and Dongsoo Lee"
        ),
        code="johnheo/adadim-llm",
    ),
    needs=("calibration",),
    presets={
        **_FINE,
        "w3g64-gptq": {"bits": 3, "group_size": 64, "base": "gptq"},
        "w3-gptq": {"bits": 3, "group_size": -1, "base": "gptq"},
    },
    claims="adadim.toml",
    fidelity="authors-code",
    parity="johnheo/adadim-llm 49ee38e, state dicts cloned",
    vectors=("quant/adadim",),
    properties=("deterministic", "monotone:bits"),
    extra="quant",
)

DGQ_LLM = Method(
    name="dgq-llm",
    kind="compressor",
    family="quant",
    stage="quantize",
    impl="methodbench_quant.llm.dgq:DGQ",
    summary="Makes 4-bit group scales integers times one scale per row, so that 8-bit arithmetic serves.",
    applies_to=("causal-lm",),
    paper=Paper(
        title="Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM",
        arxiv="2310.04836",
        year=2023,
        authors="Luoming Zhang and Wen Fei and Weijia Wu and Yefei He and Zhenyu Lou and Hong Zhou",
        code="ilur98/DGQ",
    ),
    needs=("calibration",),
    presets={
        "w4a8": {},
        "w4a8g64": {"group_size": 64},
        "w4a8g64-operands": {"group_size": 64, "quantize_operands": True},
        "w4g64": {"group_size": 64, "a_bits": 16},
        "w4a8g64-phase1": {"group_size": 64, "two_grains": False},
    },
    claims="dgq-llm.toml",
    fidelity="authors-code",
    parity="ilur98/DGQ 141eef7, in float32",
    vectors=("quant/dgq_llm",),
    properties=("deterministic",),
    extra="quant",
)

LLM_FP4 = Method(
    name="llm-fp4",
    kind="compressor",
    family="quant",
    stage="quantize",
    impl="methodbench_quant.llm.llm_fp4:LLMFP4",
    summary="Searches bias and split of 4-bit floating point for weights and activations of each layer.",
    applies_to=("causal-lm",),
    paper=Paper(
        title="LLM-FP4: 4-Bit Floating-Point Quantized Transformers",
        arxiv="2310.16836",
        venue="EMNLP",
        year=2023,
        authors="Shih-yang Liu and Zechun Liu and Xijie Huang and Pingcheng Dong and Kwang-Ting Cheng",
        code="nbasyl/LLM-FP4",
    ),
    needs=("calibration",),
    presets={
        # Head and embedding stay as they are, as with the methods that these are compared with.
        "w4a4": {"head_and_embedding": False},
        "w4a4-baseline": {"head_and_embedding": False, "variant": "baseline"},
        "w4a4-minmax": {"head_and_embedding": False, "variant": "minmax"},
        "w6a6": {"head_and_embedding": False, "bits": 6, "a_bits": 6},
        "w6a6-minmax": {"head_and_embedding": False, "bits": 6, "a_bits": 6, "variant": "minmax"},
        "w4a4-everything": {},
        "w4a4-published": {"authors_compat": True},
    },
    claims="llm-fp4.toml",
    fidelity="authors-code",
    parity="nbasyl/LLM-FP4 0598c95, as published and with its integer-power slip repaired",
    vectors=("quant/llm_fp4",),
    check_params={"candidates": 20},
    properties=("deterministic",),
    extra="quant",
)

SMOOTHQUANT = Method(
    name="smoothquant",
    kind="compressor",
    stage="quantize",
    family="quant",
    impl="methodbench_quant.llm.smoothquant:SmoothQuant",
    summary="Moves activation outliers from behind each norm into the weights, then rounds both.",
    applies_to=("causal-lm",),
    paper=Paper(
        title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        arxiv="2211.10438",
        venue="ICML",
        year=2023,
        authors=("Guangxuan Xiao and Ji Lin and Mickael Seznec and Hao Wu and Julien Demouth and Song Han"),
        code="mit-han-lab/smoothquant",
    ),
    needs=("calibration",),
    presets={
        "w8a8": {},
        "w8a8-llama": {"alpha": 0.85, "quantize_qkv": True},
        "w8a8-tensor": {"per": "tensor", "a_granularity": "tensor"},
        "w8a8-static": {"per": "tensor", "static": True},
        "w6a6": {"bits": 6, "a_bits": 6},
        "w4a8": {"bits": 4, "a_bits": 8},
        "w4a4": {"bits": 4, "a_bits": 4},
    },
    claims="smoothquant.toml",
    fidelity="authors-code",
    parity="mit-han-lab/smoothquant c61476d",
    vectors=("quant/smoothquant",),
    properties=("deterministic", "monotone:bits"),
    extra="quant",
)

LORC = Method(
    name="lorc",
    kind="compressor",
    stage="compensate",
    family="quant",
    impl="methodbench_quant.llm.lorc:LoRC",
    summary="Adds the low-rank part of what rounding lost back to each weight, as two thin matrices.",
    applies_to=("causal-lm", "vit"),
    paper=Paper(
        title=(
            "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank "
            "Compensation"
        ),
        arxiv="2303.08302",
        venue="AAAI",
        year=2024,
        authors="Zhewei Yao and Xiaoxia Wu and Cheng Li and Stephen Youn and Yuxiong He",
    ),
    needs=("calibration",),
    presets={
        **_FINE,
        "w3-m32": {"bits": 3, "group_size": -1, "rank": 32},
        "w3g64-m32": {"bits": 3, "group_size": 64, "rank": 32},
        "w3-int8": {"bits": 3, "group_size": -1, "factor_bits": 8},
        "w3-gptq": {"bits": 3, "group_size": -1, "base": "gptq"},
        "w4a8-fgq64": {"bits": 4, "group_size": 64, "a_bits": 8, "a_group_size": 64},
    },
    claims="lorc.toml",
    fidelity="reimplementation",
    parity="ChengZhang-98/QERA bd7fc86 with unit scale",
    vectors=("quant/lorc",),
    properties=("deterministic", "monotone:bits"),
    extra="quant",
)

_W4A4: dict[str, Any] = {"w_bits": 4, "w_clip": True, "a_bits": 4, "a_clip_ratio": 0.9}
_KV4: dict[str, Any] = {
    **{f"{part}_bits": 4 for part in "kv"},
    **{f"{part}_asym": True for part in "kv"},
    **{f"{part}_clip_ratio": 0.95 for part in "kv"},
}

QUAROT = Method(
    name="quarot",
    kind="compressor",
    stage="rotate",
    family="quant",
    impl="methodbench_quant.llm.quarot:QuaRot",
    summary="Rotates the residual stream and the heads so that no channel stands out, then rounds everything.",
    applies_to=("causal-lm",),
    paper=Paper(
        title="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        arxiv="2404.00456",
        venue="NeurIPS",
        year=2024,
        authors=(
            "Saleh Ashkboos and Amirkeivan Mohtashami and Maximilian L. Croci and Bo Li and Pashmina Cameron and "
            "Martin Jaggi and Dan Alistarh and Torsten Hoefler and James Hensman"
        ),
        code="spcl/QuaRot",
    ),
    needs=("calibration",),
    presets={
        "rotate": {},
        "rotate-exact": {"subtract_embed_mean": False},
        "w4a4": _W4A4,
        "w4a4-rtn": {**_W4A4, "w_rounding": "rtn"},
        "w4a4kv4": {**_W4A4, **_KV4},
        "w4": {"w_bits": 4, "w_clip": True},
        "w3": {"w_bits": 3, "w_clip": True},
        "w3g64": {"w_bits": 3, "w_clip": True, "w_group_size": 64},
        "w2g64": {"w_bits": 2, "w_asym": True, "w_clip": True, "w_group_size": 64},
    },
    claims="quarot.toml",
    fidelity="authors-code",
    parity="spcl/QuaRot 5008669",
    vectors=("quant/quarot",),
    properties=("deterministic",),
    extra="quant",
)

#: A budget of learning that one core spends on SmolLM2-135M in about five minutes; the default is the papers'.
_SHORT_LEARNING: dict[str, Any] = {"epochs": 2}

OSTQUANT = Method(
    name="ostquant",
    kind="compressor",
    family="quant",
    impl="methodbench_quant.llm.ostquant:OSTQuant",
    summary="Learns rotations and scales that are absorbed into the weights, against the model's own predictions.",
    applies_to=("causal-lm",),
    paper=Paper(
        title=(
            "OstQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations "
            "for Better Distribution Fitting"
        ),
        arxiv="2501.13987",
        venue="ICLR",
        year=2025,
        authors="Xing Hu and others",
        code="BrotherHappy/OSTQuant",
    ),
    needs=("calibration",),
    presets={
        "w4a4": {"steps": 24, "batch_size": 1},
        "w4a4-start": {"steps": 0},
        "w4a4kv4": {"steps": 24, "batch_size": 1, "kv_bits": 4, "online_qk": True},
        "w4a4-paper": {},
    },
    claims="ostquant.toml",
    fidelity="authors-code",
    parity="BrotherHappy/OSTQuant ab64362",
    vectors=("quant/ostquant",),
    stage="rotate",
    properties=("deterministic",),
    extra="quant",
)

ABQ_LLM = Method(
    name="abq-llm",
    kind="compressor",
    family="quant",
    impl="methodbench_quant.llm.abq_llm:ABQLLM",
    summary="Learns scales, clipping and a rank-one correction block by block; two bits get a fifth level.",
    applies_to=("causal-lm",),
    paper=Paper(
        title="ABQ-LLM: Arbitrary-Bit Quantized Inference Acceleration for Large Language Models",
        arxiv="2408.08554",
        venue="AAAI",
        year=2025,
        authors="Chao Zeng and others",
        code="bytedance/ABQ-LLM",
    ),
    needs=("calibration",),
    presets={
        "w4": {"bits": 4, **_SHORT_LEARNING},
        "w3": {"bits": 3, **_SHORT_LEARNING},
        "w3g64": {"bits": 3, "group_size": 64, **_SHORT_LEARNING},
        "w2g64": {"bits": 2, "group_size": 64, **_SHORT_LEARNING},
        "w2g64-plain": {"bits": 2, "group_size": 64, "bit_balance": False, **_SHORT_LEARNING},
        "w2a8g64": {"bits": 2, "group_size": 64, "a_bits": 8, **_SHORT_LEARNING},
        "w4a4": {"bits": 4, "a_bits": 4, **_SHORT_LEARNING},
        "w2g64-paper": {"bits": 2, "group_size": 64, "epochs": 40},
    },
    claims="abq-llm.toml",
    fidelity="authors-code",
    parity="bytedance/ABQ-LLM de2e849",
    vectors=("quant/abq_llm",),
    stage="quantize",
    properties=("deterministic",),
    extra="quant",
)

_W2G64: dict[str, Any] = {"bits": 2, "group_size": 64, "symmetric": False}

#: One pass over the calibration set per window. Soft roundings do not come to a decision in so few steps, and cutting
#: weights costs SmolLM2-135M more than 3 bits do: the published way are the presets that end in ``-soft``.
_ONE_PASS: dict[str, Any] = {
    "epochs": 1,
    "decided": True,
    "regularization": 0.0,
    "cfp": "activations",
    "rounding_lr": 3e-2,
    "step_lr": 3e-3,
}

CBQ = Method(
    name="cbq",
    kind="compressor",
    family="quant",
    impl="methodbench_quant.llm.cbq:CBQ",
    summary="Learns rounding and steps over overlapping windows of blocks, outliers cut or scaled before.",
    applies_to=("causal-lm",),
    paper=Paper(
        title="CBQ: Cross-Block Quantization for Large Language Models",
        arxiv="2312.07950",
        venue="ICLR",
        year=2025,
        authors="Xin Ding and others",
    ),
    needs=("calibration",),
    presets={
        "w3": {"bits": 3, "symmetric": False, **_ONE_PASS},
        "w3g64": {"bits": 3, "group_size": 64, "symmetric": False, **_ONE_PASS},
        "w2g64": {**_W2G64, **_ONE_PASS},
        "w2g64-blocks": {**_W2G64, **_ONE_PASS, "window": 1, "overlap": 0},
        "w4a4": {"bits": 4, "a_bits": 4, **_ONE_PASS},
        "w3-soft": {"bits": 3, "symmetric": False, "epochs": 1},
        "w3g64-soft": {"bits": 3, "group_size": 64, "symmetric": False, "epochs": 1},
        "w2g64-soft": {**_W2G64, "epochs": 1},
        "w4a4-soft": {"bits": 4, "a_bits": 4, "epochs": 1},
        "w2g64-paper": {**_W2G64},
    },
    claims="cbq.toml",
    fidelity="partial",
    parity="an independent implementation of the published description",
    vectors=("quant/cbq",),
    properties=("deterministic",),
    stage="quantize",
    extra="quant",
)

METHODS: list[Method] = [
    SMOOTHQUANT,
    LORC,
    ADADIM,
    DGQ_LLM,
    LLM_FP4,
    Method(
        name="rtn",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.llm.rtn:RTN",
        summary="Rounds every weight to the nearest level of its group's grid: the zero line of the field.",
        applies_to=("causal-lm", "vit"),
        presets={
            **_GRIDS,
            "w8a8": {"bits": 8, "convention": "absmax", "symmetric": True, "a_bits": 8},
            "w4a8": {"bits": 4, "convention": "omni", "a_bits": 8, "a_convention": "omni"},
            "w6a6": {"bits": 6, "convention": "omni", "a_bits": 6, "a_convention": "omni"},
            "w4a4": {"bits": 4, "convention": "omni", "a_bits": 4, "a_convention": "omni"},
            "w4a8g64": {
                "bits": 4,
                "group_size": 64,
                "convention": "omni",
                "a_bits": 8,
                "a_convention": "omni",
            },
            # The grids of SmoothQuant and CBQ: symmetric, from the extremes.
            "w4-absmax": {"bits": 4, "convention": "absmax", "symmetric": True},
            "w3-absmax": {"bits": 3, "convention": "absmax", "symmetric": True},
            "w4a8-absmax": {"bits": 4, "convention": "absmax", "symmetric": True, "a_bits": 8},
            "w6a6-absmax": {"bits": 6, "convention": "absmax", "symmetric": True, "a_bits": 6},
            "w4a4-absmax": {"bits": 4, "convention": "absmax", "symmetric": True, "a_bits": 4},
            "w4a4-symmetric": {
                "bits": 4,
                "convention": "absmax",
                "symmetric": True,
                "mse": True,
                "a_bits": 4,
            },
            "w4kv4": {"bits": 4, "kv_bits": 4},
            "w4-per-input": {"bits": 4, "along": "output"},
            "w4-mse": {"bits": 4, "convention": "gptq", "mse": True},
        },
        claims="rtn.toml",
        fidelity="authors-code",
        parity=(
            "mit-han-lab/llm-awq d6e797a, IST-DASLab/gptq 2d65066, mit-han-lab/smoothquant c61476d, "
            "OpenGVLab/OmniQuant 95fae1b, ilur98/DGQ 141eef7"
        ),
        vectors=("quant/rtn",),
        properties=(
            "deterministic",
            "no-input-mutation",
            "monotone:bits",
            "idempotent",
            "scale-equivariant",
            "channel-permutation-equivariant",
            "channel-permutation-equivariant:in",
            "batch-split-invariant",
            "dtype-stable",
        ),
        extra="quant",
    ),
    Method(
        name="gptq",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.llm.gptq:GPTQ",
        summary="Rounds a layer column by column and spreads each error over the columns that are left.",
        applies_to=("causal-lm", "vit"),
        paper=Paper(
            title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
            arxiv="2210.17323",
            venue="ICLR",
            year=2023,
            authors="Elias Frantar and Saleh Ashkboos and Torsten Hoefler and Dan Alistarh",
            code="IST-DASLab/gptq",
        ),
        needs=("calibration",),
        presets={
            **_GRIDS,
            "w4g128-act-order": {"bits": 4, "group_size": 128, "act_order": True, "static_groups": True},
            "w3-act-order": {"bits": 3, "group_size": -1, "act_order": True, "true_sequential": True},
        },
        claims="gptq.toml",
        fidelity="authors-code",
        parity="IST-DASLab/gptq 2d65066",
        vectors=("quant/gptq",),
        properties=(
            "deterministic",
            "no-input-mutation",
            "monotone:bits",
            "scale-equivariant",
            "channel-permutation-equivariant",
            "batch-split-invariant",
            "dtype-stable",
        ),
        extra="quant",
    ),
    Method(
        name="awq",
        kind="compressor",
        stage="quantize",
        family="quant",
        impl="methodbench_quant.llm.awq:AWQ",
        summary="Scales up the input channels with large activations before rounding, and clips each group.",
        applies_to=("causal-lm",),
        paper=Paper(
            title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
            arxiv="2306.00978",
            venue="MLSys",
            year=2024,
            authors=(
                "Ji Lin and Jiaming Tang and Haotian Tang and Shang Yang and Wei-Ming Chen and "
                "Wei-Chen Wang and Guangxuan Xiao and Xingyu Dang and Chuang Gan and Song Han"
            ),
            code="mit-han-lab/llm-awq",
        ),
        needs=("calibration",),
        presets=_GRIDS,
        claims="awq.toml",
        fidelity="authors-code",
        parity="mit-han-lab/llm-awq d6e797a",
        vectors=("quant/awq",),
        properties=(
            "deterministic",
            "no-input-mutation",
            "monotone:bits",
            "scale-equivariant",
            "channel-permutation-equivariant",
            "batch-split-invariant",
            "dtype-stable",
        ),
        extra="quant",
    ),
    QUAROT,
    OSTQUANT,
    ABQ_LLM,
    CBQ,
]

SHIFTADDLLM = Method(
    name="shiftaddllm",
    kind="compressor",
    family="quant",
    impl="methodbench_quant.llm.shiftaddllm:ShiftAddLLM",
    summary="Turns weights into binary matrices times scales of a few powers of two, with error feedback.",
    applies_to=("causal-lm", "vit"),
    paper=Paper(
        title=(
            "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization"
        ),
        arxiv="2406.05981",
        venue="NeurIPS",
        year=2024,
        authors=(
            "Haoran You and Yipin Guo and Yichao Fu and Wei Zhou and Huihong Shi and Xiaofan Zhang and "
            "Souvik Kundu and Amir Yazdanbakhsh and Yingyan Celine Lin"
        ),
        code="GATECH-EIC/ShiftAddLLM",
    ),
    needs=("calibration",),
    presets={
        "w4": {"bits": 4},
        "w3": {"bits": 3},
        "w2": {"bits": 2},
        "w3-lat": {"bits": 3, "mode": "lat"},
        "w2-lat": {"bits": 2, "mode": "lat"},
        "mixed-2.2": {"mix_bits": [0.0, 0.8, 0.2]},
    },
    claims="shiftaddllm.toml",
    fidelity="authors-code",
    parity="GATECH-EIC/ShiftAddLLM 1053837, without the random projection",
    vectors=("quant/shiftaddllm",),
    properties=("deterministic", "monotone:bits"),
    extra="quant",
)

NUPES = Method(
    name="nupes",
    kind="compressor",
    family="quant",
    impl="methodbench_quant.llm.nupes:NUPES",
    summary="Rounds weights after a power map whose exponent is searched, or learned with the weights.",
    applies_to=("causal-lm", "vit"),
    paper=Paper(
        title="NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search",
        arxiv="2308.05600",
        venue="IEEE TPAMI",
        year=2025,
        authors="Edouard Yvinec and Arnaud Dapogny and Kevin Bailly",
    ),
    needs=("calibration",),
    presets={
        "w8": {"bits": 8},
        "w4": {"bits": 4},
        "w3": {"bits": 3},
        "w4-half": {"bits": 4, "exponent": 0.5},
        "w4-layer": {"bits": 4, "scope": "layer"},
        "w3-learned": {"bits": 3, "mode": "data_driven", "iterations": 40, "lr_v": 5e-3, "lr_a": 1e-3},
    },
    claims="nupes.toml",
    fidelity="partial",
    parity="a reference implementation of the data-free operator; the data-driven part is our reading",
    vectors=("quant/nupes",),
    properties=("deterministic", "monotone:bits"),
    extra="quant",
)

ADAQUANT = Method(
    name="adaquant",
    kind="compressor",
    family="quant",
    impl="methodbench_quant.llm.adaquant:AdaQuant",
    summary="Fits each layer's weight and ranges by gradients, and spends bits by an integer program.",
    applies_to=("causal-lm", "cnn"),
    paper=Paper(
        title="Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
        arxiv="2006.10518",
        venue="ICML",
        year=2021,
        authors="Itay Hubara and Yury Nahshan and Yair Hanani and Ron Banner and Daniel Soudry",
        code="itayhubara/CalibTIP",
    ),
    needs=("calibration",),
    presets={
        "w4a4": {},
        "w4": {"a_bits": 16, "iterations": 60, "batch": 256},
        "w3": {"bits": 3, "a_bits": 16, "iterations": 60, "batch": 256, "lr_w": 1e-4},
        "w4a8": {"a_bits": 8, "iterations": 60, "batch": 256},
        "mixed": {
            "a_bits": 16,
            "size": 0.14,
            "precisions": [8, 4, 3],
            "unit": "block",
            "loss_tokens": 128,
            "iterations": 20,
            "batch": 256,
        },
        "w3-biases": {"bits": 3, "a_bits": 16, "iterations": 0, "bias_steps": 16, "bias_lr": 0.01},
        "rounded-w4a4": {"iterations": 0},
        "tuned-w4a4": {"bn_passes": 1, "bias_steps": 60, "bias_lr": 0.01},
        "light-w4a4": {"iterations": 0, "bn_passes": 1, "bias_steps": 60, "bias_lr": 0.01},
        "cnn-mixed-a4": {"size": 0.13, "precisions": [8, 4, 3, 2]},
    },
    claims="adaquant.toml",
    fidelity="authors-code",
    parity="itayhubara/CalibTIP 8bffbe4",
    vectors=("quant/adaquant",),
    properties=("deterministic", "monotone:bits"),
    check_params={"iterations": 50},
    extra="quant",
)

AGILE_QUANT = Method(
    name="agile-quant",
    kind="compressor",
    family="quant",
    impl="methodbench_quant.llm.agile_quant:AgileQuant",
    summary="GPTQ weights, static activations, and fewer tokens: those that heed the first token least go.",
    applies_to=("causal-lm",),
    paper=Paper(
        title="Agile-Quant: Activation-Guided Quantization for Faster Inference of LLMs on the Edge",
        arxiv="2312.05693",
        venue="AAAI",
        year=2024,
        authors=(
            "Xuan Shen and Peiyan Dong and Lei Lu and Zhenglun Kong and Zhengang Li and Ming Lin and "
            "Chao Wu and Yanzhi Wang"
        ),
        code="shawnricecake/agile-quant",
    ),
    needs=("calibration",),
    presets={
        "w4a8": {"group_size": -1},
        "w4a8g64": {"group_size": 64},
        "w4a8g64-prune10": {"group_size": 64, "remove": 0.1},
        "w4a8g64-low20": {"group_size": 64, "low": 0.2},
        "w4a8g64-log2": {"group_size": 64, "softmax_grid": "log2"},
    },
    claims="agile-quant.toml",
    fidelity="authors-code",
    parity="shawnricecake/agile-quant dd8f36d: quantizers, token scores and sets",
    vectors=("quant/agile_quant",),
    properties=("deterministic",),
    positions="tokens that pay attention to the first one",
    extra="quant",
)

OUTLIER_METRICS = Method(
    name="outlier-metrics",
    kind="probe",
    family="quant",
    impl="methodbench_quant.llm.outlier_metrics:OutlierMetrics",
    summary="Measures outliers of activations, weights and attention, massive activations and kurtosis.",
    applies_to=("causal-lm",),
    paper=Paper(
        title="Systematic Outliers in Large Language Models",
        arxiv="2502.06415",
        venue="ICLR",
        year=2025,
        authors="Yongqi An and Xu Zhao and Tao Yu and Ming Tang and Jinqiao Wang",
        code="an-yongqi/systematic-outliers",
    ),
    needs=("calibration",),
    claims="outlier-metrics.toml",
    fidelity="authors-code",
    parity=(
        "an-yongqi/systematic-outliers 5559abe, dmis-lab/Outlier-Safe-Pre-Training 4c2c367; "
        "massive activations and the fit against a reference implementation"
    ),
    vectors=("quant/outlier_metrics",),
    properties=("deterministic",),
    extra="quant",
)

EAQUANT = Method(
    name="eaquant",
    kind="compressor",
    family="quant",
    impl="methodbench_quant.llm.eaquant:EAQuant",
    summary="Quantizes mixtures of experts: one smoothing for all experts, a router that keeps its ranking.",
    applies_to=("causal-lm",),
    paper=Paper(
        title=("EAQuant: Enhancing Post-Training Quantization for MoE Models via Expert-Aware Optimization"),
        arxiv="2506.13329",
        year=2025,
        authors="Zhongqian Fu and Ning Ding and Kai Han and Xianzhi Yu and Xiaosong Li and Xinghao Chen and others",
        code="darren-fzq1/EAQuant",
    ),
    needs=("calibration",),
    presets={
        "w4a4": {},
        "w3a4": {"bits": 3},
        # The base without the three additions: no merged smoothing, the router like any layer, no balance.
        "w4a4-base": {"smooth": False, "router_criterion": "weight", "balance": 0.0},
        "w4a4-router4": {"router_bits": 4},
        "w4a4-router4-weight": {"router_bits": 4, "router_criterion": "weight"},
        "w4a4-column": {"extreme": "column"},
        "w4a4-all-weights": {"merge": "all-weights"},
    },
    claims="eaquant.toml",
    fidelity="authors-code",
    parity="darren-fzq1/EAQuant 37c4509: scales, outlier channels, clipping, permutation; rotations are random",
    vectors=("quant/eaquant",),
    properties=("deterministic",),
    extra="quant",
)

METHODS += [SHIFTADDLLM, NUPES, ADAQUANT, AGILE_QUANT, EAQUANT, OUTLIER_METRICS]
