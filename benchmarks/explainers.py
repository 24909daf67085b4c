"""Maps and scores per second of explainers, beside the package grad-cam and a loop over images, in one run.

    python benchmarks/explainers.py [--models resnet56 vit_tiny] [--batch 32] [--images 1000] [--rounds 5]

Both sides explain the same batch with the same random weights on the same layer; rounds alternate between them, so
that whatever else the machine does hits both alike. Eigen-CAM takes no gradient on either side, so that one forward
pass is most of it: ``eigen-cam, forward alone`` is the peer's map beside nothing but that pass, which no Eigen-CAM of
the same network can be faster than, and ``projection`` is the principal component alone. ``insertion + deletion``
scores given maps at 28 steps in batches, against one image and one step after the other, and, for comparison, against
one image after the other with all its steps in one batch. ``--models`` takes ``resnet56`` (CIFAR-10's), ``vit_tiny``
(ViT-Tiny for 32 x 32 pixels) and names of timm. Exits with 1 where a ratio lies below its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import timm
import torch
from common import Figure, alternate, parser, report
from pytorch_grad_cam import EigenCAM as PeerEigenCAM
from pytorch_grad_cam import GradCAM as PeerGradCAM
from pytorch_grad_cam import GradCAMPlusPlus as PeerGradCAMPlusPlus
from pytorch_grad_cam import LayerCAM as PeerLayerCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import Tensor, nn

from methodbench.protocols import Explainer
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import activations, layer_names
from methodbench_vision.eigen_cam import EigenCAM, first_projection
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.grad_cam_pp import GradCAMPlusPlus
from methodbench_vision.layer_cam import LayerCAM
from methodbench_vision.models.cifar10 import CifarResNet
from methodbench_vision.tasks.faithfulness import area, class_confidence, perturbation_curves
from methodbench_vision.tasks.folding import folded

STEPS = 28
#: How many times as fast the issue of explainers asks them to be.
MAPS_LIMIT, SCORES_LIMIT = 2.0, 5.0


def built(name: str) -> tuple[LoadedModel, tuple[int, int, int]]:
    """Return a randomly initialized model and the shape of its inputs."""
    if name == "resnet56":
        module: nn.Module = CifarResNet(9)
        size = (3, 32, 32)
    elif name == "vit_tiny":
        module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)
        size = (3, 32, 32)
    else:
        module = timm.create_model(name)
        size = module.default_cfg["input_size"]
    module.eval()
    adapter = detect(module)
    return LoadedModel(name, adapter.kind, module, adapter), size


def maps_figures(model: LoadedModel, x: Tensor, target: Tensor, rounds: int) -> Iterator[Figure]:
    """Compare maps per second of each method with the peer's."""
    (name,) = layer_names(model, x)
    (maps,) = activations(model, x)
    layers = [model.module.get_submodule(name)]
    targets = [ClassifierOutputTarget(int(index)) for index in target]

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, -maps[0, 0].numel() :].transpose(1, 2).unflatten(2, maps.shape[2:])

    def sides(ours: Explainer, peer: type) -> tuple[Callable[[], object], Callable[[], object]]:
        reshape = grid if model.kind == "vit" else None
        theirs = peer(model=model.module, target_layers=layers, reshape_transform=reshape)
        return lambda: ours.explain(model, x, target), lambda: theirs(input_tensor=x, targets=targets)

    def forward() -> None:
        with torch.inference_mode():
            model.module(x)

    eigen = sides(EigenCAM(layer=name), PeerEigenCAM)
    pairs = {
        "grad-cam": sides(GradCAM(layer=name), PeerGradCAM),
        "grad-cam-pp": sides(GradCAMPlusPlus(layer=name), PeerGradCAMPlusPlus),
        "layer-cam": sides(LayerCAM(layer=name), PeerLayerCAM),
        "eigen-cam": eigen,
        "eigen-cam, sign corr": sides(EigenCAM(layer=name, sign="corr"), PeerEigenCAM),
        "eigen-cam, forward alone": (forward, eigen[1]),
        "projection": (lambda: first_projection(maps), lambda: get_2d_projection(maps.cpu().numpy())),
    }
    for method, (ours, theirs) in pairs.items():
        seconds = alternate({"ours": settled(ours), "peer": settled(theirs)}, rounds)
        rates = (len(x) / seconds["ours"], len(x) / seconds["peer"])
        limit = 0.0 if method in ("eigen-cam, forward alone", "projection") else MAPS_LIMIT
        yield Figure(f"{model.name}: {method}", *rates, limit, "maps/s")


def settled(work: Callable[[], object]) -> Callable[[], None]:
    """Return ``work`` with a wait for what it left to the GPU."""

    def run() -> None:
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    return run


def scores_figures(
    model: LoadedModel, x: Tensor, target: Tensor, batch: int, rounds: int
) -> Iterator[Figure]:
    """Compare images scored per second, in batches and in two loops over images."""
    maps = torch.rand(len(x), x.shape[2], x.shape[3], generator=torch.Generator().manual_seed(1)).to(x)

    def batched() -> Tensor:
        module, found = folded(model.module, x[:1]), []
        for images, labels, one in zip(x.split(batch), target.split(batch), maps.split(batch), strict=True):
            curves = perturbation_curves(class_confidence(module, labels), images, one, STEPS)
            found += [area(curve) for curve in curves]
        return torch.cat(found)

    def looped(at_once: int) -> None:
        counts = torch.linspace(0, maps[0].numel(), STEPS + 1).int().to(x.device)
        for image, label, one in zip(x, target, maps, strict=True):
            rank = one.flatten().argsort(descending=True, stable=True).argsort().view_as(one)
            for insertion in (True, False):
                curve: list[float] = []
                for some in counts.split(at_once):
                    bar = some[:, None, None]
                    shown = (rank < bar if insertion else rank >= bar)[:, None]
                    with torch.no_grad():
                        logits = model.module(torch.where(shown, image, 0))
                    curve += logits.softmax(1)[:, label].tolist()

    contestants = {"ours": batched, "step by step": lambda: looped(1), "all steps": lambda: looped(STEPS + 1)}
    seconds = alternate(contestants, rounds)
    for name, limit in (("step by step", SCORES_LIMIT), ("all steps", 0.0)):
        rates = (len(x) / seconds["ours"], len(x) / seconds[name])
        yield Figure(f"{model.name}: insertion + deletion, {name}", *rates, limit, "images/s")


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--models", nargs="+", default=["resnet56", "vit_tiny"])
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--images", type=int, default=1000, help="images of insertion and deletion")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", default="cpu")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    figures = []
    for name in chosen.models:
        model, size = built(name)
        model.module.to(chosen.device)
        x = torch.randn(chosen.batch, *size).to(chosen.device)
        target = torch.arange(chosen.batch, device=chosen.device) % 10
        figures += maps_figures(model, x, target, chosen.rounds)
        many = torch.randn(chosen.images, *size).to(chosen.device)
        labels = torch.arange(chosen.images, device=chosen.device) % 10
        figures += scores_figures(model, many, labels, chosen.batch, max(1, chosen.rounds // 3))
    return report(figures, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
