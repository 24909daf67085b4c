from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import LoadedModel, set_submodule
from methodbench.torchkit.size import bits_per_weight, tensor_bytes, weights


class NibbleLinear(nn.Module):
    """Stands for a packed layer: 4-bit codes in bytes, one float16 scale per row, a float32 bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(out_features))


def test_parameters_and_buffers_count():
    norm = nn.BatchNorm2d(8)
    assert tensor_bytes(norm) == 4 * 8 * 4 + 8  # weight, bias, mean, variance; an int64 counter


def test_tied_weights_count_once(decoder):
    model = decoder("llama-tied")
    by_hand = {id(t): t for t in [*model.module.parameters(), *model.module.buffers()]}
    embedding = model.adapter.embedding(model.module).weight
    assert sum(t is embedding for t in by_hand.values()) == 1
    shared = nn.ModuleList([nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)])
    shared[1].weight = nn.Parameter(shared[0].weight.detach())
    assert shared[1].weight is not shared[0].weight
    assert tensor_bytes(shared) == 10 * 4 * 4


def test_a_tensor_without_memory_counts_nothing():
    assert tensor_bytes(nn.Linear(1000, 1000, device="meta")) == 0


@given(
    spans=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.uint8]),
)
@settings(max_examples=40, deadline=None)
def test_overlapping_views_count_the_memory_that_they_cover(spans, dtype):
    base = torch.zeros(130, dtype=dtype)
    module = nn.Module()
    covered: set[int] = set()
    for index, (start, length) in enumerate(spans):
        module.register_buffer(f"view{index}", base[start : start + length])
        covered.update(range(start, start + length))
    assert tensor_bytes(module) == len(covered) * base.element_size()


def test_a_transposed_view_counts_like_its_original():
    module = nn.Module()
    module.register_buffer("view", torch.zeros(6, 4).T)
    assert tensor_bytes(module) == 6 * 4 * 4


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32.0), (torch.float16, 16.0)])
def test_dense_models_take_the_bits_of_their_dtype(any_decoder, dtype, bits):
    any_decoder.module.to(dtype)
    assert bits_per_weight(any_decoder) == bits


def test_bits_of_a_convolutional_network_are_those_of_its_convolutions(cnn):
    assert bits_per_weight(cnn) == 32.0
    assert weights(cnn.adapter, cnn.module) == sum(
        m.weight.numel()
        for s in range(1, 5)
        for m in getattr(cnn.module, f"layer{s}").modules()
        if hasattr(m, "stride") and isinstance(m, nn.Conv2d)
    )


def test_weights_are_those_of_the_blocks_without_biases(decoder):
    model = decoder("opt")
    per_block = 4 * 32 * 32 + 2 * 32 * 48
    assert weights(model.adapter, model.module) == 3 * per_block


def test_packed_layers_count_codes_and_scales_but_no_bias():
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(64, 16)})])})
    model = LoadedModel("toy", "toy", module, Adapter("toy", stack="blocks"))
    assert bits_per_weight(model) == 32.0
    set_submodule(module, "blocks.0.fc", NibbleLinear(64, 16))
    assert bits_per_weight(model) == 4 + 16 / 64


def test_blocks_without_layers_are_refused_by_name():
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.ReLU()])})
    with pytest.raises(ValueError, match="toy has no layers"):
        bits_per_weight(LoadedModel("toy", "toy", module, Adapter("toy", stack="blocks")))
