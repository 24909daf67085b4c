"""Methods that learn from weak labels, as light entries: see the modules that ``impl`` names for the methods."""

from __future__ import annotations

from methodbench.entries import Method, Paper

METHODS: list[Method] = [
    Method(
        name="cam-seeds",
        kind="segmenter",
        family="vision",
        impl="methodbench_vision.weak.cam_seeds:CamSeeds",
        summary="Class activation maps of a plain classifier, trained on the same pictures: the base to beat.",
        fidelity="baseline",
        properties=("deterministic", "no-input-mutation"),
        baseline=True,
        extra="vision",
    ),
    Method(
        name="bas",
        kind="segmenter",
        family="vision",
        impl="methodbench_vision.weak.bas:BAS",
        summary="Draws a foreground map whose complement does not activate the class any more.",
        paper=Paper(
            title="Background Activation Suppression for Weakly Supervised Object Localization",
            arxiv="2112.00580",
            venue="CVPR",
            year=2022,
            authors="Wu, Pingyu and Zhai, Wei and Cao, Yang",
            code="wpy1999/BAS-Extension",
        ),
        presets={
            "scratch": {"alpha": 1.0, "beta": 0.2},
            "segmentation": {"alpha": 0.2, "beta": 1.2},
            "cub-vgg": {"alpha": 0.0, "beta": 0.9, "top_k": 80},
            "cub-resnet50": {"alpha": 0.5, "beta": 1.5, "top_k": 200},
            "cub-inception": {"alpha": 0.5, "beta": 1.0, "top_k": 200},
            "cub-mobilenet": {"alpha": 0.5, "beta": 1.9, "top_k": 80},
            "ilsvrc-vgg": {"alpha": 0.05, "beta": 1.0},
            "ilsvrc-resnet50": {"alpha": 1.0, "beta": 2.0},
        },
        claims="bas.toml",
        fidelity="authors-code",
        parity="wpy1999/BAS-Extension (bd1bfa8): the VGG's losses and gradients, maps and boxes",
        vectors=("vision/bas",),
        properties=("deterministic", "no-input-mutation"),
        extra="vision",
    ),
    Method(
        name="usage",
        kind="segmenter",
        family="vision",
        impl="methodbench_vision.weak.usage:USAGE",
        summary="Sets how far seeds reach by the temperature of the pooling, and makes two views agree on them. A "
        "reading of the abstract: equations and constants of the paper were not at hand.",
        paper=Paper(
            title="USAGE: A Unified Seed Area Generation Paradigm for Weakly Supervised Semantic Segmentation",
            arxiv="2303.07806",
            venue="ICCV",
            year=2023,
        ),
        presets={
            "base": {"temperature": 1e6, "consistency": 0.0},
            # The temperature alone: no agreement of views.
            "narrow": {"temperature": 0.3, "consistency": 0.0},
            "wide": {"temperature": 10.0, "consistency": 0.0},
            **{
                f"vit-{name}": {
                    "network": "vit",
                    "temperature": temperature,
                    "consistency": 0.0,
                    "epochs": 10,
                    "peak_rate": 2e-3,
                }
                for name, temperature in (("narrow", 0.3), ("wide", 10.0))
            },
            "vit": {"network": "vit", "temperature": 0.3, "epochs": 10, "peak_rate": 2e-3},
            "vit-base": {
                "network": "vit",
                "temperature": 1e6,
                "consistency": 0.0,
                "epochs": 10,
                "peak_rate": 2e-3,
            },
        },
        claims="usage.toml",
        fidelity="partial",
        properties=("deterministic", "no-input-mutation"),
        extra="vision",
    ),
    Method(
        name="doei",
        kind="segmenter",
        family="vision",
        impl="methodbench_vision.weak.doei:DOEI",
        summary="Amplifies confident patches and class attention in a transformer, and suppresses the rest. A reading "
        "of the abstract: no code or equations were at hand.",
        paper=Paper(
            title="DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps",
            arxiv="2502.15885",
            year=2025,
            code="AIGeeksGroup/DOEI",
        ),
        presets={"host": {"gain": 0.0}},
        claims="doei.toml",
        fidelity="partial",
        properties=("deterministic", "no-input-mutation"),
        extra="vision",
    ),
    Method(
        name="donuseg",
        kind="segmenter",
        family="vision",
        impl="methodbench_vision.weak.donuseg:DoNuSeg",
        summary="Segments nuclei from one point each; the best encoder block's activation map becomes the label. The "
        "structure is the paper's, every constant a guess: its code was never released.",
        paper=Paper(
            title="Dynamic Pseudo Label Optimization in Point-Supervised Nuclei Segmentation",
            arxiv="2406.16427",
            venue="MICCAI",
            year=2024,
            code="shinning0821/MICCAI24-DoNuSeg",
        ),
        needs=("points",),
        presets={
            "static": {"dynamic": False},
            **{f"block-{block}": {"block": block} for block in range(4)},
        },
        claims="donuseg.toml",
        check_params={"epochs": 10},
        fidelity="partial",
        properties=("deterministic", "no-input-mutation"),
        extra="vision",
    ),
]
