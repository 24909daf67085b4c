"""Planted outliers change activations, not outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import Adapter, detect
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.outliers import inject_outliers


def llama() -> LoadedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    module = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48)).eval()
    return LoadedModel("llama", "causal-lm", module, detect(module))


def opt() -> LoadedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    module = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32)).eval()
    for name, parameter in module.named_parameters():
        if "layer_norm.bias" in name:
            nn.init.normal_(parameter)
    return LoadedModel("opt", "causal-lm", module, detect(module))


def vit() -> LoadedModel:
    torch.manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5
    ).eval()
    return LoadedModel("vit", "vit", module, detect(module))


def outputs(model: LoadedModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if model.kind == "vit":
        inputs = torch.randn(2, 3, 32, 32, generator=generator)
    else:
        inputs = torch.randint(64, (2, 12), generator=generator)
    with torch.no_grad():
        result = model.module(inputs)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("bed", [llama, opt, vit])
def test_outputs_are_those_of_the_model_without_outliers(bed: Callable[[], LoadedModel]) -> None:
    model = bed()
    before = outputs(model)
    planted = inject_outliers(model, factor=16, channels=3)
    torch.testing.assert_close(outputs(planted), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        outputs(inject_outliers(model, factor=10, channels=3)), before, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(outputs(model), before)
    assert planted.name == f"{model.name}+outliers"


@pytest.mark.parametrize("bed", [llama, opt, vit])
def test_the_activations_behind_the_norms_grow_on_the_chosen_channels_alone(
    bed: Callable[[], LoadedModel],
) -> None:
    model = bed()
    planted = inject_outliers(model, factor=16, channels=3, seed=5)
    (channels,) = planted.facts["outlier_channels"].values()
    assert len(channels) == 3
    norms = [
        (block.get_submodule(group.previous), other.get_submodule(group.previous))
        for block, other in zip(
            model.adapter.blocks(model.module), planted.adapter.blocks(planted.module), strict=True
        )
        for group in model.adapter.scale_groups(block)
        if "norm" in group.previous
    ]
    assert len(norms) == 4
    width = norms[0][0].weight.shape[0]
    expected = torch.ones(width)
    expected[channels] = 16
    x = torch.randn(3, width)
    for dense, changed in norms:
        assert torch.equal(changed(x), dense(x) * expected)


def test_a_seed_draws_the_same_channels_again_and_another_seed_others() -> None:
    model = llama()
    drawn = [inject_outliers(model, seed=seed).facts["outlier_channels"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_model_without_norms_to_scale_is_not_applicable() -> None:
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Linear(4, 4)])
    model = LoadedModel("plain", "causal-lm", module, Adapter(kind="causal-lm", stack="blocks"))
    with pytest.raises(NotApplicableError, match="plain has no norm"):
        inject_outliers(model)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="factor must be positive"):
        inject_outliers(llama(), factor=0)
    with pytest.raises(ValueError, match="1 to 32"):
        inject_outliers(llama(), channels=33)
