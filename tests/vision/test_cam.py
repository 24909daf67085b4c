"""What every class activation map keeps to."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.protocols import Explainer
from methodbench.torchkit.adapters import Adapter, detect
from methodbench.torchkit.model import LoadedModel, Preprocess
from methodbench.torchkit.vit_attention import recorded_attention, use_explicit_attention
from methodbench_vision.attention_rollout import AttentionRollout, rollout
from methodbench_vision.baselines import CentreGaussian, FullImage, OracleMask, RandomMap
from methodbench_vision.cam import (
    activations,
    class_scores,
    features,
    layer_names,
    min_max,
    recorded,
    saliency,
)
from methodbench_vision.class_activation_map import CAM
from methodbench_vision.eigen_cam import EigenCAM
from methodbench_vision.grad_cam import GradCAM
from methodbench_vision.grad_cam_pp import GradCAMPlusPlus
from methodbench_vision.layer_cam import LayerCAM
from methodbench_vision.models.shapes_cnn import ShapesNet
from methodbench_vision.random_cam import RandomCAM, random_weights
from methodbench_vision.score_cam import ScoreCAM, masked_scores
from methodbench_vision.tasks.maps import timed_maps

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
    "grad-cam-pp": GradCAMPlusPlus(),
    "layer-cam": LayerCAM(),
    "score-cam": ScoreCAM(batch_size=100),
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
UNDECIDED = ("grad-cam smooth", "eigen-cam", "eigen-cam per channel", "eigen-grad-cam")
DECIDED = [name for name in METHODS if name not in UNDECIDED]


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
    module = Failing().eval()
    model = LoadedModel("failing", "cnn", module, Adapter(kind="cnn", stages=("features",)))
    with pytest.raises(RuntimeError, match="boom"):
        method.explain(model, x, target)
    assert torch.is_grad_enabled()
    assert not module.features._forward_hooks


def test_reading_a_transformers_norm_runs_nothing_behind_it(x: Tensor) -> None:
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES
    )
    model = loaded(vit)
    whole = []
    handle = vit.blocks[1].norm1.register_forward_hook(lambda _layer, _args, output: whole.append(output))
    with torch.inference_mode():
        vit(x)
    handle.remove()
    ran = []
    handles = [
        layer.register_forward_hook(lambda _layer, _args, _output, name=name: ran.append(name))
        for name, layer in vit.named_modules()
        if name in ("blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "head")
    ]
    (found,) = activations(model, x)
    assert ran == ["blocks.0.mlp"]
    assert torch.equal(found, whole[0][:, 1:].mT.unflatten(2, (4, 6)))
    # Of a layer that may run several times the last output counts, so that the whole network runs.
    activations(model, x, layer="blocks.0.mlp.act")
    assert ran[-1] == "head"
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_hooks for layer in vit.modules())
    assert not torch.is_inference_mode_enabled()


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
        (ScoreCAM, {"batch_size": 0}, "batch_size"),
        (AttentionRollout, {"discard_ratio": 1.0}, "discard_ratio"),
        (AttentionRollout, {"head_fusion": "sum"}, "head_fusion"),
        (CentreGaussian, {"sigma": 0.0}, "sigma"),
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
        "GradCAMPlusPlus": GradCAMPlusPlus(),
        "LayerCAM": LayerCAM(),
        "ScoreCAM": ScoreCAM(),
    }
    for cls, method in pairs.items():
        ours = method.explain(model, x, target)
        torch.testing.assert_close(ours, theirs(cls), rtol=0, atol=1e-4, msg=cls)
    smooth = GradCAM(eigen_smooth=True).explain(model, x, target)
    torch.testing.assert_close(smooth, theirs("GradCAM", eigen_smooth=True), rtol=0, atol=1e-4)


# What comes in.

READERS = {**METHODS, "cam": CAM(), "attention-rollout": AttentionRollout()}


@pytest.mark.parametrize("name", READERS)
def test_a_model_in_training_mode_is_refused(
    model: LoadedModel, x: Tensor, target: Tensor, name: str
) -> None:
    model.module.train()
    with pytest.raises(NotApplicableError, match=r"training mode[^\n]*\n[^\n]*eval\(\)"):
        READERS[name].explain(model, x, target)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda x: x[:, :1], "1 channels, toy takes 3"),
        (lambda x: torch.cat([x, x[:, :1]], 1), "4 channels, toy takes 3"),
        (lambda x: x[0], "floating point"),
        (lambda x: x.to(torch.uint8), "floating point"),
        (lambda x: x[:0], "floating point"),
        (lambda x: x.index_fill(3, torch.tensor([2]), torch.nan), "not finite"),
    ],
    ids=["grayscale", "alpha", "no batch", "bytes", "empty", "nan"],
)
def test_what_is_no_batch_of_images_is_refused(
    model: LoadedModel, x: Tensor, target: Tensor, name: str, damage: Any, reason: str
) -> None:
    model = dataclasses.replace(model, preprocess=Preprocess((32, 48), (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ParameterError, match=reason):
        READERS[name].explain(model, damage(x), target)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [(31, 45), (17, 64)])
def test_odd_sizes_give_maps_of_that_size(target: Tensor, name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    maps = METHODS[name].explain(loaded(ShapesNet()), torch.randn(3, 3, *size), target)
    assert maps.shape == (3, *size)
    assert bool(maps.isfinite().all())


@pytest.mark.parametrize("name", READERS)
def test_constant_images_give_finite_maps_in_0_to_1(model: LoadedModel, target: Tensor, name: str) -> None:
    if name in ("cam", "attention-rollout") and (name == "cam") != (model.kind == "cnn"):
        pytest.skip("not for this kind of model")
    maps = READERS[name].explain(model, torch.zeros(3, 3, 32, 48), target)
    assert bool(maps.isfinite().all())
    assert float(maps.min()) >= 0
    assert float(maps.max()) <= 1 + 1e-6


@pytest.mark.parametrize("method", [GradCAM(), GradCAMPlusPlus(), LayerCAM()])
def test_a_class_score_that_ignores_the_picture_gives_a_zero_map(
    x: Tensor, target: Tensor, method: Any
) -> None:
    model = loaded(ShapesNet())
    torch.nn.init.zeros_(model.module.get_parameter("fc.weight"))
    assert torch.equal(method.explain(model, x, target), torch.zeros(3, 32, 48))


@pytest.mark.parametrize("name", ["cam", "score-cam", "grad-cam-pp", "layer-cam"])
@pytest.mark.parametrize("classes", [[0, 1, CLASSES], [0, -1, 0], [0, 1]])
def test_every_method_that_asks_for_a_class_refuses_wrong_ones(
    x: Tensor, name: str, classes: list[int]
) -> None:
    with pytest.raises(ParameterError, match=r"classes in 0\.\.3"):
        READERS[name].explain(loaded(ShapesNet()), x, torch.tensor(classes))


# Laws of single methods.


def test_cam_grad_cam_and_layer_cam_relate_as_the_formulas_say(x: Tensor, target: Tensor) -> None:
    torch.manual_seed(0)
    model = loaded(ShapesNet())
    torch.testing.assert_close(
        CAM().explain(model, x, target), GradCAM().explain(model, x, target), rtol=0, atol=1e-5
    )
    with torch.no_grad():
        model.module.get_parameter("fc.weight").clamp_(min=0)
    torch.testing.assert_close(
        LayerCAM().explain(model, x, target), GradCAM().explain(model, x, target), rtol=0, atol=1e-5
    )


def test_a_constant_on_every_logit_changes_no_map(model: LoadedModel, x: Tensor, target: Tensor) -> None:
    before = {name: METHODS[name].explain(model, x, target) for name in DECIDED}
    head = model.adapter.head(model.module)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias += 3.0
    for name, maps in before.items():
        torch.testing.assert_close(METHODS[name].explain(model, x, target), maps, rtol=0, atol=1e-4, msg=name)


def test_cam_refuses_networks_without_a_global_mean_and_a_linear(x: Tensor, target: Tensor) -> None:
    class Squared(ShapesNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(self.features(x)).flatten(1) ** 2)

    torch.manual_seed(0)
    with pytest.raises(NotApplicableError, match="more than a global mean"):
        CAM().explain(loaded(Squared()), x, target)
    headless = branches(inplace=False)
    with pytest.raises(NotApplicableError, match="one Linear"):
        CAM().explain(headless, x, target)


def test_score_cam_weighs_a_channel_by_what_it_lets_through(x: Tensor, target: Tensor) -> None:
    torch.manual_seed(0)
    model = loaded(ShapesNet())
    maps = torch.rand(3, 2, 8, 12)
    maps[:, 1] = 0
    scores = masked_scores(model, x, target, maps, batch_size=4)
    nothing = class_scores(model, torch.zeros_like(x), target)
    torch.testing.assert_close(scores[:, 1], nothing)
    large = torch.nn.functional.interpolate(maps[:1, :1], (32, 48), mode="bilinear", align_corners=True)
    shown = x[:1] * (large - large.min()) / (large.max() - large.min())
    torch.testing.assert_close(scores[0, 0], class_scores(model, shown, target[:1])[0], rtol=1e-4, atol=1e-4)


def vit(**options: Any) -> LoadedModel:
    torch.manual_seed(0)
    module = timm.models.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=CLASSES, **options
    )
    return loaded(module)


@pytest.mark.parametrize("normalize", ["row", "legacy"])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"qk_norm": True}])
def test_rollout_explains_batches_like_images_and_leaves_the_model_alone(
    x: Tensor, target: Tensor, normalize: Any, options: dict[str, Any]
) -> None:
    model, method = vit(**options), AttentionRollout(normalize=normalize, discard_ratio=0.3)
    maps = method.explain(model, x, target)
    assert maps.shape == (3, 32, 48)
    alone = torch.cat([method.explain(model, x[i : i + 1], target[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(maps, alone, rtol=0, atol=1e-5)
    assert not any(layer._forward_hooks for layer in model.module.modules())
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(3), rtol=0, atol=0.35)


def test_recorded_attention_is_what_the_model_attends_with(x: Tensor) -> None:
    model = vit(qk_norm=True)
    with recorded_attention(model.module, model.adapter) as held, torch.inference_mode():
        plain = model.module(x)
    assert list(held) == [f"blocks.{index}.attn" for index in range(3)]
    explicit = model.clone()
    replaced = use_explicit_attention(explicit.module, explicit.adapter)
    seen: dict[str, Tensor] = {}
    for name, attention in replaced.items():
        attention.matmul2.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
    with torch.inference_mode():
        torch.testing.assert_close(explicit.module(x), plain)
    for name, probabilities in held.items():
        torch.testing.assert_close(probabilities, seen[name])


def test_the_papers_rollout_keeps_rows_that_sum_to_one_and_of_uniform_attention_is_uniform() -> None:
    uniform = [torch.full((2, 3, 5, 5), 0.2)] * 4
    joined = rollout(uniform, discard_ratio=0.0, normalize="row")
    torch.testing.assert_close(joined.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(joined[:, 0, 1:], joined[:, :1, 1].expand(2, 4))
    skewed = [torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(3)]
    torch.testing.assert_close(rollout(skewed, discard_ratio=0.5, normalize="row").sum(-1), torch.ones(2, 5))


def test_rollout_drops_the_smallest_entries_but_never_the_first() -> None:
    attention = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    kept = rollout([attention], discard_ratio=0.5, normalize="row")[0]
    expected = torch.tensor([[1.0, 0, 0], [0, 5, 6], [7, 8, 9]]) + torch.eye(3)
    torch.testing.assert_close(kept, expected / expected.sum(1, keepdim=True))


def test_rollout_needs_a_class_token_and_blocks(x: Tensor, target: Tensor) -> None:
    with pytest.raises(NotApplicableError, match="no class token"):
        AttentionRollout().explain(vit(class_token=False, global_pool="avg"), x, target)
    with pytest.raises(NotApplicableError, match="no blocks"):
        rollout([])


# Rows that do not look at the model.


def test_rows_of_every_table_are_what_their_names_say(model: LoadedModel, x: Tensor, target: Tensor) -> None:
    noise = RandomMap().explain(model, x, target)
    torch.testing.assert_close(RandomMap().explain(model, x.flip(0), target), noise.flip(0))
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(RandomMap(seed=1).explain(model, x, target), noise)
    gaussian = CentreGaussian().explain(model, x, target)
    torch.testing.assert_close(gaussian, gaussian.flip(1))
    torch.testing.assert_close(gaussian, gaussian.flip(2))
    assert gaussian[0].argmax() in (15 * 48 + 23, 15 * 48 + 24, 16 * 48 + 23, 16 * 48 + 24)
    assert float(gaussian[0, 16, 36]) == pytest.approx(np.exp(-0.5 * (12.5 / 12) ** 2), abs=0.01)
    assert torch.equal(FullImage().explain(model, x, target), torch.ones(3, 32, 48))


def test_the_oracle_is_told_the_truth_and_refuses_to_guess(
    model: LoadedModel, x: Tensor, target: Tensor
) -> None:
    masks = torch.rand(3, 32, 48) > 0.7
    maps, _ = timed_maps(OracleMask(), model, x, target, masks)
    assert torch.equal(maps, masks.float())
    with pytest.raises(NotApplicableError, match="true masks"):
        timed_maps(OracleMask(), model, x, target)
