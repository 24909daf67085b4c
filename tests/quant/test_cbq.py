"""CBQ: outliers are what was planted, rounding starts at nearest, windows learn and overlap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.learned_rounding import commitment, stretched_sigmoid
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedLayer
from methodbench.torchkit.quantizers import groups_of
from methodbench_quant.llm.cbq import CBQ, LayerRounding, decide, split_outliers
from methodbench_quant.llm.layers import open_copy
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]
Error = Callable[[LoadedModel, LoadedModel], float]


def quantized(
    model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: object
) -> LoadedModel:
    options = {"epochs": 2, "batch_size": 4, **options}
    return build(CBQ, options, "cbq").compress(model, data, ctx or Context())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), factor=st.floats(15, 40))
def test_planted_outliers_are_the_outliers(seed: int, count: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(400, generator=generator, dtype=torch.float64)
    planted = torch.randperm(400, generator=generator)[:count]
    values[planted] = factor * (1 + 0.01 * torch.rand(count, generator=generator, dtype=torch.float64))
    split = split_outliers(values)
    assert set(torch.where(values >= split.smallest)[0].tolist()) == set(planted.tolist())
    assert split.limit <= 1


def test_bounded_values_have_none() -> None:
    split = split_outliers(torch.linspace(0, 1, 101))
    assert split.limit == split.smallest == float("inf")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans())
def test_rounding_starts_at_nearest_and_stays_within_a_step(seed: int, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=generator)
    layer = LayerRounding.first(groups_of(weight, 16), bits, symmetric, 3, generator)
    d = layer.rounding()
    assert bool(((d >= 0) & (d <= 1)).all())
    start = layer.harden()
    step = layer.step.expand_as(layer.base).flatten(1)
    assert bool(((start.dequantize() - weight).abs() <= 0.5001 * step).all())
    layer.right = torch.randn(layer.right.shape, generator=generator)
    later = layer.harden()
    assert int((later.codes - start.codes).abs().max()) <= 1
    assert layer.left.numel() + layer.right.numel() == 3 * (6 + 32)


def test_the_regularizer_is_zero_where_all_is_decided() -> None:
    assert float(commitment(torch.tensor([0.0, 1.0, 1.0]), 2.0)) == 0
    assert float(commitment(torch.tensor([0.5]), 2.0)) == 1
    d = stretched_sigmoid(torch.tensor([-9.0, 9.0]))
    assert d.tolist() == [0, 1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_with_nothing_learned_it_is_rounding_to_nearest(
    tiny: Tiny, tokens: Calibration, symmetric: bool
) -> None:
    model = tiny("llama")
    ours = quantized(model, tokens, bits=4, group_size=16, symmetric=symmetric, epochs=0, cfp="none")
    convention = "absmax" if symmetric else "gptq"
    nearest = RTN(bits=4, group_size=16, convention=convention, symmetric=symmetric)  # type: ignore[arg-type]
    expected = nearest.compress(model, tokens, Context()).module.state_dict()
    state = ours.module.state_dict()
    # A weight half way between two levels may go either way.
    for key, value in state.items():
        assert float((value != expected[key]).float().mean()) < 0.01, key


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_scaling_channels_alone_keeps_the_logits(tiny: Tiny, tokens: Calibration, name: str) -> None:
    model = tiny(name)
    copy = open_copy(model)
    facts = CBQ(cfp="activations", coarse=0.5).treat_outliers(copy, model, tokens)
    assert facts["scaled channels"] > 0
    assert facts["cut weights"] == 0
    with torch.no_grad():
        before, after = model.module(tokens.inputs).logits, copy.module(tokens.inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_learning_lowers_the_loss_of_every_window(tiny: Tiny, tokens: Calibration) -> None:
    ours = quantized(
        tiny("llama"),
        tokens,
        bits=2,
        symmetric=False,
        group_size=16,
        window=1,
        overlap=0,
        epochs=8,
        regularization=0.0,
    )
    assert len(ours.facts["losses"]) == 2
    assert all(last < first for first, last in ours.facts["losses"].values())


@pytest.mark.parametrize(("window", "overlap"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("a_bits", [16, 8])
def test_learned_windows_come_closer_to_the_dense_model_than_rounding(
    tiny: Tiny, tokens: Calibration, error: Error, window: int, overlap: int, a_bits: int
) -> None:
    model = tiny("llama")
    options = {"bits": 2, "symmetric": False, "group_size": 16, "a_bits": a_bits, "cfp": "none"}
    first = quantized(model, tokens, epochs=0, **options)
    ours = quantized(model, tokens, epochs=8, window=window, overlap=overlap, **options)
    assert error(ours, model) < error(first, model)
    assert all(isinstance(layer, PackedLayer) for layer in ours.adapter.targets(ours.module).values())
    assert ours.storage == "real"


def test_decided_roundings_learn_what_soft_ones_do_not_in_a_few_steps(
    tiny: Tiny, tokens: Calibration, error: Error
) -> None:
    model = tiny("llama")
    options = {"bits": 3, "symmetric": False, "cfp": "none", "regularization": 0.0, "rounding_lr": 3e-2}
    nearest = quantized(model, tokens, epochs=0, **options)
    soft = quantized(model, tokens, epochs=3, **options)
    ours = quantized(model, tokens, epochs=3, decided=True, **options)
    assert error(ours, model) < min(error(soft, model), error(nearest, model))
    # The loss is that of the weights which are kept; soft weights start as the dense ones, at almost none.
    assert all(last < first for first, last in ours.facts["losses"].values())
    first = next(iter(ours.facts["losses"]))
    assert ours.facts["losses"][first][0] > 3 * soft.facts["losses"][first][0]


def test_a_decision_passes_gradients() -> None:
    d = torch.tensor([0.2, 0.7], requires_grad=True)
    decided = decide(d)
    decided.sum().backward()
    assert decided.tolist() == [0, 1]
    assert d.grad is not None
    assert d.grad.tolist() == [1, 1]


def test_the_seed_draws_the_factors_and_the_model_is_not_touched(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    first, again = (quantized(model, tokens, bits=3).module.state_dict() for _ in range(2))
    other = quantized(model, tokens, Context(seed=1), bits=3).module.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert all(torch.equal(model.module.state_dict()[key], value) for key, value in before.items())


def test_what_cannot_be_done_says_why(tiny: Tiny, tokens: Calibration) -> None:
    with pytest.raises(ParameterError, match="overlap must be smaller than window"):
        build(CBQ, {"window": 1}, "cbq")
    with pytest.raises(NotApplicableError, match="calibration needs inputs"):
        quantized(tiny("llama"), Calibration.none())
    with pytest.raises(NotApplicableError, match="multiple of the group size 5"):
        quantized(tiny("llama"), tokens, group_size=5)
    broken = tiny("llama")
    broken.module.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="up_proj holds NaN"):
        quantized(broken, tokens)
