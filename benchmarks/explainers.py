"""Maps per second of Grad-CAM and Eigen-CAM beside the package grad-cam, in one run.

    python benchmarks/explainers.py [--models resnet18 vit_tiny_patch16_224] [--batch 16] [--rounds 5]

Both sides explain the same batch with the same random weights on the same layer; rounds alternate between
them, so that whatever else the machine does hits both alike. ``forward`` is the floor, one forward pass
without gradients: Eigen-CAM takes no gradient on either side, and ``projection`` is what is left of it, the
principal component alone. ``difference`` is the largest one between the two maps. With a decided sign it is
large wherever the package's arbitrary sign is the other one; with the raw sign, where the two sides' LAPACK
differs. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from pytorch_grad_cam import EigenCAM as PeerEigenCAM
from pytorch_grad_cam import GradCAM as PeerGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import Tensor

from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import activations, layer_names
from methodbench_vision.eigen_cam import EigenCAM, first_projection
from methodbench_vision.grad_cam import GradCAM

Contestant = Callable[[], Tensor]


def contestants(
    model: LoadedModel, x: Tensor, target: Tensor
) -> dict[str, tuple[Contestant, Contestant | None]]:
    """Return our side and the peer's of each comparison."""
    (name,) = layer_names(model, x)
    (maps,) = activations(model, x)
    array = maps.numpy()
    layers = [model.module.get_submodule(name)]
    targets = [ClassifierOutputTarget(int(index)) for index in target]

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, -maps[0, 0].numel() :].transpose(1, 2).unflatten(2, maps.shape[2:])

    reshape = grid if model.kind == "vit" else None
    peers = {
        cls: cls(model=model.module, target_layers=layers, reshape_transform=reshape)
        for cls in (PeerGradCAM, PeerEigenCAM)
    }

    def peer(cls: type) -> Contestant:
        return lambda: torch.from_numpy(peers[cls](input_tensor=x, targets=targets))

    def forward() -> Tensor:
        with torch.no_grad():
            return model.module(x)

    return {
        "forward": (forward, None),
        "grad-cam": (lambda: GradCAM(layer=name).explain(model, x, target), peer(PeerGradCAM)),
        "eigen-cam": (lambda: EigenCAM(layer=name).explain(model, x, target), peer(PeerEigenCAM)),
        "eigen-cam, sign corr": (
            lambda: EigenCAM(sign="corr", layer=name).explain(model, x, target),
            peer(PeerEigenCAM),
        ),
        "projection": (
            lambda: first_projection(maps),
            lambda: torch.from_numpy(get_2d_projection(array)),
        ),
        "projection, sign corr": (
            lambda: first_projection(maps, sign="corr"),
            lambda: torch.from_numpy(get_2d_projection(array)),
        ),
    }


def compare(ours: Contestant, theirs: Contestant | None, images: int, rounds: int) -> Mapping[str, Any]:
    """Return maps per second of both sides (median over rounds), their ratio and the largest difference."""
    sides = [ours] if theirs is None else [ours, theirs]
    results = [side() for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, spent in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side()
            spent.append(time.perf_counter() - start)
    rates = [images / statistics.median(spent) for spent in seconds]
    row: dict[str, Any] = {"ours_per_s": round(rates[0], 1)}
    if theirs is not None:
        row["peer_per_s"] = round(rates[1], 1)
        row["ratio"] = round(rates[0] / rates[1], 2)
        row["difference"] = float((results[0] - results[1]).abs().max())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report: dict[str, Any] = {"torch": torch.__version__, "batch": options.batch, "threads": options.threads}
    for architecture in options.models:
        module = timm.create_model(architecture).eval()
        adapter = detect(module)
        model = LoadedModel(architecture, adapter.kind, module, adapter)
        size = module.default_cfg["input_size"]
        x, target = torch.randn(options.batch, *size), torch.arange(options.batch)
        report[architecture] = {
            name: compare(ours, theirs, options.batch, options.rounds)
            for name, (ours, theirs) in contestants(model, x, target).items()
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
