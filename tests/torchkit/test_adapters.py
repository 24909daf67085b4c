from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import Adapter, ScaleGroup, detect, unfuse_experts
from methodbench.torchkit.model import LoadedModel, set_submodule, set_weight
from methodbench.torchkit.size import tensor_bytes

SELF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")


class Divided(nn.Module):
    def __init__(self, activation: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.activation, self.scale = activation, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) / self.scale


def move_scale(block: nn.Module, group: ScaleGroup, scale: Tensor, *, half: bool = False) -> None:
    """Divide what ``group.previous`` gives by ``scale``; multiply its readers' columns, unless ``half``."""
    previous = block.get_submodule(group.previous)
    if not hasattr(previous, "weight"):
        set_submodule(block, group.previous, Divided(previous, scale))
    else:
        for name, parameter in previous.named_parameters():
            value = parameter.detach().clone()
            divisor = scale[:, None] if value.ndim == 2 else scale
            value[-len(scale) :] /= divisor
            set_weight(previous, value, name)
    for name in () if half else group.linears:
        layer = block.get_submodule(name)
        set_weight(layer, layer.weight * scale)


def width(block: nn.Module, group: ScaleGroup) -> int:
    return block.get_submodule(group.linears[0]).weight.shape[1]


def moved(model: LoadedModel, *, half: bool = False) -> tuple[nn.Module, int]:
    """Return a copy of the model with random scales moved in every group, and how many groups there were."""
    clone = model.clone()
    draw = torch.Generator().manual_seed(0)
    count = 0
    for block in clone.adapter.blocks(clone.module):
        for group in clone.adapter.scale_groups(block):
            move_scale(block, group, 0.3 + 2 * torch.rand(width(block, group), generator=draw), half=half)
            count += 1
    return clone.module, count


def pairs(model: LoadedModel) -> list[tuple[str, tuple[str, ...], str]]:
    block = model.adapter.blocks(model.module)[0]
    return [(group.previous, group.linears, group.inspect) for group in model.adapter.scale_groups(block)]


def test_moving_scales_keeps_the_function_of_every_decoder(any_decoder, tokens, logits):
    expected = logits(any_decoder.module, tokens.inputs)
    module, count = moved(any_decoder)
    assert count >= 3 * 2
    torch.testing.assert_close(logits(module, tokens.inputs), expected, rtol=1e-4, atol=1e-5)
    broken, _ = moved(any_decoder, half=True)
    assert (logits(broken, tokens.inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "inputs", "groups"), [("vit", "images", 4), ("bert", "tokens", 2)])
def test_moving_scales_keeps_the_function_of_encoders(name, inputs, groups, request, logits):
    model, data = request.getfixturevalue(name), request.getfixturevalue(inputs)
    expected = logits(model.module, data.inputs)
    module, count = moved(model)
    assert count == 3 * groups
    torch.testing.assert_close(logits(module, data.inputs), expected, rtol=1e-4, atol=1e-5)
    broken, _ = moved(model, half=True)
    assert (logits(broken, data.inputs) - expected).abs().max() > 1e-2


def test_scale_groups_of_llama_are_those_of_awq(decoder):
    assert pairs(decoder("llama")) == [
        ("input_layernorm", SELF_ATTENTION, "self_attn"),
        ("self_attn.v_proj", ("self_attn.o_proj",), ""),
        ("post_attention_layernorm", GATED, "mlp"),
        ("mlp.up_proj", ("mlp.down_proj",), ""),
    ]


def test_scale_groups_of_opt_are_those_of_awq(decoder):
    expected = [
        ("self_attn_layer_norm", SELF_ATTENTION, "self_attn"),
        ("self_attn.v_proj", ("self_attn.out_proj",), ""),
        ("final_layer_norm", ("fc1",), ""),
        ("fc1", ("fc2",), ""),
    ]
    assert pairs(decoder("opt")) == expected
    assert pairs(decoder("opt-gelu")) == [*expected[:3], ("activation_fn", ("fc2",), "")]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llama-grouped-queries", {"self_attn.v_proj"}),
        ("opt-post-norm", {"self_attn_layer_norm", "final_layer_norm"}),
        ("gemma", {"input_layernorm", "post_attention_layernorm"}),
        ("cohere", {"input_layernorm"}),
    ],
    ids=[
        "grouped queries",
        "norm behind the residual",
        "gain is one plus the weight",
        "one norm for both halves",
    ],
)
def test_groups_that_would_change_the_function_are_left_out(name, left_out, decoder):
    previous = {group[0] for group in pairs(decoder(name))}
    assert previous
    assert not previous & left_out


def test_interleaved_query_key_value_is_not_scaled_into_the_output(decoder):
    assert pairs(decoder("gpt-neox")) == [
        ("input_layernorm", ("attention.query_key_value",), ""),
        ("post_attention_layernorm", ("mlp.dense_h_to_4h",), ""),
        ("mlp.act", ("mlp.dense_4h_to_h",), ""),
    ]


def test_a_norm_before_experts_scales_routers_and_every_expert(decoder):
    model = decoder("qwen2-moe")
    dense, sparse = model.adapter.blocks(model.module)[:2]
    assert [group.linears for group in model.adapter.scale_groups(dense)][2] == GATED
    group = next(g for g in model.adapter.scale_groups(sparse) if g.previous == "post_attention_layernorm")
    assert group.linears[:2] == ("mlp.gate", "mlp.shared_expert_gate")
    assert len(group.linears) == 2 + 2 + 4 * 2
    assert group.inspect == "mlp"


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", [list(SELF_ATTENTION), ["self_attn.o_proj"], list(GATED), ["mlp.down_proj"]]),
        ("phi3", [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]),
        ("opt", [list(SELF_ATTENTION), ["self_attn.out_proj"], ["fc1"], ["fc2"]]),
        (
            "gpt-neox",
            [
                ["attention.query_key_value"],
                ["attention.dense"],
                ["mlp.dense_h_to_4h"],
                ["mlp.dense_4h_to_h"],
            ],
        ),
    ],
)
def test_sequential_groups_follow_the_data(name, groups, decoder):
    model = decoder(name)
    for block in model.adapter.blocks(model.module):
        assert model.adapter.sequential_groups(block) == groups
        assert [name for group in groups for name in group] == list(model.adapter.linears(block))


def test_experts_are_quantized_in_two_groups_without_their_router(decoder):
    model = decoder("mixtral")
    block = model.adapter.blocks(model.module)[0]
    groups = model.adapter.sequential_groups(block)
    assert [len(group) for group in groups] == [3, 1, 8, 4]
    assert {model.adapter.role(name) for name in groups[2]} == {"gate", "up"}
    assert {model.adapter.role(name) for name in groups[3]} == {"down"}


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama", ["q", "k", "v", "o", "gate", "up", "down"]),
        ("phi3", ["qkv", "o", "gate_up", "down"]),
        ("opt", ["q", "k", "v", "o", "fc1", "fc2"]),
        ("gpt-neox", ["qkv", "o", "fc1", "fc2"]),
    ],
)
def test_roles_hold_for_relative_and_full_names(name, roles, decoder):
    model = decoder(name)
    block = model.adapter.blocks(model.module)[0]
    assert [model.adapter.role(name) for name in model.adapter.linears(block)] == roles
    assert [model.adapter.role(name) for name in model.adapter.targets(model.module)] == 3 * roles


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("mlp.gate", "router"),
        ("mlp.shared_expert_gate", "router"),
        ("block_sparse_moe.experts.3.w2", "down"),
        ("attn.gate", "other"),
        ("self_attn.gate", "other"),
        ("attention.self.value", "v"),
        ("attention.output.dense", "o"),
        ("output.dense", "fc2"),
        ("self_attn.kv_a_proj_with_mqa", "other"),
    ],
)
def test_roles_tell_routers_from_gates_and_outputs_from_outputs(name, role):
    assert Adapter("toy").role(name) == role


@pytest.mark.parametrize("name", ["llama", "opt", "opt-post-norm", "gpt-neox", "phi3", "gemma3"])
def test_layers_are_listed_in_the_order_in_which_they_run(name, decoder, tokens, logits):
    model = decoder(name)
    targets = model.adapter.targets(model.module)
    called: list[str] = []
    for target, layer in targets.items():
        layer.register_forward_pre_hook(lambda *_, target=target: called.append(target))
    logits(model.module, tokens.inputs)
    assert called == list(targets)


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gemma3", "phi3", "cohere", "opt", "gpt-neox", "mixtral"]
)
def test_norm_and_head_of_a_decoder_turn_its_last_block_into_logits(name, decoder, tokens, logits):
    model = decoder(name)
    adapter, module = model.adapter, model.module
    seen: list[Tensor] = []
    handle = adapter.blocks(module)[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    expected = logits(module, tokens.inputs)
    handle.remove()
    norm = adapter.final_norm(module)
    assert norm is not None
    with torch.no_grad():
        found = adapter.head(module)(norm(seen[0])) * getattr(module, "logit_scale", 1)
    torch.testing.assert_close(found, expected)
    assert isinstance(adapter.embedding(module), nn.Embedding)


def test_a_vision_transformer_and_a_convolutional_network_are_told_apart(vit, cnn, bert):
    assert (vit.adapter.kind, cnn.adapter.kind, bert.adapter.kind) == ("vit", "cnn", "sentence-encoder")
    assert vit.adapter.block_names(vit.module) == ["blocks.0", "blocks.1", "blocks.2"]
    assert cnn.adapter.block_names(cnn.module) == ["layer1", "layer2", "layer3", "layer4"]
    assert vit.adapter.head(vit.module) is vit.module.head
    assert vit.adapter.final_norm(vit.module) is vit.module.norm
    assert cnn.adapter.head(cnn.module) is cnn.module.fc
    layers = cnn.adapter.targets(cnn.module)
    assert len(layers) == 19
    assert all(isinstance(layer, nn.Conv2d) for layer in layers.values())
    assert all(len(group) == 1 for group in cnn.adapter.sequential_groups(cnn.module.layer2))
    assert cnn.adapter.scale_groups(cnn.module.layer2) == []


def test_the_only_container_of_convolutions_is_split_into_its_children():
    stages = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2)))
    nested = nn.ModuleDict({"features": stages, "classifier": nn.Linear(3, 2)})
    flat = nn.ModuleDict({"features": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), "fc": nn.Linear(3, 2)})
    assert detect(nested).block_names(nested) == ["features.0", "features.1"]
    assert detect(flat).block_names(flat) == ["features"]


def test_structure_alone_decides(decoder):
    model = decoder("llama")
    renamed = type("Anything", (type(model.module),), {})
    assert detect(renamed(model.module.config)) == model.adapter


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "no adapter fits the structure of Sequential"),
        (
            nn.ModuleDict(
                {"patch": nn.Sequential(nn.Conv2d(3, 8, 4)), "mixer": nn.Linear(8, 8), "fc": nn.Linear(8, 2)}
            ),
            "no adapter fits",
        ),
        (
            nn.ModuleDict({"model": nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})}),
            "encoder-decoder",
        ),
    ],
    ids=["plain", "mostly linear", "encoder-decoder"],
)
def test_unknown_structures_are_refused(module, message):
    with pytest.raises(NotApplicableError, match=message) as refused:
        detect(module)
    assert refused.value.hint


def test_unfused_experts_compute_the_same(mixture, tokens, logits):
    expected = logits(mixture.module, tokens.inputs)
    before, found = tensor_bytes(mixture.module), len(mixture.adapter.targets(mixture.module))
    assert unfuse_experts(mixture.module) > 0
    torch.testing.assert_close(logits(mixture.module, tokens.inputs), expected, rtol=1e-5, atol=1e-5)
    assert tensor_bytes(mixture.module) == before
    assert len(mixture.adapter.targets(mixture.module)) > found
    assert unfuse_experts(mixture.module) == 0


def test_experts_with_biases_are_refused():
    config = hf.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=8,
    )
    config.num_local_experts = 2
    with pytest.raises(NotApplicableError, match=r"model\.layers\.0\.mlp\.experts"):
        unfuse_experts(hf.GptOssForCausalLM(config))


def test_a_layer_in_place_of_a_linear_is_still_found(decoder):
    class Packed(nn.Module):
        in_features, out_features = 32, 48

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1)

    model = decoder("llama").clone()
    names = list(model.adapter.targets(model.module))
    replacement = Packed()
    set_submodule(model.module, "model.layers.1.mlp.up_proj", replacement)
    targets = model.adapter.targets(model.module)
    assert list(targets) == names
    assert targets["model.layers.1.mlp.up_proj"] is replacement
    assert len(model.adapter.scale_groups(model.module.model.layers[1])) == 4


def test_an_adapter_of_a_toy_lists_its_layers_and_moves_no_scales():
    toy = nn.ModuleDict(
        {"body": nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))] * 1)}
    )
    adapter = Adapter("toy", stack="body")
    assert list(adapter.targets(toy)) == ["body.0.0", "body.0.2"]
    assert adapter.sequential_groups(toy["body"][0]) == [["0"], ["2"]]
    assert adapter.scale_groups(toy["body"][0]) == []
    assert adapter.head(toy) is None
