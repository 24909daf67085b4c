"""Tasks of the training methods: one loop for all of them, bases that are trained once, and what each task supplies."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, SourceError
from methodbench.torchkit.closures import TrainingClosure, training_step
from methodbench_optim.baselines import SGDM, AdamW
from methodbench_optim.training.asft import ASFT
from methodbench_optim.training.atlas import ATLAS
from methodbench_optim.training.gere import GeRe
from methodbench_optim.training.noprop import NoProp
from methodbench_optim.training.plain import PlainTraining
from methodbench_optim.training.tract import TrAct
from methodbench_optim.workloads import finetuning, language_model, pictures
from methodbench_optim.workloads.adaptation import Adaptation
from methodbench_optim.workloads.finetuning import FineTuneText
from methodbench_optim.workloads.language_model import FineTuneLanguageModel
from methodbench_optim.workloads.pictures import TrainPictures
from methodbench_optim.workloads.sparsity import densities

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

SHORT = {"steps": 20, "evaluate_every": 10}
ADAPTED = Adaptation(base_steps=150, expert_steps=60, steps=60, evaluate_every=20)
TUNED = FineTuneText(
    width=16, depth=1, context=16, base_steps=30, steps=12, batch_size=4, held_out=8, evaluate_every=6
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Told(PlainTraining):
    """Writes down which hook was called when, and what it saw."""

    def __init__(self, told):
        self.told = told

    def loss(self, model, outputs, targets, task_loss):
        self.told.append("loss")
        return task_loss

    def after_backward(self, model, step):
        self.told.append(("after_backward", step, model.weight.grad is not None))

    def after_step(self, model, step):
        self.told.append(("after_step", step))


def test_hooks_come_in_order_between_backward_and_the_step():
    told = []
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    closure = TrainingClosure(
        Told(told), model, 3, nn.functional.mse_loss, torch.ones(1, 2), torch.zeros(1, 2)
    )
    loss = training_step(optimizer, closure)
    assert told == ["loss", ("after_backward", 3, True), ("after_step", 3)]
    assert loss.item() > 0
    assert not torch.equal(before, model.weight)


def test_parameters_that_a_loss_does_not_reach_are_not_moved_by_decay():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.forward = model[0].forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    idle = model[1].weight.detach().clone()
    for part in (0, 1):
        model.forward = model[part].forward
        closure = TrainingClosure(
            PlainTraining(), model, part, nn.functional.mse_loss, torch.ones(1, 2), torch.zeros(1, 2)
        )
        moved = model[0].weight.detach().clone()
        training_step(optimizer, closure)
        if part == 0:
            assert torch.equal(model[1].weight, idle)
        else:
            assert torch.equal(model[0].weight, moved)
            assert not torch.equal(model[1].weight, idle)


# --- pictures


def test_plain_training_is_the_optimizer_alone():
    task = TrainPictures(architecture="mlp", lr=2e-3, weight_decay=0.1, **SHORT)
    hooked = task.evaluate(PlainTraining(), None, Context())
    alone = task.evaluate(AdamW(lr=2e-3, weight_decay=0.1), None, Context())
    assert np.array_equal(hooked.scores["test-nll"].values, alone.scores["test-nll"].values)
    assert np.array_equal(hooked.series["validation-loss"], alone.series["validation-loss"])


def test_a_task_by_momentum_is_not_one_by_adamw():
    losses = [
        TrainPictures(architecture="cnn", optimizer=rule, lr=0.01, **SHORT)
        .evaluate(PlainTraining(), None, Context())
        .series["validation-loss"][-1]
        for rule in ("adamw", "sgdm")
    ]
    assert losses[0] != losses[1]
    by_hand = TrainPictures(architecture="cnn", **SHORT).evaluate(
        SGDM(lr=0.01, weight_decay=1e-3), None, Context()
    )
    assert by_hand.series["validation-loss"][-1] == losses[1]


def test_looks_at_held_out_pictures_do_not_change_the_training():
    # Methods that draw noise draw it for training and for looks apart.
    for method in (PlainTraining(), NoProp(T=2, width=8)):
        often, rarely = (
            TrainPictures(architecture="mlp", steps=20, evaluate_every=every).evaluate(
                method, None, Context()
            )
            for every in (2, 20)
        )
        assert np.array_equal(often.scores["test-nll"].values, rarely.scores["test-nll"].values)


def test_contrasts_are_spread_evenly_and_alike_for_every_method():
    data = pictures.load_digits(0, Context())
    shapes = data.train.images.clone()
    pictures.spread_contrast(data, 1.5)
    assert not torch.equal(shapes, data.train.images)
    spread = data.train.images.flatten(1).std(1)
    assert float(spread.max() / spread.min()) > 10
    again = pictures.load_digits(0, Context())
    pictures.spread_contrast(again, 1.5)
    assert torch.equal(again.test.images, data.test.images)


def test_general_samples_are_for_tasks_that_start_from_a_trained_network():
    with pytest.raises(NotApplicableError, match="no general samples"):
        TrainPictures(architecture="mlp", **SHORT).evaluate(GeRe(), None, Context())


def test_a_training_that_diverges_says_so():
    with pytest.raises(DivergedError, match="not finite"):
        TrainPictures(architecture="mlp", optimizer="sgdm", lr=1e30, **SHORT).evaluate(
            PlainTraining(), None, Context()
        )


def test_networks_are_for_their_pictures():
    for data, architecture, of in (("digits", "resnet20", "CIFAR-10"), ("cifar10", "mlp", "digits")):
        with pytest.raises(ValueError, match=of):
            TrainPictures(data=data, architecture=architecture).network(Context())


def test_absent_pictures_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    pictures.read_cifar10.cache_clear()
    with pytest.raises(SourceError, match=r"cifar10/train\.parquet"):
        TrainPictures(data="cifar10", architecture="resnet20").evaluate(PlainTraining(), None, Context())


def test_moved_pictures_hold_no_other_pixels():
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 1
    moved = pictures.shifted(images, torch.Generator().manual_seed(1))
    assert moved.shape == images.shape
    for before, after in zip(images, moved, strict=True):
        kept = set(after[after > 0].tolist())
        assert kept <= set(before.flatten().tolist())
        assert len(kept) > 0.6 * before.numel()


def test_densities_count_zeros_alone():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
        model[2].weight.fill_(1.0)
    found = densities(model, torch.ones(3, 2))
    assert found == {"weight_density": 4 / 12, "activation_density": 0.75, "dead_units": 0.25}
    assert "activation_density" not in densities(nn.Linear(2, 2), torch.ones(1, 2))


# --- adaptation


def test_a_trained_base_is_kept_and_gives_the_same_result(tmp_path):
    first = ADAPTED.evaluate(ATLAS(), None, Context(cache=tmp_path))
    kept = sorted((tmp_path / "bases").iterdir())
    assert len(kept) == 3
    assert all(path.suffix == ".safetensors" for path in kept)
    stamps = [path.stat().st_mtime_ns for path in kept]
    second = ADAPTED.evaluate(ATLAS(), None, Context(cache=tmp_path))
    fresh = ADAPTED.evaluate(ATLAS(), None, Context())
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    for other in (second, fresh):
        assert np.array_equal(first.scores["test-nll"].values, other.scores["test-nll"].values)


def test_composition_starts_from_the_base_and_trains_one_number_per_vector_and_tensor():
    evaluation = ADAPTED.evaluate(ATLAS(), None, Context())
    assert evaluation.facts["trained_parameters"] == 2 * 6
    # Six tensors, of two experts; without a step the composition would be the base.
    assert evaluation.series["validation-loss"][0] > evaluation.series["validation-loss"][-1]


def test_an_expert_is_better_than_the_base_where_it_was_trained():
    task = dataclasses.replace(ADAPTED, domains=("turned",), experts=("turned",), steps=40, lr=0.1)
    evaluation = task.evaluate(ATLAS(granularity="scalar"), None, Context())
    assert evaluation.scores["test-accuracy"].values.mean() > evaluation.facts["accuracy_before"] + 0.1


def test_replay_keeps_more_of_what_was_known():
    plain, replayed = (
        ADAPTED.evaluate(method, None, Context()).scores["general-accuracy"].values.mean()
        for method in (PlainTraining(), GeRe(w_strategy="1"))
    )
    assert replayed > plain


# --- fine-tuning on text


def test_what_is_forgotten_is_the_rise_of_the_general_loss():
    evaluation = TUNED.evaluate(PlainTraining(), None, Context())
    scores, facts = evaluation.scores, evaluation.facts
    rise = scores["general-nll"].values.mean() - facts["general_nll_before"]
    assert scores["forgetting"].values.mean() == pytest.approx(rise)
    assert scores["test-nll"].values.mean() < facts["test_nll_before"]
    assert facts["kl_to_base"] > 0


def test_an_anchor_holds_the_predictions_near_the_base():
    kls = [
        TUNED.evaluate(ASFT(mode="sft+kl", kl_weight=w), None, Context()).facts["kl_to_base"]
        for w in (0.0, 5.0)
    ]
    assert kls[1] < kls[0]


def test_noise_is_in_the_labels_alone_and_costs_accuracy():
    clean, noisy = (
        dataclasses.replace(TUNED, noise=noise, steps=40).evaluate(PlainTraining(), None, Context())
        for noise in (0.0, 0.9)
    )
    assert noisy.facts["test_nll_before"] == clean.facts["test_nll_before"]
    assert noisy.scores["test-nll"].values.mean() > clean.scores["test-nll"].values.mean()


def test_the_decoder_has_relus_where_they_are_asked_for():
    evaluation = dataclasses.replace(TUNED, relu=True).evaluate(PlainTraining(), None, Context())
    assert 0 < evaluation.facts["activation_density"] < 1
    assert TUNED.evaluate(PlainTraining(), None, Context()).facts["activation_density"] == 1.0


def test_texts_are_read_with_one_alphabet(monkeypatch, tmp_path):
    for name in ("reference", "programs"):
        text = finetuning.read(name)
        assert int(text.train.max()) < len(finetuning.ALPHABET)
        assert len(text.train) == pytest.approx(8 * len(text.test), rel=1e-3)
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    with pytest.raises(SourceError, match="tinyshakespeare"):
        finetuning.content("shakespeare")


# --- language models


def test_parts_of_a_text_share_no_sequence():
    rows = torch.arange(100)[:, None]
    parts = [
        set(language_model.spread(rows, 8, part).flatten().tolist()) for part in ("learn", "validate", "test")
    ]
    assert [len(part) for part in parts] == [84, 8, 8]
    assert set.union(*parts) == set(range(100))


@pytest.fixture
def tiny_model():
    transformers = pytest.importorskip("transformers")
    from methodbench.torchkit.adapters import detect
    from methodbench.torchkit.model import LoadedModel

    class Characters:
        def __call__(self, text, verbose=True):
            return {"input_ids": [ord(character) % 64 for character in text]}

    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    return LoadedModel(
        name="tiny", kind="causal-lm", module=module, adapter=detect(module), tokenizer=Characters()
    )


@pytest.mark.parametrize(
    "method", [AdamW(lr=1e-2), PlainTraining(), GeRe(replay_per_batch=2), ASFT()], ids=repr
)
def test_a_language_model_is_fine_tuned_and_not_changed(tiny_model, method):
    task = FineTuneLanguageModel(
        text="programs", tokens=16, steps=6, held_out=4, evaluate_every=6, characters=20_000, lr=1e-2
    )
    before = [p.detach().clone() for p in tiny_model.module.parameters()]
    evaluation = task.evaluate(method, tiny_model, Context())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.module.parameters(), strict=True))
    assert evaluation.series["validation-loss"][-1] < evaluation.series["validation-loss"][0]
    assert math.isfinite(evaluation.scores["general-nll"].values.mean())


def test_a_model_without_a_tokenizer_is_told_apart(tiny_model):
    with pytest.raises(NotApplicableError, match="no tokenizer"):
        FineTuneLanguageModel().evaluate(
            PlainTraining(), dataclasses.replace(tiny_model, tokenizer=None), Context()
        )


def test_tract_learns_the_digits_in_the_same_loop():
    evaluation = TrainPictures(architecture="mlp", lr=3e-3, steps=150).evaluate(TrAct(), None, Context())
    assert evaluation.scores["test-accuracy"].values.mean() > 0.9
