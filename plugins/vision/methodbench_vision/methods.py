"""Explainers, as light entries: see the modules that ``impl`` names for the methods themselves."""

from __future__ import annotations

from methodbench.entries import Method, Paper

METHODS: list[Method] = [
    Method(
        name="grad-cam",
        kind="explainer",
        family="vision",
        impl="methodbench_vision.grad_cam:GradCAM",
        summary="Weighs each channel of the last feature map by the mean gradient of the class score.",
        applies_to=("cnn", "vit"),
        paper=Paper(
            title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
            arxiv="1610.02391",
            venue="ICCV",
            year=2017,
            authors="Selvaraju, Ramprasaath R. and Cogswell, Michael and Das, Abhishek and "
            "Vedantam, Ramakrishna and Parikh, Devi and Batra, Dhruv",
            code="ramprs/grad-cam",
        ),
        presets={"smooth": {"eigen_smooth": True}},
        claims="grad-cam.toml",
        fidelity="reimplementation",
        parity="jacobgil/pytorch-grad-cam 1.5.7 (084273b)",
        vectors=("vision/cam_baselines",),
        properties=(
            "deterministic",
            "no-input-mutation",
            "scale-equivariant",
            "channel-permutation-equivariant",
            "batch-split-invariant",
            "dtype-stable",
        ),
        extra="vision",
    ),
    Method(
        name="eigen-cam",
        kind="explainer",
        family="vision",
        impl="methodbench_vision.eigen_cam:EigenCAM",
        summary="Projects the last feature map on its first principal component, without class or gradient.",
        applies_to=("cnn", "vit"),
        paper=Paper(
            title="Eigen-CAM: Class Activation Map using Principal Components",
            arxiv="2008.00299",
            venue="IJCNN",
            year=2020,
            authors="Muhammad, Mohammed Bany and Yeasin, Mohammed",
        ),
        presets={
            "sign-flip": {"sign": "flip"},
            "sign-corr": {"sign": "corr"},
            "paper": {"variant": "paper", "sign": "corr"},
            "eigen-grad-cam": {"weighting": "grad"},
            "seg-eigen-cam": {"weighting": "abs_grad", "sign": "flip"},
        },
        claims="eigen-cam.toml",
        fidelity="reimplementation",
        parity="jacobgil/pytorch-grad-cam 1.5.7 (084273b), shyhyawJou/EigenCAM-Pytorch (6ed5c2d)",
        vectors=(
            "vision/eigen_cam",
            "vision/cam_baselines",
        ),
        properties=("deterministic", "no-input-mutation", "scale-equivariant", "batch-split-invariant"),
        extra="vision",
    ),
    Method(
        name="random-cam",
        kind="explainer",
        family="vision",
        impl="methodbench_vision.random_cam:RandomCAM",
        summary="Weighs each channel of the last feature map by a number drawn from U(-1, 1): the control.",
        applies_to=("cnn", "vit"),
        fidelity="baseline",
        parity="jacobgil/pytorch-grad-cam 1.5.7 (084273b), given the same weights",
        vectors=("vision/cam_baselines",),
        properties=("deterministic", "no-input-mutation", "scale-equivariant", "batch-split-invariant"),
        baseline=True,
        extra="vision",
    ),
]
