"""Methods of training: what their papers say must hold, and what they do with models and tasks they cannot use."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.testing import planted
from methodbench_optim.training import noprop
from methodbench_optim.training.asft import ASFT, Anchored, anchored_loss
from methodbench_optim.training.atlas import ATLAS, Composition
from methodbench_optim.training.gere import GeRe, Replaying, margin_loss
from methodbench_optim.training.noprop import Blocks, NoProp
from methodbench_optim.training.tract import TrAct, TrActLayer, preconditioned


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# TrAct.


def test_tract_tends_to_the_ordinary_gradient_as_its_regularizer_grows():
    x, d = draw(0, 20, 6), draw(1, 20, 4)
    ordinary = d.T @ x
    for lam in (1e3, 1e5):
        error = (lam * preconditioned(x, d, lam) - ordinary).norm() / ordinary.norm()
        assert float(error) < 10 / lam


def test_both_sides_of_tracts_inverse_agree():
    # Rows of zeros add nothing to the sums: they move the same problem from one branch to the other.
    x, d, count = draw(2, 5, 8), draw(3, 5, 3), 5
    small = preconditioned(x, d, 0.1)
    padded = preconditioned(F.pad(x, (0, 0, 0, 7)), F.pad(d, (0, 0, 0, 7)), 0.1 * count / 12)
    torch.testing.assert_close(padded * count / 12, small, rtol=1e-10, atol=1e-12)


def test_brighter_inputs_take_smaller_steps_of_tract():
    x, d = draw(4, 30, 6), draw(5, 30, 4)
    torch.testing.assert_close(preconditioned(3 * x, d, 0.9), preconditioned(x, d, 0.1) / 3)


def test_tract_changes_the_first_layers_weight_gradient_alone():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    wrapped = nn.Sequential(*[type(layer)() if not list(layer.parameters()) else layer for layer in plain])
    parameters = list(plain.parameters())
    x = torch.randn(6, 3, 8, 8)
    gradients = []
    for model in (plain, TrAct().wrap(wrapped, Context())):
        assert list(map(id, model.parameters())) == list(map(id, parameters))
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert isinstance(wrapped[0], TrActLayer)
    assert not torch.allclose(gradients[0][0], gradients[1][0])
    for ours, theirs in zip(gradients[1][1:], gradients[0][1:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1),
    ],
)
def test_tract_refuses_convolutions_that_its_rule_does_not_cover(layer):
    with pytest.raises(NotApplicableError, match="without groups and dilation"):
        TrAct().wrap(nn.Sequential(layer), Context())


def test_tract_needs_a_first_layer():
    with pytest.raises(NotApplicableError, match="neither a Linear nor a Conv2d"):
        TrAct().wrap(nn.Sequential(nn.ReLU()), Context())


# ASFT.


def test_without_an_anchor_asft_is_dft_and_sft_kl_is_sft():
    logits, labels, reference = draw(6, 9, 7), torch.arange(9) % 7, draw(7, 9, 7)
    for anchored, plain in (("asft", "dft"), ("sft+kl", "sft")):
        ours = anchored_loss(logits, labels, reference, anchored, 0.0)
        assert torch.equal(ours, anchored_loss(logits, labels, None, plain, 0.0))


def test_the_anchor_is_nothing_at_the_start():
    logits = draw(8, 9, 7).requires_grad_()
    labels = torch.arange(9) % 7
    at_start = anchored_loss(logits, labels, logits.detach(), "asft", 5.0)
    torch.testing.assert_close(at_start, anchored_loss(logits, labels, None, "dft", 0.0))
    (gradient,) = torch.autograd.grad(at_start, logits, retain_graph=True)
    (plain,) = torch.autograd.grad(anchored_loss(logits, labels, None, "dft", 0.0), logits)
    torch.testing.assert_close(gradient, plain)


def test_dfts_loss_and_gradient_of_a_token_are_bounded():
    for seed in range(20):
        logits = (5 * draw(seed, 1, 6)).requires_grad_()
        loss = anchored_loss(logits, torch.tensor([2]), None, "dft", 0.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        p = float(logits.detach().softmax(-1)[0, 2])
        assert 0 <= float(loss) <= 1 / math.e
        assert float(gradient.norm()) <= math.sqrt(2) * p + 1e-12


def test_a_constant_added_to_all_logits_and_rows_without_label_change_nothing():
    logits, labels, reference = draw(9, 5, 7), torch.tensor([1, -100, 3, -100, 6]), draw(10, 5, 7)
    base = anchored_loss(logits, labels, reference, "asft", 0.1)
    torch.testing.assert_close(anchored_loss(logits + 3, labels, reference, "asft", 0.1), base)
    other = torch.where((labels == -100).unsqueeze(1), 100 * logits, logits)
    torch.testing.assert_close(anchored_loss(other, labels, reference, "asft", 0.1), base)
    assert float(anchored_loss(logits, torch.full((5,), -100), reference, "asft", 0.1)) == 0.0


def test_the_anchor_keeps_the_model_nearer_to_its_start():
    given = planted.lessons(0)
    noisy = torch.where(torch.arange(len(given.y)) % 5 == 0, (given.y + 1) % planted.CLASSES, given.y)
    drift = {}
    for mode in ("dft", "asft"):
        method = ASFT(mode=mode, kl_weight=1.0)
        model = method.wrap(planted.student(0), Context()).train()
        assert isinstance(model, Anchored)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(60):
            optimizer.zero_grad()
            outputs = model(given.x)
            method.loss(model, outputs, noisy, F.cross_entropy(outputs, noisy)).backward()
            optimizer.step()
        before, after = (F.log_softmax(m(given.x), -1) for m in (model.reference, model.model))
        drift[mode] = float((before.exp() * (before - after)).sum(-1).mean())
    assert drift["asft"] < 0.5 * drift["dft"]


# GeRe.


def test_the_margin_is_nothing_within_the_class_and_grows_outside():
    base = torch.tensor([[-2.0, 0.0, 2.0]])
    low, high = torch.full((3,), -1.0), torch.full((3,), 1.0)
    assert float(margin_loss(base, base, low, high)) == 0.0
    assert float(margin_loss(torch.tensor([[-1.5, 0.9, 9.0]]), base, low, high)) == 0.0
    # Violations of 1, 0.5 and 3, over three coordinates.
    moved = torch.tensor([[0.0, -1.5, -2.0]], requires_grad=True)
    loss = margin_loss(moved, base, low, high)
    loss.backward()
    assert float(loss) == pytest.approx(4.5 / 3)
    torch.testing.assert_close(moved.grad, torch.tensor([[1.0, -1.0, -1.0]]) / 3)


def test_padding_has_no_part_in_the_margin():
    base, states = draw(11, 2, 4, 3), draw(12, 2, 4, 3)
    low, high = torch.full((3,), -0.5), torch.full((3,), 0.5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    other = torch.where(mask.bool().unsqueeze(-1), states, 50 * states)
    expected = margin_loss(states, base, low, high, mask)
    torch.testing.assert_close(margin_loss(other, base, low, high, mask), expected)


def test_without_replay_gere_is_the_plain_loss():
    method = GeRe(replay_per_batch=0)
    ctx = planted.supplied(0, Context())
    model = method.wrap(planted.student(0), ctx)
    assert float(method.loss(model, torch.zeros(1), torch.zeros(1), torch.tensor(3.25))) == 3.25


def test_every_general_sample_comes_once_before_any_comes_again():
    model = GeRe().wrap(planted.student(0), planted.supplied(0, Context()))
    assert isinstance(model, Replaying)
    epoch = torch.cat([model.pick(8) for _ in range(8)])
    assert sorted(epoch.tolist()) == list(range(64))


def test_at_the_start_the_margin_adds_nothing():
    method = GeRe(w_strategy="100", replay_per_batch=64)
    model = method.wrap(planted.student(0), planted.supplied(0, Context()))
    loss = method.loss(model, torch.zeros(1), torch.zeros(1), torch.tensor(1.0))
    ce = F.cross_entropy(model(model.inputs), model.targets)
    torch.testing.assert_close(loss, (ce + 1) / 2)


def test_replay_keeps_what_the_model_knew():
    """A model that learns other labels forgets the general samples' less with replay than without."""
    forgotten = {}
    for count in (0, 16):
        torch.manual_seed(0)
        given = planted.lessons(0)
        student = planted.student(0)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(student(given.x), given.y).backward()
            optimizer.step()
        method = GeRe(replay_per_batch=count, w_strategy="1")
        model = method.wrap(student, planted.supplied(0, Context())).train()
        before = float(F.cross_entropy(model(model.inputs), model.targets))
        other = (given.x[64:, :3].argmax(1) + 1) % planted.CLASSES
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            outputs = model(given.x[64:])
            method.loss(model, outputs, other, F.cross_entropy(outputs, other)).backward()
            optimizer.step()
        forgotten[count] = float(F.cross_entropy(model(model.inputs), model.targets)) - before
    assert forgotten[16] < 0.7 * forgotten[0]


# aTLAS.


def composition(granularity: str = "block") -> Composition:
    ctx = planted.supplied(0, Context())
    model = ATLAS(granularity=granularity).wrap(planted.student(0), ctx)
    assert isinstance(model, Composition)
    return model


def test_no_coefficient_is_the_start_and_one_is_the_fine_tuned_model():
    x, student = planted.lessons(0).x, planted.student(0)
    model = composition()
    assert torch.equal(model(x), student(x))
    with torch.no_grad():
        model.coefficients[1] = 1.0
        tuned = planted.student(0)
        for name, p in tuned.named_parameters():
            p.add_(model.vectors[1][name])
    torch.testing.assert_close(model(x), tuned(x))


def test_scalar_coefficients_are_equal_rows_of_block_coefficients():
    x = planted.lessons(0).x
    block, scalar = composition(), composition("scalar")
    with torch.no_grad():
        scalar.coefficients.copy_(torch.tensor([0.3, -0.2]))
        block.coefficients.copy_(scalar.coefficients.unsqueeze(1).expand_as(block.coefficients))
    torch.testing.assert_close(block(x), scalar(x))


def test_the_gradient_of_a_coefficient_is_that_of_its_tensor_along_the_vector():
    given, student, model = planted.lessons(0), planted.student(0), composition()
    F.cross_entropy(student(given.x), given.y).backward()
    F.cross_entropy(model(given.x), given.y).backward()
    expected = [
        [(p.grad * vector[name]).sum() for name, p in student.named_parameters()] for vector in model.vectors
    ]
    torch.testing.assert_close(model.coefficients.grad, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["coefficients"]


# NoProp.


def test_the_chain_with_right_answers_keeps_the_distribution_of_each_level():
    bars = noprop.cosine_schedule(10, 0.008, 1e-4, 0.9999)
    a, b, c = noprop.coefficients(bars)
    for t in range(1, 11):
        mean = a[t - 1] + b[t - 1] * bars[t - 1].sqrt()
        variance = b[t - 1].square() * (1 - bars[t - 1]) + c[t - 1]
        torch.testing.assert_close(mean, bars[t].sqrt())
        torch.testing.assert_close(variance, 1 - bars[t])


def test_levels_rise_and_each_step_gains_signal():
    ratios = noprop.snr(noprop.cosine_schedule(10, 0.008, 1e-4, 0.9999))
    assert bool((ratios.diff() > 0).all())


def test_a_block_learns_alone():
    method = NoProp(T=3, embedding="learned", dimensions=4)
    model = method.wrap(planted.student(0), Context()).train()
    assert isinstance(model, Blocks)
    given = planted.lessons(0)
    for turn in (1, 2, 3, 1):
        model.zero_grad()
        outputs = model(given.x[:32])
        loss = method.loss(model, outputs, given.y[:32], F.cross_entropy(outputs, given.y[:32]))
        loss.backward()
        moved = {name.rsplit(".")[1] if name.startswith("blocks") else name.split(".")[0] for name, p in
                 model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}  # fmt: skip
        assert moved == {str(turn - 1), "head", "embedding"}
        method.after_step(model, 0)


def test_sixty_steps_of_each_block_bring_noprop_well_above_chance():
    method = NoProp(T=5)
    model = method.wrap(planted.student(0), Context()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    given = planted.lessons(0)
    for step in range(300):
        optimizer.zero_grad()
        rows = torch.arange(64 * step, 64 * step + 64) % len(given.x)
        outputs = model(given.x[rows])
        method.loss(model, outputs, given.y[rows], F.cross_entropy(outputs, given.y[rows])).backward()
        optimizer.step()
        method.after_step(model, step)
    model.eval()
    with torch.no_grad():
        accuracy = (model(given.test_x).argmax(1) == given.test_y).double().mean()
        assert torch.equal(model(given.test_x), model(given.test_x))
    assert float(accuracy) > 1 / planted.CLASSES + 0.2


@pytest.mark.parametrize(
    ("method", "message"),
    [(GeRe(), "no general samples"), (ATLAS(), "no task vectors")],
)
def test_what_a_task_does_not_supply_is_named(method, message):
    with pytest.raises(NotApplicableError, match=message):
        method.wrap(planted.student(0), dataclasses.replace(Context(), supplies={}))
