"""Read-ME: experts of domains, routes that hang on token ids alone, and parts that add up to the masked network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss
from methodbench_sparse.read_me import ReadMe, RoutedFeedForward, Router, domain_usage, router_loss, split
from methodbench_sparse.structured import gated_networks


def mixed(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    chosen: dict[str, Any] = {"experts": 2, "width": 16, "heads": 2, "router_steps": 4, "tokens": 40, **hyper}
    return ReadMe(**chosen).compress(model, data, Context(seed=4))


def test_masks_hold_one_neuron_less_than_asked_and_ties_fewer() -> None:
    usage = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0], [4.0, 0.0, 2.0, 1.0, 3.0]])
    (shared,), (experts,) = split([usage], [4])
    assert shared.tolist() == [True, False, True, False, False]
    assert experts.tolist() == [[False, True, False, False, False], [False, False, False, False, True]]
    (shared,), (experts,) = split([torch.ones(2, 5)], [3])
    assert not shared.any()
    assert not experts.any()


def test_routed_networks_are_the_masked_ones(
    llama: LoadedModel, data: Calibration, tokens: torch.Tensor
) -> None:
    found = mixed(llama, data, rounds=0)
    routed = [part for part in found.module.modules() if isinstance(part, RoutedFeedForward)]
    assert len(routed) == 2
    module: Any = found.module
    routes = module.router(tokens).argmax(-1)
    networks = gated_networks(llama)
    shared, experts = split(domain_usage(llama, data, networks, 2), [32, 32])
    masked = llama.clone()
    for network, always, own in zip(networks, shared, experts, strict=True):
        keep = (own | always).float()[routes]
        masked.module.get_submodule(network.down).register_forward_pre_hook(
            lambda _, args, keep=keep: (args[0] * keep,)
        )
    torch.testing.assert_close(
        found.module(tokens).logits, masked.module(tokens).logits, rtol=1e-4, atol=1e-4
    )
    assert len(set(routes.flatten().tolist())) == 2, "both experts are used"
    assert found.facts["neurons_on_share"] == pytest.approx(31 / 64)


def test_almost_all_neurons_are_almost_the_dense_model(
    llama: LoadedModel, data: Calibration, tokens: torch.Tensor
) -> None:
    dense = llama.module(tokens).logits
    errors = [
        float((mixed(llama, data, rounds=0, sparsity=sparsity).module(tokens).logits - dense).norm())
        for sparsity in (0.0, 0.25, 0.75)
    ]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.1 * float(dense.norm())


def test_routes_hang_on_token_ids_and_not_on_weights(llama: LoadedModel, tokens: torch.Tensor) -> None:
    table = llama.module.get_submodule("model.embed_tokens").get_parameter("weight").detach()
    router = Router(table, 16, 2, 2, 3, torch.Generator().manual_seed(0))
    scores = router(tokens)
    assert scores.shape == (*tokens.shape, 3)
    changed = tokens.clone()
    changed[:, 20:] = 5
    torch.testing.assert_close(router(changed)[:, :20], scores[:, :20])
    assert not torch.equal(router(changed)[:, 20:], scores[:, 20:])


def test_generation_with_a_cache_takes_the_same_routes(
    llama: LoadedModel, data: Calibration, tokens: torch.Tensor
) -> None:
    module: Any = mixed(llama, data).module
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = module.generate(tokens[:2, :9], use_cache=True, **given)
    assert torch.equal(cached, module.generate(tokens[:2, :9], use_cache=False, **given))


def test_the_router_learns_its_targets() -> None:
    draw = planted.generator(0)
    table = torch.randn(20, 16, generator=draw)
    router = Router(table, 16, 1, 2, 2, torch.Generator().manual_seed(0))
    ids = torch.randint(20, (2, 64), generator=draw)
    experts = torch.zeros(2, 12, dtype=torch.bool)
    experts[0, :5], experts[1, 5:10] = True, True
    # Tokens below ten use the neurons of the first expert.
    hidden = torch.where((ids < 10)[..., None], experts[0].float(), experts[1].float())
    hidden = hidden + 0.1 * torch.rand(2, 64, 12, generator=draw)
    before, _ = router_loss(router(ids), hidden, experts)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss, right = router_loss(router(ids), hidden, experts)
        loss.backward()
        optimizer.step()
    assert loss.item() < before.item()
    assert float(right) > 0.95


def test_training_the_model_lowers_its_loss_and_leaves_the_dense_one(
    llama: LoadedModel, data: Calibration
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    plain = mixed(llama, data)
    tuned = mixed(llama, data, rounds=2, model_steps=30, model_lr=3e-3)
    assert next_token_loss(tuned, data.inputs) < next_token_loss(plain, data.inputs) - 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tuned.module.parameters())


def test_a_clone_routes_by_itself(llama: LoadedModel, data: Calibration, tokens: torch.Tensor) -> None:
    first = mixed(llama, data)
    expected = first.module(tokens).logits
    second = first.clone()
    second.module(tokens[:1, :7])
    torch.testing.assert_close(first.module(tokens).logits, expected)
    torch.testing.assert_close(second.module(tokens).logits, expected)


def test_hostile_input_is_refused(llama: LoadedModel, data: Calibration) -> None:
    for few in (Calibration.none(), Calibration(data.inputs[:1])):
        with pytest.raises(NotApplicableError, match="text of 2 domains"):
            mixed(llama, few)
    with pytest.raises(NotApplicableError, match="multiple of twice its 3 heads"):
        mixed(llama, data, heads=3)
    with pytest.raises(NotApplicableError, match="gate, up and down"):
        mixed(planted.build("opt"), planted.inputs("opt", 4, 1))
    biased = llama.clone()
    down: Any = biased.module.get_submodule(gated_networks(biased)[1].down)
    down.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(NotApplicableError, match="has a bias"):
        mixed(biased, data)
    with pytest.raises(ParameterError, match="experts"):
        build(ReadMe, {"experts": 0}, "read-me")
