from __future__ import annotations

import torch
from torch import nn

from methodbench.torchkit.model import Calibration, set_submodule, set_weight


def test_a_clone_shares_every_tensor(any_decoder):
    clone = any_decoder.clone()
    original = dict(any_decoder.module.named_parameters()) | dict(any_decoder.module.named_buffers())
    cloned = dict(clone.module.named_parameters()) | dict(clone.module.named_buffers())
    assert cloned.keys() == original.keys()
    assert all(cloned[name] is original[name] for name in original)
    assert clone.module is not any_decoder.module


def test_tied_embeddings_stay_tied_in_a_clone(decoder):
    model = decoder("llama-tied")
    assert model.adapter.head(model.module).weight is model.adapter.embedding(model.module).weight
    module = model.clone().module
    assert model.adapter.head(module).weight is model.adapter.embedding(module).weight


def test_what_is_replaced_in_a_clone_leaves_the_original_alone(decoder, tokens, logits):
    model = decoder("llama")
    before = logits(model.module, tokens.inputs)
    clone = model.clone()
    for name, layer in clone.adapter.targets(clone.module).items():
        if clone.adapter.role(name) == "down":
            set_submodule(clone.module, name, nn.Linear(layer.in_features, layer.out_features))
        else:
            set_weight(layer, torch.zeros_like(layer.weight))
    clone.facts["touched"] = True
    assert not torch.allclose(logits(clone.module, tokens.inputs), before)
    assert torch.equal(logits(model.module, tokens.inputs), before)
    assert model.facts == {}


def test_a_set_weight_keeps_dtype_and_needs_no_gradient():
    layer = nn.Linear(3, 2).half()
    set_weight(layer, torch.ones(2, 3, dtype=torch.float64))
    assert layer.weight.dtype == torch.float16
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight, torch.ones(2, 3).half())


def test_calibration_counts_its_inputs():
    assert len(Calibration.none()) == 0
    assert len(Calibration(torch.zeros(4, 7, dtype=torch.int64))) == 4
