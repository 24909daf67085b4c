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
]
