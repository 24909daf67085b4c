"""Magnitude pruning: what goes, what stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.adapters import Adapter, detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.magnitude import Magnitude


def prune(model: LoadedModel, **hyper: Any) -> LoadedModel:
    return Magnitude(**hyper).compress(model, Calibration.none(), Context())


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in model.adapter.targets(model.module).items()}


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


@pytest.mark.parametrize(
    "hyper",
    [
        {"sparsity": 0.3},
        {"sparsity": 0.5, "pattern": "2:4"},
        {"sparsity": 0.5, "pattern": "4:8"},
        {"sparsity": 0.6, "scope": "per-row"},
        {"sparsity": 0.6, "scope": "global"},
    ],
)
def test_kept_weights_are_bit_identical_and_the_input_model_is_untouched(
    llama: LoadedModel, tokens: Tensor, hyper: dict[str, Any]
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    pruned = prune(llama, **hyper)
    for name, weight in weights(pruned).items():
        dense = before[f"{name}.weight"]
        assert torch.equal(weight, dense.masked_fill(weight == 0, 0)), name
        assert (weight == 0).any(), name
    for name, tensor in llama.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    others = set(before) - {f"{name}.weight" for name in weights(pruned)}
    for name in others:
        assert torch.equal(pruned.module.state_dict()[name], before[name]), name
    assert pruned.storage == "simulated"
    assert pruned.accounted_bits is None
    assert torch.isfinite(logits(pruned, tokens)).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_zeros_of_every_linear_lie_within_one_weight_of_the_target(
    llama: LoadedModel, sparsity: float
) -> None:
    pruned = prune(llama, sparsity=sparsity)
    for name, weight in weights(pruned).items():
        zeros = int((weight == 0).sum())
        assert 0 <= zeros - int(weight.numel() * sparsity) <= 1, name
    facts = pruned.facts
    total = sum(weight.numel() for weight in weights(pruned).values())
    zeros = sum(int((weight == 0).sum()) for weight in weights(pruned).values())
    assert facts["zeros_share"] == pytest.approx(zeros / total, abs=1e-12)
    assert facts["zeros_share_min"] <= facts["zeros_share"] <= facts["zeros_share_max"]
    assert facts["zeros_denominator"].startswith("weights of the Linears inside the blocks")


@pytest.mark.parametrize("scope", ["per-linear", "per-row", "global"])
def test_sparsity_zero_leaves_the_model_unchanged(llama: LoadedModel, scope: str) -> None:
    pruned = prune(llama, sparsity=0, scope=scope)
    for name, tensor in pruned.module.state_dict().items():
        assert torch.equal(tensor, llama.module.state_dict()[name]), name


def test_the_global_scope_cuts_every_linear_at_one_threshold(llama: LoadedModel) -> None:
    layer = llama.adapter.targets(llama.module)["model.layers.0.self_attn.q_proj"]
    layer.weight.mul_(0.01)
    pruned = prune(llama, sparsity=0.5, scope="global")
    kept = min(float(w[w != 0].abs().min()) for w in weights(pruned).values() if (w != 0).any())
    dense = weights(llama)
    gone = max(float(dense[name][w == 0].abs().max()) for name, w in weights(pruned).items())
    assert gone < kept
    assert pruned.facts["zeros_share"] == pytest.approx(0.5, abs=1e-3)
    assert pruned.facts["zeros_share_max"] > 0.95


def test_nm_is_idempotent(llama: LoadedModel) -> None:
    once = prune(llama, sparsity=0.5, pattern="2:4")
    twice = prune(once, sparsity=0.5, pattern="2:4")
    assert all(torch.equal(weights(twice)[name], weight) for name, weight in weights(once).items())
    assert once.facts["zeros_share"] == 0.5


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    exponent=st.integers(-8, 8),
    method=st.sampled_from(
        [
            Magnitude(sparsity=0.4),
            Magnitude(sparsity=0.5, pattern="2:4"),
            Magnitude(sparsity=0.7, scope="per-row"),
        ]
    ),
)
def test_scaling_by_a_power_of_two_leaves_the_mask(seed: int, exponent: int, method: Magnitude) -> None:
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(method.mask(weight), method.mask(weight * 2.0**exponent))


def test_damage_grows_with_sparsity(llama: LoadedModel, tokens: Tensor) -> None:
    dense = logits(llama, tokens)
    errors = [float((logits(prune(llama, sparsity=s), tokens) - dense).norm()) for s in (0.2, 0.4, 0.6, 0.8)]
    assert errors == sorted(errors)


def test_convolutions_are_pruned_over_channels_and_taps_together() -> None:
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    module = nn.Sequential(*stages).requires_grad_(False)
    model = LoadedModel("tiny-cnn", "cnn", module, detect(module))
    pruned = prune(model, sparsity=0.5)
    assert set(weights(pruned)) == {"0.0", "1.0"}
    assert [int((w == 0).sum()) for w in weights(pruned).values()] == [4 * 8 * 9 // 2 + 1, 8 * 8 * 9 // 2 + 1]


def test_half_precision_is_pruned_in_its_own_dtype(llama: LoadedModel) -> None:
    llama.module.bfloat16()
    pruned = prune(llama, sparsity=0.5)
    for name, weight in weights(pruned).items():
        assert weight.dtype == torch.bfloat16
        dense = weights(llama)[name]
        assert dense[weight == 0].abs().max() < weight[weight != 0].abs().min()


def test_a_width_that_does_not_divide_is_not_applicable(llama: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match=r"q_proj has 32 inputs.*groups of 12"):
        prune(llama, sparsity=0.5, pattern="6:12")


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"sparsity": 1.0}, "sparsity = 1.0"),
        ({"sparsity": -0.1}, "sparsity = -0.1"),
        ({"pattern": "2of4"}, "pattern = '2of4'"),
        ({"pattern": "2:4", "sparsity": 0.7}, "sparsity is 0.5, not 0.7"),
        ({"pattern": "2:4", "scope": "global"}, "leave scope at per-linear"),
        ({"scope": "per-block"}, "scope = 'per-block'"),
        ({"sparcity": 0.5}, "sparsity"),
    ],
)
def test_invalid_hyperparameters_are_refused_by_name(passed: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        build(Magnitude, passed, "magnitude")
    assert message in str(caught.value)


def test_a_model_without_linears_is_not_applicable() -> None:
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.ReLU()])
    model = LoadedModel("bare", "causal-lm", module, Adapter(kind="causal-lm", stack="blocks"))
    with pytest.raises(NotApplicableError, match="bare has no Linear"):
        prune(model, sparsity=0.5)
