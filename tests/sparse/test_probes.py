"""Probes: neurons that are not zero, those that perplexity does not miss, and blocks that nobody reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.depth_use import DepthUse, Skip, Stack, contributions, depth_score, draw_positions
from methodbench_sparse.nonzero_neurons import NonzeroNeurons, nonzeros
from methodbench_sparse.sparsing_law import CettCurve, SparsingLaw, bisect


def test_half_of_the_neurons_of_a_random_relu_network_are_not_zero() -> None:
    found = NonzeroNeurons().measure(planted.build("opt"), planted.inputs("opt", 6, 1), Context())
    assert float(found["nonzero"]) == pytest.approx(0.5, abs=0.1)
    assert np.asarray(found["by-layer"]).shape == (2,)
    assert 0 <= float(found["never-active"]) + float(found["always-active"]) <= 1


def test_networks_without_exact_zeros_need_an_eps(llama: LoadedModel, data: Calibration) -> None:
    ctx = Context()
    found = NonzeroNeurons().measure(llama, data, ctx)
    assert found["nonzero"] == 1.0
    assert any("no ReLU network" in warning for warning in ctx.warnings)
    some = [
        float(NonzeroNeurons(eps=eps).measure(llama, data, Context())["nonzero"]) for eps in (0.01, 0.1, 1)
    ]
    assert 1 > some[0] > some[1] > some[2]


@given(scale=st.sampled_from([2.0**k for k in range(-4, 5)]), seed=st.integers(0, 99))
def test_counts_of_relu_do_not_change_with_the_scale(scale: float, seed: int) -> None:
    z = torch.randn(4, 7, 16, generator=planted.generator(seed))
    assert torch.equal(nonzeros(z.relu()), nonzeros((scale * z).relu()))


def curve(seed: int = 0, factor: float = 1.0, candidates: int = 2048) -> CettCurve:
    draw = planted.generator(seed)
    hidden = torch.randn(60, 48, generator=draw).pow(3)
    return CettCurve(hidden * factor, torch.randn(24, 48, generator=draw) / factor, candidates)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), cett=st.floats(0.02, 0.6))
def test_the_threshold_is_the_last_that_keeps_the_error(seed: int, cett: float) -> None:
    found = curve(seed)
    threshold = found.threshold(cett)
    if threshold < 0:
        assert found.cett(float(found.grid[0])) > cett
        return
    index = int((found.grid - threshold).abs().argmin())
    assert found.cett(threshold) <= cett + 1e-6
    assert index >= len(found.grid) - 2 or found.cett(float(found.grid[index + 1])) > cett - 1e-6


def test_errors_grow_with_thresholds_and_do_not_change_when_up_and_down_trade_a_factor() -> None:
    found, traded = curve(), curve(factor=4.0)
    errors = [found.cett(float(threshold)) for threshold in found.grid[::200]]
    assert errors == sorted(errors)
    assert traded.threshold(0.2) == pytest.approx(found.threshold(0.2), rel=1e-3)
    assert found.threshold(0.0) == -1, "nothing is left out where the smallest neuron is too much"


def test_bisection_ends_where_the_ratio_passes() -> None:
    assert bisect(lambda c: 1 + c * c, 1.25, 1e-4) == pytest.approx(0.5, abs=1e-3)


def test_more_perplexity_buys_more_sparsity(llama: LoadedModel, data: Calibration) -> None:
    found = [
        SparsingLaw(p=p, candidates=512, tolerance=0.02).measure(llama, data, Context()) for p in (1.0, 20.0)
    ]
    shares = [float(result["sparsity"]) for result in found]
    assert 0 <= shares[0] <= shares[1] < 1
    assert shares[1] > 0.05
    assert np.asarray(found[0]["by-layer"]).shape == (2,)
    assert all(float(result["ppl-ratio"]) < 1.3 for result in found)


def test_what_they_lack_is_said(llama: LoadedModel, data: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="two sequences"):
        SparsingLaw().measure(llama, Calibration(data.inputs[:1]), Context())
    with pytest.raises(NotApplicableError, match="there are none"):
        NonzeroNeurons().measure(llama, Calibration.none(), Context())


@pytest.mark.parametrize(("cls", "passed"), [(SparsingLaw, {"p": 0}), (NonzeroNeurons, {"eps": -1})])
def test_invalid_hyperparameters_are_refused_by_name(cls: type, passed: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(passed))):
        build(cls, passed, "it")


def test_leaving_out_nothing_has_no_effect_and_nobody_before_feels_it(
    llama: LoadedModel, data: Calibration
) -> None:
    stack = Stack(llama.clone())
    ids = data.inputs[:1]
    trace = stack.run(ids)
    for part in ("layer", "mlp", "attention"):
        effects, outputs = stack.skip_effects(ids, trace, part, [1], 1)  # type: ignore[arg-type]
        assert not effects.any(), part
        assert not outputs.any(), part
        effects, outputs = stack.skip_effects(ids, trace, part, [8, 16], 1)  # type: ignore[arg-type]
        assert not effects.tril().any(), "only later blocks feel what earlier tokens of a block wrote"
        assert outputs[0] > 0
        assert outputs[1] == 0, "nobody reads what the last block wrote at earlier tokens"
    several, _ = stack.skip_effects(ids, trace, "layer", [8, 16], 1)
    single = [stack.skip_effects(ids, trace, "layer", [cut], 1)[0] for cut in (8, 16)]
    torch.testing.assert_close(several, torch.stack(single).amax(0), rtol=1e-4, atol=1e-5)


def test_a_block_that_writes_nothing_contributes_nothing(llama: LoadedModel, data: Calibration) -> None:
    silent = llama.clone()
    block = silent.adapter.blocks(silent.module)[1]
    for name, linear in silent.adapter.linears(block).items():
        if silent.adapter.role(name) in ("o", "down"):
            linear.weight = torch.nn.Parameter(torch.zeros_like(linear.get_parameter("weight")))
    stack = Stack(silent)
    trace = stack.run(data.inputs[:1])
    found = contributions(trace)
    assert found["contribution-layer"][1] == 0
    assert found["cosine-stream"][1] == pytest.approx(1.0)
    assert found["contribution-layer"][0] > 0
    _, outputs = stack.skip_effects(data.inputs[:1], trace, "layer", [None], 1)
    assert outputs[1] == 0
    assert outputs[0] > 0
    # The last block writes nothing, so the lens before it sees what the head sees.
    lens = stack.lens(trace, 5)
    assert float(lens["lens-kl"][1]) == pytest.approx(0, abs=1e-5)
    assert float(lens["lens-overlap"][1]) == 1
    assert float(lens["lens-kl"][0]) > 0.01


def test_a_local_effect_reaches_every_later_block_once(llama: LoadedModel, data: Calibration) -> None:
    stack = Stack(llama.clone())
    ids = data.inputs[:1]
    trace = stack.run(ids)
    mask = torch.zeros(1, ids.shape[1], dtype=torch.bool)
    mask[:, 1:] = True
    changed = stack.run(ids, Skip(0, "layer", mask, trace, local=True))
    # What block 1 reads is its true input less what block 0 wrote, and what leaves the stack is so too.
    expected = trace.h[1] - mask[..., None] * trace.c[0]
    torch.testing.assert_close(changed.h[1], expected)
    final = trace.h[1] + trace.c[1] - mask[..., None] * trace.c[0]
    torch.testing.assert_close(changed.logits, stack.head(stack.norm(final)).float(), rtol=1e-4, atol=1e-4)


def test_depth_scores_are_centres_of_mass() -> None:
    assert depth_score(torch.tensor([0.0, 0.0, 2.0])) == 2
    assert depth_score(torch.tensor([1.0, 1.0, 1.0])) == 1
    assert depth_score(torch.zeros(3)) == 0
    assert draw_positions(40, 9, planted.generator(0)) == [8, 16, 24, 32]
    assert draw_positions(13, 4, planted.generator(0)) == [8]


def test_depth_use_of_a_model_is_whole_and_leaves_it_untouched(llama: LoadedModel, data: Calibration) -> None:
    before = llama.module(data.inputs[:1]).logits
    found = DepthUse(prompts=2, tokens=40).measure(llama, data, Context(seed=1))
    assert torch.equal(llama.module(data.inputs[:1]).logits, before)
    assert np.asarray(found["effect"]).shape == (2, 2)
    assert 0 <= float(found["second-half-share"]) <= 1
    assert 0 <= float(found["settled"]) <= 1
    assert all(np.isfinite(np.asarray(value)).all() for value in found.values())
    local = DepthUse(prompts=2, tokens=40, local=True).measure(llama, data, Context(seed=1))
    assert not np.array_equal(np.asarray(local["output-effect"]), np.asarray(found["output-effect"]))


def test_depth_use_refuses_what_it_cannot_measure(llama: LoadedModel, data: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="token ids"):
        DepthUse().measure(llama, Calibration.none(), Context())
    with pytest.raises(NotApplicableError, match="part=layer"):
        DepthUse(local=True, part="mlp").measure(llama, data, Context())
    with pytest.raises(NotApplicableError):
        DepthUse().measure(planted.build("opt"), planted.inputs("opt", 6, 1), Context())
    with pytest.raises(ParameterError, match="tokens"):
        build(DepthUse, {"tokens": 4}, "depth-use")
