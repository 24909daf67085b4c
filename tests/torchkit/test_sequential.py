from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule, set_weight
from methodbench.torchkit.sequential import walk


class Halve(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        return self.block(x, **kwargs) / 2


def block_inputs(model: LoadedModel, data: Calibration) -> list[Tensor]:
    """Return what enters each block when the model runs as a whole."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in model.adapter.blocks(model.module)
    ]
    with torch.no_grad():
        model.module(data.inputs)
    for hook in hooks:
        hook.remove()
    return seen


def zero_first_layer(block: nn.Module, model: LoadedModel) -> None:
    layer = next(iter(model.adapter.linears(block).values()))
    set_weight(layer, torch.zeros_like(layer.weight))


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_hidden_states_are_those_of_the_whole_model(any_decoder, tokens, propagate):
    with torch.no_grad():
        expected = any_decoder.module(tokens.inputs, output_hidden_states=True).hidden_states
    steps = 0
    for step in walk(any_decoder, tokens, propagate=propagate, batch_size=2):
        assert step.index == steps
        assert step.name == any_decoder.adapter.block_names(any_decoder.module)[steps]
        assert [len(x) for x in step.inputs] == [2, 2, 2]
        torch.testing.assert_close(torch.cat(step.inputs), expected[steps], rtol=1e-4, atol=1e-5)
        steps += 1
    assert steps == any_decoder.module.config.num_hidden_layers


@pytest.mark.parametrize(("name", "inputs"), [("vit", "images"), ("bert", "tokens"), ("cnn", "images")])
def test_encoders_and_convolutional_networks_can_be_walked(name, inputs, request):
    model, data = request.getfixturevalue(name), request.getfixturevalue(inputs)
    expected = block_inputs(model, data)
    for step in walk(model, data, propagate="compressed", batch_size=2):
        torch.testing.assert_close(torch.cat(step.inputs), expected[step.index], rtol=1e-4, atol=1e-4)
    assert step.index == len(expected) - 1


@given(batch_size=st.integers(1, 9), sequences=st.integers(1, 6))
@settings(max_examples=10, deadline=None)
def test_batching_does_not_change_what_a_block_sees(batch_size, sequences):
    model = chain(nn.Linear(4, 4), nn.Linear(4, 4))
    data = Calibration(torch.randn(sequences, 3, 4, generator=torch.Generator().manual_seed(0)))
    (_, whole) = (torch.cat(s.inputs) for s in walk(model, data, propagate="dense", batch_size=sequences))
    (_, parts) = (torch.cat(s.inputs) for s in walk(model, data, propagate="dense", batch_size=batch_size))
    torch.testing.assert_close(parts, whole)


def test_masks_and_positions_are_captured_and_kept_once(decoder, tokens):
    model = decoder("llama", attn_implementation="eager")
    steps = list(walk(model, tokens, propagate="dense", batch_size=2))
    masks = [kwargs["attention_mask"] for step in steps for kwargs in step.kwargs]
    assert isinstance(masks[0], Tensor)
    assert len(masks) == 9
    assert all(mask is masks[0] for mask in masks)
    positions = [part for step in steps for kwargs in step.kwargs for part in kwargs["position_embeddings"]]
    assert {id(part) for part in positions} == {id(part) for part in positions[:2]}


def test_every_block_gets_its_own_arguments(decoder, tokens):
    model = decoder("gemma3", attn_implementation="eager")
    sliding, full, again = (s.kwargs[0]["attention_mask"] for s in walk(model, tokens, propagate="dense"))
    assert torch.equal(sliding, again)
    assert not torch.equal(sliding, full)


@pytest.mark.parametrize("replace_block", [False, True], ids=["a layer is changed", "the block is replaced"])
def test_compressed_inputs_feel_what_the_consumer_did_and_dense_ones_do_not(decoder, tokens, replace_block):
    dense = decoder("llama")
    expected = block_inputs(dense, tokens)
    reached: dict[str, LoadedModel] = {}
    for propagate in ("compressed", "dense"):
        model = reached[propagate] = dense.clone()
        inputs = []
        for step in walk(model, tokens, propagate=propagate, batch_size=3):
            inputs.append(torch.cat(step.inputs))
            if replace_block:
                set_submodule(model.module, step.name, Halve(step.block))
            else:
                zero_first_layer(step.block, model)
        wanted = expected if propagate == "dense" else block_inputs(model, tokens)
        for found, want in zip(inputs, wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    changed = block_inputs(reached["compressed"], tokens)
    assert (changed[1] - expected[1]).abs().max() > 1e-3


def test_a_walk_leaves_the_model_as_it_was(decoder, tokens, logits):
    model = decoder("opt")
    before, output = model.module.state_dict(), logits(model.module, tokens.inputs)
    for step in walk(model, tokens, propagate="compressed"):
        step.forward({"self_attn.q_proj": lambda x: None})
    after = model.module.state_dict()
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert torch.equal(logits(model.module, tokens.inputs), output)
    assert not any("forward" in vars(module) for module in model.module.modules())
    assert not any(module._forward_pre_hooks for module in model.module.modules())


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_only_one_blocks_activations_stay_in_memory(tokens, propagate):
    model = chain(*(nn.Linear(4, 4) for _ in range(8)))
    data = Calibration(torch.randn(6, 3, 4))
    seen: list[weakref.ref[Tensor]] = []
    most = 0
    for step in walk(model, data, propagate=propagate, batch_size=2):
        seen += [weakref.ref(x) for x in step.inputs]
        most = max(most, sum(x() is not None for x in seen))
    assert len(seen) == 8 * 3
    assert most <= 2 * 3


def test_observers_see_the_input_of_their_layer(decoder, tokens):
    model = decoder("opt")
    seen: dict[str, list[Tensor]] = {"self_attn.q_proj": [], "self_attn": [], "fc1": [], "fc2": []}
    step = next(walk(model, tokens, propagate="dense", batch_size=2))
    step.forward({name: inputs.append for name, inputs in seen.items()})
    shapes = {name: [tuple(x.shape) for x in inputs] for name, inputs in seen.items()}
    assert shapes == {name: [(2, 12, 48 if name == "fc2" else 32)] * 3 for name in seen}
    with torch.no_grad():
        normed = [step.block.self_attn_layer_norm(x) for x in step.inputs]
    assert all(torch.equal(a, b) for a, b in zip(seen["self_attn.q_proj"], normed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen["self_attn"], normed, strict=True))


def test_experts_see_the_tokens_that_were_routed_to_them(decoder, tokens):
    model = decoder("mixtral")
    counts: dict[str, int] = {}
    step = next(walk(model, tokens, propagate="dense", batch_size=2))
    names = [f"mlp.experts.{index}.gate_proj" for index in range(4)]

    def count(name):
        return lambda x: counts.update({name: counts.get(name, 0) + x.numel() // x.shape[-1]})

    step.forward({name: count(name) for name in names})
    assert sum(counts.values()) == tokens.inputs.numel() * model.module.config.num_experts_per_tok


def test_hooks_are_gone_when_an_observer_raises(decoder, tokens):
    step = next(walk(decoder("llama"), tokens, propagate="dense"))

    def fail(x):
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"):
        step.forward({"mlp.up_proj": fail})
    assert not step.block.mlp.up_proj._forward_pre_hooks


def test_observing_the_dense_pass_runs_each_block_once():
    model = chain(*(nn.Linear(4, 4) for _ in range(3)))
    data = Calibration(torch.randn(6, 3, 4))
    expected = block_inputs(model, data)
    calls: list[Tensor] = []
    observed: list[Tensor] = []
    steps = walk(model, data, propagate="dense", batch_size=6, observe=lambda block: {"0": observed.append})
    first = next(steps)
    for block in model.adapter.blocks(model.module):
        block.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    zero_first_layer(first.block, model)
    for step in steps:
        torch.testing.assert_close(step.inputs[0], expected[step.index])
        zero_first_layer(step.block, model)
    assert len(calls) == 2
    assert len(observed) == 3
    for found, want in zip(observed, expected, strict=True):
        torch.testing.assert_close(found, want)


def test_observing_comes_before_the_compressed_step():
    model = chain(nn.Linear(4, 4), nn.Linear(4, 4))
    observed: list[Tensor] = []
    data = Calibration(torch.randn(2, 3, 4))
    for step in walk(model, data, propagate="compressed", observe=lambda block: {"0": observed.append}):
        assert len(observed) == step.index + 1
        zero_first_layer(step.block, model)
    torch.testing.assert_close(torch.cat(observed[1:]), block_inputs(model, data)[1])


def test_no_calibration_is_refused(decoder):
    with pytest.raises(NotApplicableError, match="needs inputs") as refused:
        next(walk(decoder("llama"), Calibration.none(), propagate="dense"))
    assert "calibration" in refused.value.hint


@pytest.mark.parametrize("order", ["skips a block", "changes the tensor between blocks"])
def test_blocks_that_form_no_chain_are_refused(order):
    class Unchained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.body[0](x)
            return x if order == "skips a block" else self.body[1](x + 1)

    model = LoadedModel("unchained", "toy", Unchained(), Adapter("toy", stack="body"))
    with pytest.raises(NotApplicableError, match="unchained does not apply its 2 blocks one after another"):
        next(walk(model, Calibration(torch.randn(2, 3, 4)), propagate="dense"))


def chain(*layers: nn.Module) -> LoadedModel:
    """Return a toy whose blocks hold one layer each, called with a further positional argument."""

    class Block(nn.Sequential):
        def forward(self, x: Tensor, factor: float) -> Tensor:
            return super().forward(x) * factor

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList(Block(layer) for layer in layers)

        def forward(self, x: Tensor) -> Tensor:
            for index, block in enumerate(self.body):
                x = block(x, 1 + index / 2)
            return x

    return LoadedModel("chain", "toy", Chain().requires_grad_(False), Adapter("toy", stack="body"))
