from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench_optim.baselines import SGD, AdamW
from methodbench_optim.lion import Lion
from methodbench_optim.mezo import MeZO
from methodbench_optim.muon import Muon
from methodbench_optim.sso import SSO
from methodbench_optim.workloads.characters import Characters, read_text
from methodbench_optim.workloads.decoder import Decoder, rotate, token_loss
from methodbench_optim.workloads.logistic import Logistic
from methodbench_optim.workloads.loop import param_groups
from methodbench_optim.workloads.noise import (
    NoiseRegimes,
    Perceptron,
    critical_temperature,
    depleted_sign,
    descend,
    exponent,
    fresh_batches,
)
from methodbench_optim.workloads.proxies import SmallScaleProxies, lr_sensitivity

SMALL = {"width": 16, "depth": 1, "heads": 2, "steps": 12, "batch_size": 4, "context": 16, "held_out": 8}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- memory


def test_lion_keeps_half_the_state_of_adamw_on_every_training_workload():
    for task in (Logistic(steps=3), Characters(**SMALL)):
        held = {
            name: task.evaluate(method, None, Context()).facts["optimizer_state_bytes_per_parameter"]
            for name, method in (("lion", Lion()), ("adamw", AdamW()))
        }
        assert held["lion"] == 4.0
        # Beside two averages in float32, AdamW counts the steps of each tensor.
        assert held["adamw"] == pytest.approx(8.0, abs=0.1)


def test_methods_without_state_keep_nothing():
    for method in (MeZO(), SSO()):
        assert Logistic(steps=2).evaluate(method, None, Context()).facts["optimizer_state_bytes"] == 0


# --- logistic regression


def test_no_method_beats_the_teacher_and_guessing_is_the_start():
    evaluation = Logistic(steps=400).evaluate(AdamW(lr=0.1), None, Context())
    curve = evaluation.series["validation-loss"]
    assert curve[0] == pytest.approx(math.log(10), abs=0.5)
    assert evaluation.facts["teachers_validation_loss"] < curve[-1] < 0.8 * curve[0]
    assert evaluation.scores["validation-loss"].values.item() == curve[-1]


def test_seeds_change_the_start_but_not_the_samples():
    task = Logistic(steps=1)
    one, two = (task.draw(Context(seed=seed)) for seed in (0, 1))
    assert torch.equal(one.test[0], two.test[0])
    first, second = (task.evaluate(SGD(), None, Context(seed=seed)) for seed in (0, 1))
    assert (first.scores["test-nll"].values != second.scores["test-nll"].values).any()


def test_a_diverged_training_says_so():
    with pytest.raises(DivergedError, match="not finite"):
        Logistic(steps=200).evaluate(SGD(lr=1e38), None, Context())


# --- characters


def test_parts_of_a_text_do_not_overlap_and_make_the_whole():
    text = read_text("pydoc")
    parts = text.parts
    assert sum(part.numel() for part in parts.values()) * 0.8 == pytest.approx(parts["train"].numel(), abs=2)
    windows = text.windows("test", Characters(), Context())
    assert windows.shape == (64, 65)
    assert torch.equal(windows[-1], parts["test"][-65:])


def test_a_decoder_does_not_look_ahead():
    module = Decoder(11, width=16, depth=2, heads=2, qk_norm=True, seed=0)
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    a, b = module(tokens), module(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_rotations_keep_lengths_and_make_logits_depend_on_distances():
    q = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(1, 6, 8)
    turned = rotate(q)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    logits = (turned @ turned.mT)[0]
    torch.testing.assert_close(logits[0, 2], logits[3, 5])


def test_normalized_queries_and_keys_bound_attention_logits():
    free, normed = (Decoder(11, width=16, depth=1, heads=2, qk_norm=on, seed=0) for on in (False, True))
    tokens = torch.arange(11)[None]
    for module in (free, normed):
        with torch.no_grad():
            for layer in (module.blocks[0].attention.q, module.blocks[0].attention.k):
                layer.weight.mul_(100)
    # Vectors of 8 normalized entries have length root 8 at most; their product over root 8 is root 8.
    assert normed.largest_attention_logit(tokens) <= math.sqrt(8) * 1.001
    assert free.largest_attention_logit(tokens) > 100


def test_z_loss_is_added_to_the_cross_entropy():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(2, 3, dtype=torch.long)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(token_loss(logits, targets), expected)
    added = token_loss(logits, targets, z=0.5) - expected
    torch.testing.assert_close(added, 0.5 * logits.logsumexp(-1).square().mean())


@pytest.mark.parametrize(
    "method", [AdamW(lr=1e-2), Muon(lr=1e-2), SSO(), MeZO()], ids=lambda m: type(m).__name__
)
def test_optimizers_of_every_shape_train_a_decoder(method):
    evaluation = Characters(**SMALL).evaluate(method, None, Context())
    assert evaluation.scores["test-nll"].values.shape == (8,)
    assert np.isfinite(evaluation.scores["test-nll"].values).all()
    asked = evaluation.facts["gradient_evaluations"] + evaluation.facts["function_evaluations"]
    assert asked >= SMALL["steps"]


def test_the_roles_of_a_decoder_are_told_apart():
    seen = {}

    class Recording:
        def build(self, param_groups, ctx):
            groups = list(param_groups)
            seen.update({group["role"]: len(group["params"]) for group in groups})
            return torch.optim.SGD(groups, lr=0.1)

    Characters(**{**SMALL, "qk_norm": True}).evaluate(Recording(), None, Context())
    assert seen == {"matrix": 6, "vector": 5, "embedding": 1, "head": 1}


def test_widths_that_the_heads_do_not_divide_are_refused():
    with pytest.raises(ParameterError, match="no multiple of twice the 3 heads"):
        build(Characters, {"width": 16, "heads": 3}, "char-transformer")


@pytest.mark.slow
def test_adamw_reaches_the_target_on_characters():
    evaluation = Characters().evaluate(AdamW(lr=1e-2), None, Context())
    assert 0 < evaluation.scores["steps-to-target"].values.item() < 300
    assert evaluation.facts["seconds_to_target"] > 0


# --- small-scale proxies


def test_sensitivity_is_zero_for_equal_losses_and_never_negative():
    assert lr_sensitivity([2.0, 2.0, 2.0], 5.0) == 0
    assert lr_sensitivity([3.0, 2.0, math.nan], 5.0) == pytest.approx((1 + 0 + 3) / 3)
    shifted = lr_sensitivity([4.0, 3.0, math.inf], 6.0)
    assert shifted == pytest.approx((1 + 0 + 3) / 3)
    assert lr_sensitivity([4.0, 3.0, 1e9], 6.0) == shifted
    assert lr_sensitivity([math.nan, math.inf], 6.0) == 0


def test_a_sweep_has_one_point_per_rate_and_diverged_ones_are_named():
    task = SmallScaleProxies(rates=(1e-3, 1e-2, 1e25), steps=6, batch_size=2, width=16, depth=1)
    evaluation = task.evaluate(SGD(), None, Context())
    assert evaluation.series["final-loss"].shape == (3,)
    assert evaluation.facts["diverged_rates"] == [1e25]
    assert math.isnan(evaluation.series["attention-logit"][-1])
    assert evaluation.scores["lr-sensitivity"].values.item() >= 0
    with pytest.raises(NotApplicableError, match="no learning rate"):
        task.evaluate(SSO(), None, Context())


# --- regimes of SGD noise


def test_training_stops_exactly_where_every_point_has_its_margin():
    x, y = depleted_sign(32, 8, 0.0, np.random.default_rng(0))
    module = Perceptron(torch.zeros(8, dtype=torch.float64))
    states = []
    for done in descend(SGD(lr=0.5), module, x, y, 1.0, fresh_batches(32, 4, 0), Context()):
        states.append(done)
        if done or len(states) > 20_000:
            break
    assert states[-1]
    assert not any(states[:-1])
    assert bool((y * module(x) >= 1).all())


def test_at_small_temperatures_the_batch_size_does_not_matter():
    def change(batch_size: int) -> float:
        task = NoiseRegimes(
            temperatures=(0.02 / batch_size,),
            batch_size=batch_size,
            points=16,
            dimension=32,
            max_steps=20_000,
        )
        return float(task.evaluate(SGD(), None, Context()).series["weight-change"][0])

    assert change(4) == pytest.approx(change(16), rel=0.02)


def test_a_hotter_perceptron_moves_further_and_a_training_that_does_not_end_is_masked():
    task = NoiseRegimes(temperatures=(0.1, 10.0, 30.0), points=32, dimension=16, max_steps=8000)
    changes = task.evaluate(SGD(), None, Context()).series["weight-change"]
    assert changes[0] < changes[1] < changes[2]
    short = NoiseRegimes(temperatures=(1e-6, 10.0), points=32, dimension=16, max_steps=3000)
    evaluation = short.evaluate(SGD(), None, Context())
    assert evaluation.scores["converged-share"].values.tolist() == [0, 1]
    assert np.isnan(evaluation.scores["test-error"].values).tolist() == [True, False]


def test_lazy_networks_hardly_move():
    def change(alpha: float) -> float:
        task = NoiseRegimes(
            network="mlp", alpha=alpha, temperatures=(0.02,), points=16, dimension=8, width=16, max_steps=4000
        )
        return float(task.evaluate(SGD(), None, Context()).series["weight-change"][0])

    assert change(100.0) < 0.1 * change(1.0)


def test_exponents_and_the_critical_temperature_are_those_of_the_curve():
    temperatures = [0.1, 1.0, 10.0, 100.0]
    assert exponent(temperatures, [1.0, 1.0, 5.0, 50.0]) == pytest.approx(1.0)
    assert critical_temperature(temperatures, [1.0, 1.5, 5.0, 50.0]) == 10.0
    assert critical_temperature(temperatures, [1.0, 1.5, math.nan, math.nan]) is None


def test_muparam_scales_rates_by_the_inverse_of_the_fan_in_and_leaves_vectors_and_embeddings():
    module = Decoder(11, width=16, depth=1, heads=2, qk_norm=True, seed=0)
    groups = param_groups(module, module.head.weight, [module.embedding.weight], base_fan_in=16)
    scales = {(group["role"], group["params"][0][0].numel()): group.get("rate_scale") for group in groups}
    # The down projection reads four times the width.
    assert scales == {
        ("matrix", 16): 1.0,
        ("matrix", 64): 0.25,
        ("vector", 1): None,
        ("embedding", 16): None,
        ("head", 16): 1.0,
    }
    counted = sum(p.numel() for group in groups for p in group["params"])
    assert counted == sum(p.numel() for p in module.parameters())


def test_muparam_is_seen_in_the_step_and_twice_the_base_is_twice_the_rate():
    class Recorded(SGD):
        def build(self, groups, ctx):
            self.seen.append(super().build(groups, ctx))
            return self.seen[-1]

    rates = []
    for base in (0, 16, 32):
        seen = []
        method = Recorded(lr=0.1)
        object.__setattr__(method, "seen", seen)
        Characters(**SMALL, base_fan_in=base).train(
            method, read_text("pydoc"), Context(), share=lambda _: 1.0
        )
        rates.append(sorted({round(group["lr"], 6) for group in seen[0].param_groups}))
    assert rates == [[0.1], [0.025, 0.1], [0.05, 0.1, 0.2]]
