"""Sites, positions and counts of activation sparsity: what is zeroed is what the record says."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.testing import planted
from methodbench.torchkit.activation_sparsity import (
    Positions,
    Site,
    SparseInput,
    Threshold,
    TopK,
    block_linears,
    dense_tokens,
    feed_forwards,
    forget,
    mask_inputs,
    mask_neurons,
    match,
    measured,
    observed,
    site_sparsity,
    sites,
    uncounted,
)
from methodbench.torchkit.model import Calibration, LoadedModel

POLICIES: list[Positions] = ["all", "last-99%", "last-half", "last-10%", "decode"]


def tokens(count: int = 3, seed: int = 5) -> Tensor:
    return planted.inputs("llama", count, seed).inputs


def counted(model: LoadedModel, ids: Tensor) -> dict:
    forget(model)
    planted.output(model.module, ids)
    return measured(model)


@given(length=st.integers(1, 4096))
def test_every_policy_touches_its_share_and_a_single_token_always(length: int) -> None:
    touched = {policy: length - dense_tokens(policy, length) for policy in POLICIES}
    if length == 1:
        assert set(touched.values()) == {1}
        return
    assert touched["all"] == length
    assert touched["decode"] == 0
    assert touched["last-half"] == length // 2
    assert touched["last-99%"] == int(0.99 * length)
    assert 0 <= touched["last-10%"] - length / 10 < 1


@settings(max_examples=25, deadline=None)
@given(keep=st.integers(0, 16), seed=st.integers(0, 999), scaled=st.booleans())
def test_topk_keeps_exactly_its_count_and_the_largest(keep: int, seed: int, scaled: bool) -> None:
    draw = planted.generator(seed)
    x = torch.randn(2, 5, 16, generator=draw)
    scale = torch.rand(16, generator=draw) if scaled else None
    mask, scores = TopK(keep, scale)(x), x.abs() if scale is None else (x * scale).abs()
    assert (mask.sum(-1) == keep).all()
    if 0 < keep < 16:
        assert (scores.masked_fill(~mask, torch.inf).amin(-1) >= scores.masked_fill(mask, 0).amax(-1)).all()


def test_a_threshold_is_strict() -> None:
    x = torch.tensor([0.0, -1.0, 2.0, -3.0])
    assert Threshold(1.0)(x).tolist() == [False, False, True, True]
    assert Threshold(0.0)(x).tolist() == [False, True, True, True]
    assert Threshold(torch.tensor([0.0, 0.5, 2.0, 9.0]))(x).tolist() == [False, True, False, False]


@pytest.mark.parametrize("structure", ["llama", "opt", "mixture"])
@pytest.mark.parametrize("positions", POLICIES)
def test_keeping_everything_is_bit_identical_and_counts_nothing(structure: str, positions: Positions) -> None:
    model, ids = planted.build(structure), tokens()
    sparse = model.clone()
    mask_inputs(
        sparse,
        {name: TopK(layer.in_features) for name, layer in block_linears(model).items()},
        positions,
    )
    mask_neurons(sparse, [(network, Threshold(0.0)) for network in feed_forwards(sparse)], positions)
    assert torch.equal(planted.output(sparse.module, ids), planted.output(model.module, ids))
    by_role = measured(sparse).get("sparsity_inputs", {})
    assert all(share == 0 for share in by_role.values())


@pytest.mark.parametrize("structure", ["llama", "opt"])
def test_only_the_last_tokens_are_touched_also_where_a_block_flattens_them(structure: str) -> None:
    model, ids = planted.build(structure), tokens()
    sparse = model.clone()
    mask_inputs(sparse, {name: TopK(8) for name in block_linears(model)}, "last-half")
    dense, got = planted.output(model.module, ids), planted.output(sparse.module, ids)
    assert torch.equal(got[:, :12], dense[:, :12])
    assert not torch.allclose(got[:, 12:], dense[:, 12:], atol=1e-3)
    assert measured(sparse)["sparsity_touched_tokens"] == 0.5


def test_the_counts_of_inputs_are_exact_and_weighted_by_parameters() -> None:
    model, ids = planted.build("llama"), tokens()
    kept = {"q": 32, "k": 128, "v": 64, "o": 100, "gate": 16, "up": 128, "down": 64}
    linears = block_linears(model)
    rules = {name: TopK(kept[model.adapter.role(name)]) for name in linears}
    mask_inputs(model, rules, "all")
    facts = counted(model, ids)
    for role, count in kept.items():
        width = 256 if role == "down" else 128
        assert facts["sparsity_inputs"][role] == pytest.approx(1 - count / width)
    sizes = {name: layer.weight.numel() for name, layer in linears.items()}
    read = sum(rules[name].keep / linears[name].in_features * size for name, size in sizes.items())
    assert facts["sparsity_model"] == pytest.approx(1 - read / sum(sizes.values()))
    assert facts["sparsity_model_over_all_tokens"] == pytest.approx(facts["sparsity_model"])
    assert "sparsity_neurons" not in facts


@pytest.mark.parametrize(("structure", "spared"), [("llama", ("up", "down")), ("opt", ("fc2",))])
def test_a_zero_neuron_spares_a_row_of_up_and_a_column_of_down(
    structure: str, spared: tuple[str, ...]
) -> None:
    model, ids = planted.build(structure), tokens()
    sizes = {name: layer.weight.numel() for name, layer in block_linears(model).items()}
    touched = sum(size for name, size in sizes.items() if model.adapter.role(name) in spared)
    mask_neurons(model, [(network, TopK(64)) for network in feed_forwards(model)], "all")
    facts = counted(model, ids)
    assert facts["sparsity_neurons"] == pytest.approx(0.75)
    assert facts["sparsity_model"] == pytest.approx(0.75 * touched / sum(sizes.values()))
    assert "sparsity_inputs" not in facts


def test_masked_neurons_compute_what_a_network_of_the_active_ones_does() -> None:
    torch.manual_seed(0)
    model = planted.build("llama")
    (network, *_) = feed_forwards(model)
    mlp = model.module.get_submodule(network.first.rpartition(".")[0])
    x = torch.randn(1, 1, 128)
    dense = copy.deepcopy(mlp)
    mask_neurons(model, [(network, Threshold(0.05))], "all")
    active = (dense.act_fn(dense.gate_proj(x)).abs() > 0.05)[0, 0]
    assert 10 < int(active.sum()) < 250
    hidden = dense.act_fn(x @ dense.gate_proj.weight[active].T) * (x @ dense.up_proj.weight[active].T)
    torch.testing.assert_close(mlp(x), hidden @ dense.down_proj.weight[:, active].T, rtol=1e-4, atol=1e-5)


def test_no_token_touched_is_no_sparsity() -> None:
    model = planted.build("llama")
    mask_inputs(model, {name: TopK(1) for name in block_linears(model)}, "decode")
    facts = counted(model, tokens())
    assert facts["sparsity_model"] == facts["sparsity_touched_tokens"] == 0
    assert "sparsity_inputs" not in facts
    assert measured(planted.build("llama")) == {}


def test_what_runs_uncounted_leaves_no_trace() -> None:
    model = planted.build("llama")
    mask_inputs(model, {name: TopK(64) for name in block_linears(model)}, "all")
    facts = counted(model, tokens())
    with uncounted(model.module):
        masked = planted.output(model.module, tokens())
    assert measured(model) == facts
    assert torch.equal(planted.output(model.module, tokens()), masked)
    assert {site.tokens for site in sites(model.module).values()} == {2 * tokens().numel()}


def test_counts_start_anew_and_a_clone_counts_for_itself() -> None:
    model = planted.build("llama")
    mask_inputs(model, {name: TopK(64) for name in block_linears(model)}, "all")
    counted(model, tokens())
    other = model.clone()
    seen = {name: site.tokens for name, site in sites(model.module).items()}
    planted.output(other.module, tokens())
    assert {name: site.tokens for name, site in sites(model.module).items()} == seen
    assert all(site.tokens == 2 * seen[name] for name, site in sites(other.module).items())
    layer = other.module.model.layers[0].self_attn.q_proj
    assert isinstance(layer, SparseInput)
    assert layer.site.sequence is other.module.model.layers[0].self_attn.o_proj.site.sequence
    assert layer.site.sequence is not model.module.model.layers[0].self_attn.q_proj.site.sequence


def test_experts_get_tokens_without_an_order_and_all_are_touched() -> None:
    site = Site("input", "last-half", {"": 1.0})
    grid, dense = site.split(torch.zeros(7, 16))
    assert (grid.shape, dense) == ((1, 7, 16), 0)
    site.sequence.leading = torch.Size((2, 4))
    grid, dense = site.split(torch.zeros(8, 16))
    assert (grid.shape, dense) == ((2, 4, 16), 2)


def test_a_model_level_target_is_weighted_by_what_the_sites_can_spare() -> None:
    model = planted.build("llama")
    spared = {name: part for network in feed_forwards(model) for name, part in network.spared.items()}
    sizes = {name: layer.weight.numel() for name, layer in block_linears(model).items()}
    most = sum(sizes[name] for name in spared) / sum(sizes.values())
    assert site_sparsity(model, spared, 0.25) == pytest.approx(0.25 / most)
    assert site_sparsity(model, spared, 0) == 0
    with pytest.raises(NotApplicableError, match=f"hold {most:.3f} of the weights"):
        site_sparsity(model, spared, most)


def test_linears_that_read_one_tensor_are_observed_together() -> None:
    model, data = planted.build("llama"), planted.inputs("llama", 3, 5)
    groups = [
        tuple(model.adapter.role(name) for name in names)
        for names, inputs in observed(model, data, block_linears(model), "a test")
        if len(torch.cat([x.flatten(0, 1) for x in inputs])) == 3 * 24
    ]
    assert groups == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)] * 2
    with pytest.raises(NotApplicableError, match="a test calibrates on activations"):
        next(observed(model, Calibration.none(), block_linears(model), "a test"))


def test_a_correction_brings_the_measured_sparsity_nearer_to_the_target() -> None:
    model, data = planted.build("llama"), planted.inputs("llama", 8, 1)

    def install(sparse: LoadedModel, level: float) -> None:
        # A level that is off by a tenth, as thresholds from other activations would be.
        rules = {
            name: TopK(round(layer.in_features * (1 - 0.9 * level)))
            for name, layer in block_linears(model).items()
        }
        mask_inputs(sparse, rules, "all")

    off = {}
    for corrections in (0, 2):
        sparse, level = match(model, data, 0.5, 0.5, install, corrections)
        off[corrections] = abs(counted(sparse, data.inputs)["sparsity_model"] - 0.5)
        assert (level == 0.5) == (corrections == 0)
    assert off[0] > 0.04
    assert off[2] < 0.01


def test_blocks_without_a_feed_forward_network_are_refused() -> None:
    bed = planted.linear_bed(planted.random_weight(0))
    with pytest.raises(NotApplicableError, match="no feed-forward network"):
        feed_forwards(bed.model)
    bed.model.module[0] = nn.Sequential()
    with pytest.raises(NotApplicableError, match="no Linear inside its blocks"):
        block_linears(bed.model)
