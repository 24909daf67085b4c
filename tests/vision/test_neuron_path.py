"""Laws of joint attribution, and what the probe measures."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_vision.neuron_path import (
    NeuronPath,
    class_logits,
    class_token_activations,
    greedy_path,
    joint_attribution,
    probability,
    scaled,
    shared_neurons,
)


def vit(depth: int = 3, **options: object) -> LoadedModel:
    torch.manual_seed(0)
    module = timm.models.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=depth,
        num_heads=2,
        mlp_ratio=2,
        num_classes=4,
        **options,
    ).eval()
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return LoadedModel("toy", "vit", module, detect(module))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_model_that_is_given_its_own_activations_is_as_it_was(x: Tensor) -> None:
    model = vit()
    hidden = class_token_activations(model, x)
    torch.testing.assert_close(class_logits(model, x, [lambda _, a=a: a for a in hidden]), model.module(x))
    path = torch.zeros((3, 5), dtype=torch.int64)
    torch.testing.assert_close(class_logits(model, x, scaled(path, 1.0)), model.module(x))
    assert not any(layer._forward_pre_hooks for layer in model.module.modules())


def test_with_one_block_the_scores_are_the_integrated_gradients_of_its_neurons(x: Tensor) -> None:
    model, label, steps = vit(1), torch.tensor([0, 1, 2, 3, 0]), 7
    hidden = class_token_activations(model, x)
    _, (scores,) = greedy_path(model, x, label, hidden, steps)
    total = torch.zeros_like(hidden[0])
    for step in range(steps):
        sample = (step / steps * hidden[0]).requires_grad_()
        with torch.enable_grad():
            p = class_logits(model, x, [lambda _, s=sample: s]).softmax(1).gather(1, label[:, None]).sum()
        total += torch.autograd.grad(p, sample)[0]
    torch.testing.assert_close(scores, total * hidden[0] / steps)


def test_more_steps_bring_scores_closer_to_the_integral(x: Tensor) -> None:
    model, label = vit(2), torch.tensor([0, 1, 2, 3, 0])
    hidden = class_token_activations(model, x)
    fine, coarse, coarser = (
        joint_attribution(model, x, label, hidden, torch.stack([a.argmax(1) for a in hidden]), m)
        for m in (400, 40, 10)
    )
    assert float((coarse - fine).abs().max()) < 0.5 * float((coarser - fine).abs().max())


def test_permuted_neurons_give_permuted_paths(x: Tensor) -> None:
    model, label = vit(2), torch.tensor([0, 1, 2, 3, 0])
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    path, scores = greedy_path(model, x, label, class_token_activations(model, x), 5)
    with torch.no_grad():
        for block in model.module.blocks:
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[order])
            block.mlp.fc1.bias.copy_(block.mlp.fc1.bias[order])
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, order])
    permuted, other = greedy_path(model, x, label, class_token_activations(model, x), 5)
    torch.testing.assert_close(torch.stack(other), torch.stack(scores)[:, :, order], rtol=1e-3, atol=1e-5)
    assert torch.equal(order[permuted], path)


def test_the_probe_measures_every_image_and_does_not_depend_on_batches(x: Tensor) -> None:
    model = vit()
    found = NeuronPath(steps=5).measure(model, Calibration(x), Context())
    split = NeuronPath(steps=5, batch_size=2).measure(model, Calibration(x), Context())
    for name, value in found.items():
        if "random" not in name:
            np.testing.assert_allclose(split[name], value, rtol=1e-3, atol=1e-5)
    assert np.shape(found["path"]) == (5, 3)
    assert np.shape(found["jas"]) == (5,)
    assert float(np.mean(found["jas-above-activation"])) > 0
    assert float(np.mean(found["jas-above-random"])) > 0


def test_removal_is_the_change_of_probability_without_the_paths_neurons(x: Tensor) -> None:
    model = vit()
    found = NeuronPath(steps=5).measure(model, Calibration(x), Context())
    label = model.module(x).argmax(1)
    path = torch.from_numpy(np.array(found["path"])).long().T
    change = probability(model, x, label, scaled(path, 0.0)) - probability(model, x, label)
    np.testing.assert_allclose(found["removed"], change.double().numpy(), atol=1e-6)


def test_shared_neurons_count_pairs_of_one_class_and_of_two() -> None:
    paths = torch.tensor([[1, 2], [1, 3], [4, 2]])
    same, other = shared_neurons(paths, torch.tensor([0, 0, 1]))
    assert (same, other) == (0.5, 0.25)
    assert shared_neurons(paths[:1], torch.tensor([0])) == (0.0, 0.0)


def test_a_transformer_without_class_token_is_refused(x: Tensor) -> None:
    with pytest.raises(NotApplicableError, match="no class token"):
        NeuronPath().measure(vit(class_token=False, global_pool="avg"), Calibration(x), Context())
