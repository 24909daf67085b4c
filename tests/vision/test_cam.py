"""What every class activation map keeps to."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.protocols import Explainer
from methodbench.torchkit.adapters import Adapter, detect
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import activations, features, layer_names, min_max, recorded, saliency
from methodbench_vision.eigen_cam import EigenCAM
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.models.shapes_cnn import ShapesNet
from methodbench_vision.random_cam import RandomCAM, random_weights

METHODS: dict[str, Any] = {
    "grad-cam": GradCAM(),
    "grad-cam smooth": GradCAM(eigen_smooth=True),
    "eigen-cam": EigenCAM(),
    "eigen-cam corr": EigenCAM(sign="corr"),
    "eigen-cam paper": EigenCAM(variant="paper", sign="flip"),
    "eigen-cam per channel": EigenCAM(variant="per_channel"),
    "eigen-grad-cam": EigenCAM(weighting="grad"),
    "seg-eigen-cam": EigenCAM(weighting="abs_grad", sign="flip"),
    "random-cam": RandomCAM(),
}
CLASSES = 4


def loaded(module: nn.Module) -> LoadedModel:
    adapter = detect(module)
    return LoadedModel("toy", adapter.kind, module.eval(), adapter)


@pytest.fixture(params=["cnn", "vit"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """An untrained classifier of 32 x 48 pixels."""
    torch.manual_seed(0)
    if request.param == "cnn":
        return loaded(ShapesNet())
    vit = timm.models.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES, reg_tokens=3
    )
    return loaded(vit)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def target() -> Tensor:
    return torch.tensor([0, 3, 1])


@pytest.mark.parametrize("name", METHODS)
def test_maps_are_as_large_as_the_image_and_lie_in_0_to_1(
    model: LoadedModel, x: Tensor, target: Tensor, name: str
) -> None:
    maps = METHODS[name].explain(model, x, target)
    assert maps.shape == (3, 32, 48)
    assert maps.dtype == torch.float32
    assert float(maps.min()) == 0
    assert float(maps.max()) == pytest.approx(1, abs=1e-5)


# A raw sign may turn on the last bit of an activation, which depends on the batch.
DECIDED = ("grad-cam", "eigen-cam corr", "eigen-cam paper", "seg-eigen-cam", "random-cam")


@pytest.mark.parametrize("name", DECIDED)
def test_a_batch_is_explained_like_its_images_one_by_one(
    model: LoadedModel, x: Tensor, target: Tensor, name: str
) -> None:
    together = METHODS[name].explain(model, x, target)
    alone = torch.cat([METHODS[name].explain(model, x[i : i + 1], target[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_call_gives_the_same_maps(model: LoadedModel, x: Tensor, target: Tensor, name: str) -> None:
    assert torch.equal(METHODS[name].explain(model, x, target), METHODS[name].explain(model, x, target))


@pytest.mark.parametrize("name", METHODS)
def test_explaining_leaves_model_and_gradient_mode_as_they_were(
    model: LoadedModel, x: Tensor, target: Tensor, name: str
) -> None:
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    METHODS[name].explain(model, x, target)
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[key], value) for key, value in model.module.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.module.parameters())
    assert not any(layer._forward_hooks for layer in model.module.modules())


class Failing(nn.Module):
    """A classifier that fails behind its feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.features(x)
        raise RuntimeError("boom")


@pytest.mark.parametrize("method", [GradCAM(layer="features"), EigenCAM(layer="features")])
def test_hooks_and_gradient_mode_are_restored_when_the_model_fails(
    x: Tensor, target: Tensor, method: Any
) -> None:
    module = Failing()
    model = LoadedModel("failing", "cnn", module, Adapter(kind="cnn", stages=("features",)))
    with pytest.raises(RuntimeError, match="boom"):
        method.explain(model, x, target)
    assert torch.is_grad_enabled()
    assert not module.features._forward_hooks


def test_the_graph_begins_at_the_layer_that_is_read(model: LoadedModel, x: Tensor) -> None:
    (name,) = layer_names(model, x)
    with recorded(model.module, [name], gradients=True) as held:
        model.module(x)
        assert torch.is_grad_enabled()
    assert held[name].is_leaf
    assert torch.is_grad_enabled()


def test_gradients_of_the_tail_equal_those_of_the_whole_network(
    model: LoadedModel, x: Tensor, target: Tensor
) -> None:
    (name,) = layer_names(model, x)
    (pair,) = features(model, x, target, layer=name, prefix_tokens=0 if model.kind == "cnn" else None)
    outputs: list[Tensor] = []
    handle = model.module.get_submodule(name).register_forward_hook(lambda _m, _a, out: outputs.append(out))
    score = model.module(x).gather(1, target[:, None]).sum()
    handle.remove()
    expected = torch.autograd.grad(score, outputs)[0]
    if model.kind == "vit":
        expected = expected[:, 4:].transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(pair.gradient, expected)


def test_frozen_parameters_make_no_difference(model: LoadedModel, x: Tensor, target: Tensor) -> None:
    expected = GradCAM().explain(model, x, target)
    model.module.requires_grad_(False)
    torch.testing.assert_close(GradCAM().explain(model, x, target), expected)


class Branches(nn.Module):
    """Two convolutions side by side whose sum an in-place ReLU overwrites; a layer that nothing reads."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU(inplace=inplace)
        self.idle, self.unread = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.unread(x)
        left, right = self.relu(self.left(x)), self.right(x)
        return self.fc((left + right).mean((2, 3)))


def branches(inplace: bool) -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel("branches", "cnn", Branches(inplace).eval(), Adapter(kind="cnn", stages=("left",)))


def test_an_in_place_activation_does_not_reach_what_is_kept(x: Tensor, target: Tensor) -> None:
    plain = features(branches(inplace=False), x, target, layer="left")[0]
    inplace = features(branches(inplace=True), x, target, layer="left")[0]
    assert bool((plain.activation < 0).any())
    torch.testing.assert_close(inplace, plain)
    assert torch.equal(activations(branches(inplace=True), x, layer="left")[0], plain.activation)


def test_layers_side_by_side_each_get_their_gradient(x: Tensor, target: Tensor) -> None:
    both = features(branches(inplace=True), x, target, layer=("right", "left"))
    for name, pair in zip(("right", "left"), both, strict=True):
        torch.testing.assert_close(pair, features(branches(inplace=True), x, target, layer=name)[0])


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [("test_resnet", "layer4"), ("test_efficientnet", "bn2"), ("test_vit", "blocks.5.norm1")],
)
def test_the_last_feature_maps_are_found_by_structure(architecture: str, layer: str) -> None:
    model = loaded(timm.create_model(architecture))
    assert layer_names(model, torch.zeros(1, 3, 160, 160)) == [layer]


def test_a_layer_that_does_not_exist_is_named(model: LoadedModel, x: Tensor, target: Tensor) -> None:
    with pytest.raises(ParameterError, match="no layer 'nowhere'"):
        GradCAM(layer="nowhere").explain(model, x, target)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [("fc", "not feature maps"), ("idle", "does not run"), ("unread", "does not depend")],
)
def test_a_layer_without_maps_or_influence_is_refused(
    x: Tensor, target: Tensor, layer: str, reason: str
) -> None:
    with pytest.raises(NotApplicableError, match=reason):
        GradCAM(layer=layer).explain(branches(inplace=False), x, target)


def test_tokens_that_fill_no_grid_are_refused(x: Tensor, target: Tensor) -> None:
    vit = timm.models.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=CLASSES
    )
    with pytest.raises(NotApplicableError, match="do not fill a grid"):
        GradCAM(prefix_tokens=3).explain(loaded(vit), x, target)


@pytest.mark.parametrize("classes", [[0, 1, CLASSES], [0, -1, 0], [0, 1]])
def test_targets_that_are_no_classes_are_refused(model: LoadedModel, x: Tensor, classes: list[int]) -> None:
    with pytest.raises(ParameterError, match=r"classes in 0\.\.3"):
        GradCAM().explain(model, x, torch.tensor(classes))


@pytest.mark.parametrize(
    ("cls", "passed", "field"),
    [
        (GradCAM, {"prefix_tokens": -1}, "prefix_tokens"),
        (EigenCAM, {"sign": "up"}, "sign"),
        (EigenCAM, {"variant": "kernel"}, "variant"),
        (RandomCAM, {"seed": -1}, "seed"),
    ],
)
def test_hyperparameters_out_of_range_are_named(cls: type, passed: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match=field):
        build(cls, passed, "toy")


def test_a_constant_map_becomes_zero() -> None:
    assert torch.equal(min_max(torch.full((2, 3, 4), 7.0)), torch.zeros(2, 3, 4))
    assert torch.equal(saliency([-torch.rand(2, 3, 4)], (6, 8)), torch.zeros(2, 6, 8))


def test_random_weights_depend_on_seed_and_image_alone(x: Tensor) -> None:
    weights = random_weights(x, 500, seed=0)
    assert float(weights.abs().max()) <= 1
    assert float(weights.min()) < -0.9
    assert float(weights.max()) > 0.9
    torch.testing.assert_close(random_weights(x.flip(0), 500, seed=0), weights.flip(0))
    assert not torch.equal(random_weights(x, 500, seed=1), weights)
    assert len(weights.unique(dim=0)) == len(x)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_maps_equal_those_of_pytorch_grad_cam(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    model = loaded(timm.create_model(architecture))
    x, target = torch.randn(3, 3, 160, 160), torch.tensor([1, 5, 7])
    (name,) = layer_names(model, x)
    (activation,) = activations(model, x)
    weights = random_weights(x, activation.shape[1], seed=0).numpy()

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, activation.shape[2:])

    def theirs(cls: str, **options: bool) -> Tensor:
        layers = [model.module.get_submodule(name)]
        explainer = getattr(package, cls)(
            model=model.module, target_layers=layers, reshape_transform=grid if model.kind == "vit" else None
        )
        targets = [ClassifierOutputTarget(int(index)) for index in target]
        return torch.from_numpy(explainer(input_tensor=x, targets=targets, **options))

    monkeypatch.setattr("numpy.random.uniform", lambda low, high, size: weights)
    pairs: dict[str, Explainer] = {
        "GradCAM": GradCAM(),
        "SegEigenCAM": EigenCAM(weighting="abs_grad", sign="flip"),
        "EigenCAM": EigenCAM(),
        "EigenGradCAM": EigenCAM(weighting="grad"),
        "RandomCAM": RandomCAM(),
    }
    for cls, method in pairs.items():
        ours = method.explain(model, x, target)
        torch.testing.assert_close(ours, theirs(cls), rtol=0, atol=1e-4, msg=cls)
    smooth = GradCAM(eigen_smooth=True).explain(model, x, target)
    torch.testing.assert_close(smooth, theirs("GradCAM", eigen_smooth=True), rtol=0, atol=1e-4)
