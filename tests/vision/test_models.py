"""Image models: recipes, checkpoints, and timm's repositories."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from methodbench.context import Context
from methodbench.entries import Model
from methodbench.errors import DivergedError, MethodbenchError, NotApplicableError, SourceError
from methodbench.params import build
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.seeding import repeatable
from methodbench_vision.models.cifar10 import CifarResNet, ResNetCifar10, ViTTinyCifar10, build_vit, shortcut
from methodbench_vision.models.digits_vit import DigitsViT
from methodbench_vision.models.digits_vit import build as build_digits_vit
from methodbench_vision.models.efficientnet import EfficientNetLite0, timm_names
from methodbench_vision.models.entries import MODELS, model_named
from methodbench_vision.models.outlier_channels import spread_channels
from methodbench_vision.models.shapes_cnn import ShapesCNN, ShapesNet
from methodbench_vision.models.shapes_vit import ShapesViT
from methodbench_vision.models.storage import load_weights, read_checkpoint, save_weights
from methodbench_vision.models.timm_hub import TimmHub
from methodbench_vision.models.training import check_accuracy
from methodbench_vision.tasks.accuracy import ImageAccuracy
from methodbench_vision.tasks.datasets import CIFAR10_CLASSES, imagenet_classes
from methodbench_vision.tasks.images import sample_pictures, to_inputs

LOADERS = {
    "cifar10": (ResNetCifar10, ViTTinyCifar10),
    "digits_vit": (DigitsViT,),
    "efficientnet": (EfficientNetLite0,),
    "shapes_cnn": (ShapesCNN,),
    "shapes_vit": (ShapesViT,),
}


def logits(model: LoadedModel, seed: int = 0) -> torch.Tensor:
    assert model.preprocess is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        return model.module(torch.randn(4, 3, *model.preprocess.size, generator=generator))


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_every_entry_names_a_loader_that_takes_its_options(entry: Model) -> None:
    module, _, attribute = entry.loader.partition(":")
    loaders = {cls.__name__: cls for cls in LOADERS[module.rpartition(".")[2]]}
    loader = build(loaders[attribute], entry.options, entry.name)
    assert all(getattr(loader, name) == value for name, value in entry.options.items())


def test_digits_vit_learns_and_is_frozen_in_eval_mode(digits_model: LoadedModel, ctx: Context) -> None:
    accuracy = ImageAccuracy().evaluate(digits_model, ctx).scores["accuracy"].values.mean()
    assert accuracy > 0.2, "twice better than chance after three epochs"
    assert not digits_model.module.training
    assert not any(parameter.requires_grad for parameter in digits_model.module.parameters())
    assert digits_model.adapter.kind == "vit"
    assert len(digits_model.adapter.targets(digits_model.module)) == 12


def test_training_is_repeatable_and_leaves_the_global_generator_alone(tmp_path: Path, ctx: Context) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    threads = torch.get_num_threads()
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        folder.mkdir()
        torch.manual_seed(7 + seed)
        before = torch.get_rng_state()
        DigitsViT(epochs=1, seed=seed, min_accuracy=0.0).prepare(None, folder, ctx)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    first, same, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == same
    assert first != other


def test_training_that_falls_short_is_an_error(tmp_path: Path, ctx: Context) -> None:
    with pytest.raises(DivergedError, match="held-out"):
        DigitsViT(epochs=1, min_accuracy=1.0).prepare(None, tmp_path, ctx)
    assert not list(tmp_path.iterdir())


def test_accuracy_check_passes_at_the_bound_and_fails_above_it() -> None:
    inputs = torch.eye(4)
    labels = torch.tensor([0, 1, 2, 0])
    check_accuracy(nn.Identity(), inputs, labels, 0.75)
    with pytest.raises(DivergedError, match=r"75\.0%"):
        check_accuracy(nn.Identity(), inputs, labels, 0.76)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_outlier_channels_preserve_the_function_and_spread_the_activations(
    digits_folder: Path, scale: float, ctx: Context
) -> None:
    plain, spread = (DigitsViT().load(digits_folder, ctx) for _ in range(2))
    spread_channels(spread.module, spread.adapter, scale, 2, torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(spread), logits(plain), rtol=1e-4, atol=1e-4)
    for before, after in zip(
        plain.adapter.blocks(plain.module), spread.adapter.blocks(spread.module), strict=True
    ):
        for name in ("norm1", "norm2"):
            old, new = before.get_submodule(name).weight, after.get_submodule(name).weight
            assert isinstance(old, torch.Tensor)
            assert isinstance(new, torch.Tensor)
            assert (new / old).max() > 10 * (new / old).median()


def test_outlier_option_changes_the_stored_weights_but_not_the_outputs(
    digits_folder: Path, tmp_path: Path, ctx: Context
) -> None:
    loader = DigitsViT(epochs=3, min_accuracy=0.0, outlier_scale=1.0)
    loader.prepare(None, tmp_path, ctx)
    spread = loader.load(tmp_path, ctx)
    torch.testing.assert_close(
        logits(spread), logits(DigitsViT().load(digits_folder, ctx)), rtol=1e-4, atol=1e-4
    )
    qkv = "blocks.0.attn.qkv.weight"
    stored, plain = (load_file(folder / "model.safetensors")[qkv] for folder in (tmp_path, digits_folder))
    assert not torch.allclose(stored, plain)


def test_the_vit_of_cifar10_has_the_same_variant(tmp_path: Path, ctx: Context) -> None:
    weights = build_vit().state_dict()
    source = tmp_path / "weights.safetensors"
    save_file(weights, source)
    models = []
    for scale in (0.0, 1.0):
        loader, folder = ViTTinyCifar10(outlier_scale=scale), tmp_path / str(scale)
        folder.mkdir()
        loader.prepare(source, folder, ctx)
        models.append(loader.load(folder, ctx))
    plain, spread = models
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spread.module(x), plain.module(x), rtol=1e-3, atol=1e-3)
    qkv = "blocks.0.attn.qkv.weight"
    assert not torch.allclose(spread.module.get_parameter(qkv), plain.module.get_parameter(qkv))
    assert (plain.facts["outlier_scale"], spread.facts["outlier_scale"]) == (0.0, 1.0)


def test_shapes_net_is_a_cnn_of_four_stages_over_16_by_16_cells() -> None:
    net = ShapesNet().eval()
    with torch.inference_mode():
        assert net.features(torch.zeros(2, 3, 64, 64)).shape == (2, 72, 16, 16)
        assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_shapes_vit_has_an_adapter_that_knows_its_patches(tmp_path: Path, ctx: Context) -> None:
    ShapesViT(epochs=1, images=50, min_accuracy=0.0).prepare(None, tmp_path, ctx)
    model = ShapesViT().load(tmp_path, ctx)
    assert model.adapter.patch_grid(model.module) == (8, 8)
    assert model.adapter.prefix_tokens(model.module) == 1
    assert model.module(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    assert model.facts["data"] == "procedural-shapes"


@pytest.mark.slow
def test_shapes_cnn_recipe_reaches_its_accuracy(tmp_path: Path, ctx: Context) -> None:
    loader = ShapesCNN()
    loader.prepare(None, tmp_path, ctx)
    model = loader.load(tmp_path, ctx)
    assert model.facts["data"] == "procedural-shapes"
    assert len(model.adapter.blocks(model.module)) == 4


@pytest.mark.slow
def test_digits_vit_recipe_reaches_its_accuracy(tmp_path: Path, ctx: Context) -> None:
    loader = DigitsViT()
    loader.prepare(None, tmp_path, ctx)
    accuracy = ImageAccuracy().evaluate(loader.load(tmp_path, ctx), ctx).scores["accuracy"].values.mean()
    assert accuracy >= loader.min_accuracy


def port_names() -> list[str]:
    """Names of the checkpoint's tensors, in its order: sixteen blocks between stem and head."""
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = [("_conv_stem", "_bn0")]
    for block in range(16):
        pairs = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        pairs = pairs if block == 0 else [("_expand_conv", "_bn0"), *pairs]
        layers += [(f"_blocks.{block}.{conv}", f"_blocks.{block}.{norm}") for conv, norm in pairs]
    layers.append(("_conv_head", "_bn1"))
    names = []
    for conv, norm in layers:
        names += [f"{conv}.weight", *(f"{norm}.{leaf}" for leaf in batch_norm)]
    return [*names, "_fc.weight", "_fc.bias"]


def test_efficientnet_names_map_one_to_one_and_in_order() -> None:
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = timm_names(dict(zip(port_names(), expected.values(), strict=True)))
    assert list(renamed) == list(expected)
    assert all(renamed[name] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["_blocks.16._bn1.weight", "_blocks.0._expand_conv.weight", "fc.weight"])
def test_efficientnet_refuses_tensors_of_another_network(name: str) -> None:
    with pytest.raises(SourceError, match="EfficientNet-Lite0 does not have"):
        timm_names({name: torch.zeros(1)})


@pytest.mark.slow
@pytest.mark.parametrize("real_file", ["efficientnet-lite0"], indirect=True)
def test_efficientnet_names_what_the_sample_pictures_show(
    real_file: Path, tmp_path: Path, ctx: Context
) -> None:
    loader = EfficientNetLite0()
    loader.prepare(real_file, tmp_path, ctx)
    model = loader.load(tmp_path, ctx)
    assert model.preprocess is not None
    wanted = {"cat": "cat", "coffee": "espresso", "rocket": "missile", "china": "palace", "flower": "daisy"}
    pictures = [picture for picture in sample_pictures() if picture.name in wanted]
    with torch.inference_mode():
        top = model.module(to_inputs([picture.rgb for picture in pictures], model.preprocess)).topk(5).indices
    named = {
        picture.name: " ".join(model.classes[index] for index in row.tolist()).lower()
        for picture, row in zip(pictures, top, strict=True)
    }
    for name, word in wanted.items():
        assert word in named[name]


def write_resnet(path: Path, blocks: int, **extra: float) -> CifarResNet:
    torch.manual_seed(0)
    net = CifarResNet(blocks).eval()
    weights = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": weights, **extra}, path)
    return net


def test_resnet_checkpoint_round_trips(tmp_path: Path, ctx: Context) -> None:
    net = write_resnet(tmp_path / "net.th", 3, best_prec1=91.0)
    folder = tmp_path / "prepared"
    folder.mkdir()
    loader = ResNetCifar10(depth=20)
    loader.prepare(tmp_path / "net.th", folder, ctx)
    model = loader.load(folder, ctx)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model.module(x), net(x))
    assert model.classes == CIFAR10_CLASSES
    assert model.adapter.block_names(model.module) == ["layer1", "layer2", "layer3"]


def test_resnet_of_another_depth_is_refused(tmp_path: Path, ctx: Context) -> None:
    write_resnet(tmp_path / "net.th", 1)
    folder = tmp_path / "prepared"
    folder.mkdir()
    loader = ResNetCifar10(depth=20)
    loader.prepare(tmp_path / "net.th", folder, ctx)
    with pytest.raises(SourceError, match="do not fit the architecture"):
        loader.load(folder, ctx)


def test_resnet_depth_must_be_six_n_plus_two() -> None:
    with pytest.raises(MethodbenchError, match="6 n"):
        build(ResNetCifar10, {"depth": 21}, "resnet")


def test_resnet_parameter_counts_are_the_papers() -> None:
    counts = [sum(p.numel() for p in CifarResNet((depth - 2) // 6).parameters()) for depth in (20, 56)]
    assert [round(count / 1e6, 2) for count in counts] == [0.27, 0.85]


def test_shortcut_subsamples_and_centres_the_channels() -> None:
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    y = shortcut(x, stride=2, added=2)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_pickled_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"state_dict": Payload()}, tmp_path / "bad.th")
    with pytest.raises(SourceError, match=r"bad\.th"):
        read_checkpoint(tmp_path / "bad.th")
    assert not (tmp_path / "ran").exists()


def test_truncated_weights_are_named(tmp_path: Path, ctx: Context) -> None:
    save_weights(build_digits_vit().state_dict(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SourceError, match="cannot be read as safetensors"):
        load_weights(build_digits_vit(), tmp_path, ctx)


def test_half_precision_weights_are_stored_in_single_precision(tmp_path: Path) -> None:
    save_weights({"a": torch.ones(2).half(), "count": torch.tensor(3)}, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["a"].dtype == torch.float32
    assert stored["count"].dtype == torch.int64


def test_weights_take_the_dtype_of_the_cell(digits_folder: Path) -> None:
    model = DigitsViT().load(digits_folder, Context(dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("real_file", "loader", "least"),
    [
        ("vit-tiny-cifar10", ViTTinyCifar10(), 0.83),
        ("resnet20-cifar10", ResNetCifar10(depth=20), 0.78),
        ("resnet56-cifar10", ResNetCifar10(depth=56), 0.79),
    ],
    indirect=["real_file"],
)
def test_cifar10_models_classify_real_images(
    real_file: Path, loader: ViTTinyCifar10 | ResNetCifar10, least: float, tmp_path: Path, ctx: Context
) -> None:
    loader.prepare(real_file, tmp_path, ctx)
    try:
        result = ImageAccuracy(data="cifar10", images=400).evaluate(loader.load(tmp_path, ctx), ctx)
    except SourceError as error:
        pytest.skip(error.message)
    assert result.scores["accuracy"].values.mean() >= least


def write_repository(
    folder: Path, architecture: str, classes: int, *, nested: bool = True, **cfg: object
) -> nn.Module:
    """A stand-in for a snapshot of a repository in timm's format."""
    folder.mkdir()
    torch.manual_seed(0)
    net = timm.create_model(architecture, num_classes=classes).eval()
    config: dict[str, object] = {"architecture": architecture, "num_classes": classes}
    config |= {"pretrained_cfg": cfg} if nested else cfg
    (folder / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), folder / "model.safetensors")
    return net


@pytest.mark.parametrize("nested", [True, False])
def test_hub_repository_gives_its_outputs_and_its_preprocessing(
    nested: bool, tmp_path: Path, ctx: Context
) -> None:
    net = write_repository(
        tmp_path / "repo",
        "resnet18",
        3,
        nested=nested,
        input_size=[3, 64, 64],
        mean=[0.5, 0.5, 0.5],
        std=[0.25, 0.25, 0.25],
        crop_pct=0.9,
        interpolation="bilinear",
        label_names=["ant", "bee", "cow"],
    )
    folder = tmp_path / "prepared"
    folder.mkdir()
    loader = TimmHub(kind="cnn")
    loader.prepare(tmp_path / "repo", folder, ctx)
    model = loader.load(folder, ctx)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.module(x), net(x))
    assert model.classes == ("ant", "bee", "cow")
    assert model.preprocess is not None
    assert model.preprocess.size == (64, 64)
    assert (model.preprocess.mean[0], model.preprocess.std[0]) == (0.5, 0.25)
    assert (model.preprocess.crop, model.preprocess.interpolation) == (0.9, "bilinear")


def test_hub_models_of_a_thousand_classes_have_imagenets_names(tmp_path: Path, ctx: Context) -> None:
    write_repository(tmp_path / "repo", "mobilenetv3_small_050", 1000)
    model = TimmHub(kind="cnn").load(tmp_path / "repo", ctx)
    assert model.classes == imagenet_classes()
    assert model.classes[285] == "Egyptian cat"


def test_hub_model_of_another_kind_than_its_name_promises_is_refused(tmp_path: Path, ctx: Context) -> None:
    write_repository(tmp_path / "repo", "resnet18", 2)
    with pytest.raises(NotApplicableError, match="resnet18 is a cnn by its structure"):
        TimmHub(kind="vit").load(tmp_path / "repo", ctx)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_hub_repository_without_a_needed_file_is_refused(missing: str, tmp_path: Path, ctx: Context) -> None:
    write_repository(tmp_path / "repo", "mobilenetv3_small_050", 2)
    (tmp_path / "repo" / missing).unlink()
    (tmp_path / "repo" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match=f"no {missing}"):
        TimmHub().prepare(tmp_path / "repo", tmp_path, ctx)


@pytest.mark.parametrize("text", ["", "[]", '{"num_classes": 3}', '{"architecture": "resnet18"}'])
def test_hub_configuration_that_says_too_little_is_refused(text: str, tmp_path: Path, ctx: Context) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match="not a configuration of timm"):
        TimmHub().load(tmp_path, ctx)


def test_hub_architecture_that_timm_does_not_know_is_named(tmp_path: Path, ctx: Context) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnet999", "num_classes": 2}')
    with pytest.raises(SourceError, match="no architecture 'resnet999'"):
        TimmHub().load(tmp_path, ctx)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hub:timm/resnet18.a1_in1k", "cnn"),
        ("hub:timm/vit_tiny_patch16_224.augreg_in21k@v1", "vit"),
        ("hub:timm/deit3_small_patch16_224.fb_in1k", "vit"),
    ],
)
def test_timm_names_on_the_hub_are_models(name: str, kind: str) -> None:
    entry = model_named(name)
    assert entry is not None
    assert (entry.name, entry.source, entry.kind) == (name, name, kind)
    assert build(TimmHub, entry.options, name).kind == kind


@pytest.mark.parametrize("name", ["hub:org/resnet18", "hub:timm/", "resnet18", "file:timm/x", "hub:timm"])
def test_other_names_are_left_to_other_plugins(name: str) -> None:
    assert model_named(name) is None


@pytest.mark.parametrize("name", ["hub:timm/a b", "hub:timm/résnet"])
def test_hub_names_with_odd_characters_are_left_alone(name: str) -> None:
    assert model_named(name) is None


def test_repeatable_seeds_and_restores() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with repeatable(5):
        first = torch.rand(3)
        assert torch.get_num_threads() == 1
    with repeatable(5):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), state)
