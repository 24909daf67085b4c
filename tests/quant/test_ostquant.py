"""OSTQuant: transformations keep the function, learning lowers the loss, merging changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.torchkit.hadamard import hadamard_transform
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import PackedLayer
from methodbench.torchkit.rotation import fuse_norms, residual_stream
from methodbench_quant.llm.layers import open_copy
from methodbench_quant.llm.ostquant import Learned, OSTQuant, Site, kl_top, log_qsur, merge, site_of

Tiny = Callable[[str], LoadedModel]


def transformed(
    model: LoadedModel, data: Calibration, ctx: Context | None = None, **options: object
) -> LoadedModel:
    options = {"steps": 4, "batch_size": 4, "top_k": 16, "smooth_qk": False, **options}
    return build(OSTQuant, options, "ostquant").compress(model, data, ctx or Context())


def logits(model: LoadedModel, data: Calibration) -> Tensor:
    with torch.no_grad():
        return model.module(data.inputs).logits


def prepared(model: LoadedModel, method: OSTQuant) -> tuple[LoadedModel, list[Site], Learned]:
    """Return a fused copy, its sites, and transformations with scales that are far from one."""
    copy = open_copy(model)
    stream = residual_stream(copy)
    sites = [site_of(copy, index) for index in range(len(stream.branches))]
    fuse_norms(stream)
    learned = method.start(stream, sites, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learned.parameters():
            if parameter.ndim == 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return copy, sites, learned


@pytest.mark.parametrize("klt", [True, False])
def test_without_rounding_the_logits_stay(tiny: Tiny, tokens: Calibration, klt: bool) -> None:
    model = tiny("llama")
    ours = transformed(model, tokens, w_bits=16, a_bits=16, use_klt=klt, steps=3)
    expected = logits(model, tokens)
    torch.testing.assert_close(
        logits(ours, tokens), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("bits", [16, 4])
def test_the_merged_model_is_the_model_with_transformations_around_its_quantizers(
    tiny: Tiny, tokens: Calibration, bits: int
) -> None:
    method = OSTQuant(a_bits=bits, tie_rotary=True)
    copy, sites, learned = prepared(tiny("llama"), method)
    with torch.no_grad(), method.transformed(copy, sites, learned):
        # Rounding is not continuous: with quantizers the two forms may differ where a value lies between levels.
        expected = logits(copy, tokens)
    with torch.no_grad():
        merge(residual_stream(copy), sites, learned)
    if bits < 16:
        method._quantize_inputs(copy, sites)
    difference = (logits(copy, tokens) - expected).abs()
    assert float(difference.median()) < 1e-3 * float(expected.abs().max())


def test_free_key_scales_change_the_function_and_tied_ones_do_not(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    expected = logits(model, tokens)
    moved = {}
    for tied in (True, False):
        method = OSTQuant(a_bits=16, tie_rotary=tied)
        copy, sites, learned = prepared(model, method)
        with torch.no_grad():
            merge(residual_stream(copy), sites, learned)
        moved[tied] = float((logits(copy, tokens) - expected).abs().max() / expected.std())
    assert moved[True] < 1e-3 < moved[False]


def test_learning_lowers_the_loss_and_keeps_rotations_orthogonal(tiny: Tiny, tokens: Calibration) -> None:
    method = OSTQuant(steps=24, batch_size=4, top_k=16, a_bits=3)
    copy, sites, learned = prepared(tiny("llama"), method)
    first, last = method.learn(copy, sites, learned, tokens)
    assert last < first
    for rotation in (learned.rotation, *(block.heads for block in learned.blocks)):
        product = rotation.detach().mT @ rotation.detach()
        torch.testing.assert_close(
            product, torch.eye(product.shape[-1]).expand_as(product), rtol=0, atol=1e-4
        )
    assert any(float((block.updown.detach() - 1).abs().max()) > 0 for block in learned.blocks)


def test_learned_and_compensated_weights_hurt_less_than_the_first_rotations_and_rounding(
    tiny: Tiny, tokens: Calibration, error: Callable[[LoadedModel, LoadedModel], float]
) -> None:
    model = tiny("llama")
    plain = transformed(model, tokens, steps=0, a_bits=8, w_rounding="rtn")
    ours = transformed(model, tokens, steps=16, a_bits=8, rotate_lr=2e-3, w_rounding="gptq")
    assert error(ours, model) < error(plain, model)
    assert all(isinstance(layer, PackedLayer) for layer in ours.adapter.targets(ours.module).values())
    assert ours.storage == "real"
    assert len(ours.facts["losses"]) == 2
    assert ours.facts["qsur"].keys() == {"plain", "start", "learned"}


@pytest.mark.parametrize("seed", range(3))
def test_learning_lowers_the_loss_of_scales_that_are_far_off(
    tiny: Tiny, tokens: Calibration, seed: int
) -> None:
    model = tiny("llama")
    method = OSTQuant(
        steps=60, batch_size=len(tokens), top_k=16, rotate_lr=2e-3, smooth_lr=0.05, smooth_qk=False
    )
    copy, sites, learned = prepared(model, method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learned.parameters():
            if parameter.ndim == 1:
                parameter.mul_(torch.randn(parameter.shape, generator=generator).exp())
    first, last = method.learn(copy, sites, learned, tokens)
    assert last < 0.6 * first


def test_the_seed_draws_the_rotation_and_the_model_is_not_touched(tiny: Tiny, tokens: Calibration) -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    first, again, other = (
        logits(transformed(model, tokens, Context(seed=seed), kv_bits=4), tokens) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(model.module.state_dict()[key], value) for key, value in before.items())
    assert not any(module._forward_hooks for module in model.module.modules())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), first=st.booleans())
def test_the_loss_on_the_whole_vocabulary_is_the_divergence(seed: int, first: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 5, 3, 12, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(
        q.log_softmax(-1).flatten(0, -2), p.softmax(-1).flatten(0, -2), reduction="batchmean"
    )
    torch.testing.assert_close(kl_top(p, q, 12, first), expected)
    assert float(kl_top(p, p, 4, first)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(kl_top(p, q, 5, first, reverse=True), kl_top(q, p, 5, first))


def test_qsur_ignores_the_unit_and_rises_with_a_rotation_of_spiky_data() -> None:
    d = 16
    spiky = torch.diag(torch.tensor([100.0, *[1.0] * (d - 1)], dtype=torch.float64))
    h = hadamard_transform(torch.eye(d, dtype=torch.float64))
    assert log_qsur(spiky) == pytest.approx(log_qsur(49 * spiky))
    assert log_qsur(h.T @ spiky @ h) > log_qsur(spiky)
    # The largest value there is: equal eigenvalues, leading axis along the diagonal of the cube.
    isotropic = torch.eye(d, dtype=torch.float64) + 1e-9 * torch.ones(d, d, dtype=torch.float64)
    best = (d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1) - d * math.log(2) + d / 2 * math.log(d)) / d
    assert log_qsur(isotropic) == pytest.approx(best, abs=1e-6)
    assert log_qsur(h.T @ spiky @ h) < best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 12}, "w_bits is 2 to 8"),
        ({"top_k": 0}, "top_k"),
        ({"rotate_lr": 0}, "rotate_lr"),
        ({"w_group_size": 0}, "w_group_size"),
        ({"loss": "mse"}, "loss"),
    ],
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(OSTQuant, options, "ostquant")


@pytest.mark.parametrize("name", ["opt", "mixture"])
def test_blocks_of_another_shape_are_refused(tiny: Tiny, tokens: Calibration, name: str) -> None:
    with pytest.raises(NotApplicableError, match="not one attention and one gated feed-forward network"):
        transformed(tiny(name), tokens)


def test_it_needs_calibration_inputs(tiny: Tiny) -> None:
    with pytest.raises(NotApplicableError, match="learning needs inputs for calibration"):
        transformed(tiny("llama"), Calibration.none())
