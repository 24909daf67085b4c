"""ABQ-LLM: transformations keep the block, learning lowers its loss, nothing learned is plain rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.attention import transform_operands
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedLayer
from methodbench.torchkit.reconstruction import windows
from methodbench_quant.llm.abq_llm import ABQLLM, Tap, balanced_grid, mean_kl, observe, truncate
from methodbench_quant.llm.layers import open_copy
from methodbench_quant.llm.rtn import RTN

Tiny = Callable[[str], LoadedModel]
Error = Callable[[LoadedModel, LoadedModel], float]


def quantized(
    model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: object
) -> LoadedModel:
    options = {"epochs": 2, "batch_size": 4, **options}
    return build(ABQLLM, options, "abq-llm").compress(model, data, ctx or Context())


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("bits", [3, 4])
def test_with_nothing_to_learn_it_is_rounding_bit_for_bit(
    tiny: Tiny, tokens: Calibration, name: str, bits: int
) -> None:
    model = tiny(name)
    ours = quantized(model, tokens, bits=bits, group_size=16, epochs=0, let=False, lwc=False)
    nearest = RTN(bits=bits, group_size=16, convention="omni").compress(model, tokens, Context())
    expected = nearest.module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.module.state_dict().items())


@pytest.mark.parametrize(("name", "a_bits"), [("llama", 16), ("opt", 16), ("opt", 8)])
@pytest.mark.parametrize("tied", [True, False])
def test_transformations_and_zero_compensation_keep_the_block(
    tiny: Tiny, tokens: Calibration, name: str, a_bits: int, tied: bool
) -> None:
    model = tiny(name)
    teacher, student = open_copy(model), open_copy(model)
    transform_operands(teacher, lambda _: {})
    method = ABQLLM(a_bits=a_bits, tie_rotary=tied)
    generator = torch.Generator().manual_seed(0)
    for window in windows(teacher, student, tokens, batch_size=4):
        learned = method.start(student, window, observe(teacher, window), compensated=True)
        for key, scale in learned.scales.items():
            if key != "qk" or tied or name == "opt":
                learned.scales[key] = scale * (torch.rand(scale.shape, generator=generator) + 0.5)
        assert bool(learned.shifts) is (name == "opt" and a_bits < 16)
        dense = dict(window.student_blocks[0].state_dict())
        y = window.student(0, [learned.apply(dense)])
        torch.testing.assert_close(y, window.targets[0], rtol=1e-3, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("loss", ["distribution", "mse"])
def test_learning_lowers_the_loss_of_every_block(tiny: Tiny, tokens: Calibration, loss: str) -> None:
    ours = quantized(tiny("llama"), tokens, bits=2, loss=loss, epochs=8, group_size=16)
    assert len(ours.facts["losses"]) == 2
    assert all(last < first for first, last in ours.facts["losses"].values())


@pytest.mark.parametrize("a_bits", [16, 6])
def test_learned_blocks_come_closer_to_the_dense_model_than_rounding(
    tiny: Tiny, tokens: Calibration, error: Error, a_bits: int
) -> None:
    model = tiny("llama")
    options = {"bits": 2, "group_size": 16, "a_bits": a_bits}
    first = quantized(model, tokens, epochs=0, let=False, lwc=False, **options)
    ours = quantized(model, tokens, epochs=6, **options)
    assert error(ours, model) < 0.8 * error(first, model)
    layers = ours.adapter.targets(ours.module).values()
    assert all(isinstance(layer, PackedLayer) for layer in layers)
    assert ours.storage == "real"


@pytest.mark.parametrize(("balance", "levels"), [(True, 5), (False, 4)])
def test_two_bits_have_five_levels_in_the_code_and_four_in_the_paper(
    tiny: Tiny, tokens: Calibration, balance: bool, levels: int
) -> None:
    ours = quantized(tiny("llama"), tokens, bits=2, bit_balance=balance, epochs=1)
    assert ours.facts.get("levels", 4) == levels
    counts = [
        len(torch.unique(layer.integers()[row]))
        for layer in ours.adapter.targets(ours.module).values()
        for row in range(layer.out_features)
    ]
    assert max(counts) == levels


def test_five_levels_beat_four(tiny: Tiny, tokens: Calibration, error: Error) -> None:
    model = tiny("llama")
    options = {"bits": 2, "epochs": 0, "let": False, "lwc": False}
    balanced, plain = (quantized(model, tokens, bit_balance=b, **options) for b in (True, False))
    assert error(balanced, model) < error(plain, model)


def test_nothing_is_random_and_the_model_is_not_touched(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    first, second = (quantized(model, tokens, bits=3).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(model.module.state_dict()[key], value) for key, value in before.items())


def test_the_attention_map_is_the_models(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    teacher = open_copy(model)
    transform_operands(teacher, lambda _: {})
    name = teacher.adapter.block_names(teacher.module)[0]
    with Tap(teacher, name) as tap, torch.no_grad():
        teacher.module(tokens.inputs, use_cache=False)
        ours = tap.attention_map({})
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.module(tokens.inputs, use_cache=False, output_attentions=True).attentions[0].mean(1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_small_scales_are_kept_away_from_zero_and_still_learn() -> None:
    scale = torch.tensor([1e-3, -1e-3, 0.5], requires_grad=True)
    moved = truncate(scale)
    torch.testing.assert_close(moved, torch.tensor([1e-2, -1e-2, 0.5]))
    moved.sum().backward()
    assert torch.equal(scale.grad, torch.ones(3))


def test_the_divergence_of_equal_maps_is_zero_and_grids_follow_the_bits() -> None:
    p = torch.rand(2, 4, 4).softmax(-1)
    assert float(mean_kl(p, p)) == pytest.approx(0, abs=1e-9)
    x = torch.randn(5, 64)
    for bits, top in ((1, 2), (2, 4), (3, 7), (8, 255)):
        assert balanced_grid(x, bits).high == top
    assert balanced_grid(x, 2, balance=False).high == 3


def test_what_cannot_be_done_says_why(tiny: Tiny, tokens: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="not one attention and one feed-forward network"):
        quantized(tiny("mixture"), tokens)
    with pytest.raises(NotApplicableError, match="needs calibration inputs"):
        quantized(tiny("llama"), Calibration.none())
    with pytest.raises(NotApplicableError, match="multiple of the group size 5"):
        quantized(tiny("llama"), tokens, group_size=5)
    broken = tiny("llama")
    broken.module.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="up_proj holds NaN"):
        quantized(broken, tokens)
    with pytest.raises(ParameterError, match="let_lr"):
        build(ABQLLM, {"let_lr": 0}, "abq-llm")
