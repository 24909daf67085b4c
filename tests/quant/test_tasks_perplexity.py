"""Perplexity: windows, losses, texts and calibration."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError, SourceError
from methodbench.params import build
from methodbench.sources import fetch, is_cached
from methodbench.torchkit.model import LoadedModel
from methodbench_quant.models.causal_lm import GGUFCausalLM
from methodbench_quant.models.entries import MODELS
from methodbench_quant.tasks import texts
from methodbench_quant.tasks.entries import TASKS, task_named
from methodbench_quant.tasks.perplexity import Perplexity, token_losses, window_losses
from methodbench_quant.tasks.texts import Text, evaluation_text, pydoc_topics, stdlib_docstrings, wikitext2
from methodbench_quant.tasks.tokens import consecutive, draw_calibration, token_ids


class Letters:
    """A tokenizer of single characters."""

    bos_token_id = 1
    eos_token_id = 2
    calls = 0

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        type(self).calls += 1
        return {"input_ids": [ord(letter) % 64 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(64)}


@pytest.fixture
def lettered(tiny: Callable[[str], LoadedModel]) -> LoadedModel:
    model = tiny("llama")
    model.tokenizer = Letters()
    return model


def test_window_losses_equal_a_loop_over_shifted_logits(lettered: LoadedModel) -> None:
    windows = torch.randint(64, (5, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = lettered.module(windows).logits
    expected = [
        nn.functional.cross_entropy(rows[:-1], ids[1:]) for rows, ids in zip(logits, windows, strict=True)
    ]
    torch.testing.assert_close(window_losses(lettered.module, windows).float(), torch.stack(expected))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 300), vocabulary=st.integers(2, 9), seed=st.integers(0, 99))
def test_token_losses_are_minus_log_softmax(rows: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    expected = -logits.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_losses(logits, targets).double(), expected, rtol=1e-5, atol=1e-5)


def test_score_is_the_exponential_of_the_mean_over_windows(lettered: LoadedModel) -> None:
    task = Perplexity(text="pydoc", windows=6, length=32)
    result = task.evaluate(lettered, Context())
    ids = token_ids(pydoc_topics(), lettered.tokenizer, Context())
    losses = result.scores["perplexity"].values
    assert losses.shape == (6,)
    np.testing.assert_allclose(losses, window_losses(lettered.module, ids[: 6 * 32].view(6, 32)).numpy())
    assert result.facts["tokens_scored"] == 6 * 31
    assert result.facts["text_sha256"] == pydoc_topics().sha256
    assert result.throughput is not None
    assert result.throughput[0] > 0


def test_losses_that_are_not_finite_score_infinity_and_warn(lettered: LoadedModel) -> None:
    broken = lettered.clone()
    broken.module.get_submodule("model.norm").weight = nn.Parameter(torch.full((32,), math.nan))
    ctx = Context()
    values = Perplexity(windows=2, length=16).evaluate(broken, ctx).scores["perplexity"].values
    assert np.isposinf(values).all()
    assert "2 of 2 windows" in ctx.warnings[0]


def test_windows_longer_than_the_models_positions_are_refused(lettered: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="128 tokens exceed the 64 positions"):
        Perplexity(windows=1, length=128).evaluate(lettered, Context())


def test_a_model_without_a_tokenizer_is_not_applicable(lettered: LoadedModel) -> None:
    speechless = lettered.clone()
    speechless.tokenizer = None
    task = Perplexity(windows=1, length=16)
    for attempt in (task.evaluate, task.calibration):
        with pytest.raises(NotApplicableError, match="no tokenizer"):
            attempt(speechless, Context())


def test_more_windows_than_the_text_has_are_refused(
    lettered: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(texts._EVALUATION, "pydoc", lambda: Text("a" * 100, "test", "none"))
    with pytest.raises(ParameterError, match="3 windows of 32 tokens, 4 were asked for"):
        Perplexity(windows=4, length=32).evaluate(lettered, Context())
    assert Perplexity(windows=0, length=32).evaluate(lettered, Context()).facts["windows"] == 3


def test_parameters_out_of_range_name_the_field() -> None:
    with pytest.raises(ParameterError, match="length = 1"):
        build(Perplexity, {"length": 1}, "pydoc-ppl")
    with pytest.raises(ParameterError, match="text = 'novel'"):
        build(Perplexity, {"text": "novel"}, "pydoc-ppl")


def test_calibration_follows_the_seed_and_never_repeats_a_sequence() -> None:
    text = Text("".join(chr(48 + i % 60) for i in range(2000)), "test", "none")
    draw = [draw_calibration(text, Letters(), 20, 50, Context(seed=seed)).inputs for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    sequences = {tuple(row) for row in consecutive(token_ids(text, Letters(), Context()), 50).tolist()}
    drawn = [tuple(row) for row in draw[0].tolist()]
    assert set(drawn) <= sequences
    with pytest.raises(ParameterError, match="40 sequences of 50 tokens, 41 were asked for"):
        draw_calibration(text, Letters(), 41, 50, Context())


def test_calibration_shares_no_line_with_the_evaluation_text() -> None:
    evaluation = {line.strip() for line in pydoc_topics().content.splitlines() if line.strip()}
    calibration = {line.strip() for line in stdlib_docstrings().content.splitlines() if line.strip()}
    assert len(calibration) > 5000
    assert not evaluation & calibration


def test_token_ids_are_kept_and_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    text, tokenizer, ctx = Text("hello world", "test", "none"), Letters(), Context(cache=tmp_path)
    first = token_ids(text, tokenizer, ctx)
    calls = Letters.calls
    assert torch.equal(token_ids(text, tokenizer, ctx), first)
    assert Letters.calls == calls
    (kept,) = (tmp_path / "tokens").iterdir()
    kept.write_bytes(b"damaged")
    assert torch.equal(token_ids(text, tokenizer, ctx), first)
    assert Letters.calls == calls + 1


def test_another_release_of_wikitext2_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("raw text")
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    with pytest.raises(SourceError, match="not the test set of WikiText-2"):
        wikitext2("test")


def test_missing_wikitext2_says_what_to_set_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("METHODBENCH_OFFLINE", "1")
    with pytest.raises(SourceError, match="METHODBENCH_DATA"):
        evaluation_text("wikitext2")


def test_hub_rows_give_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data("wikitext2/valid.txt")
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [line if line.strip() else "" for line in lines]
    import datasets

    def load(*_: Any, **__: Any) -> dict[str, list[str]]:
        return {"text": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    monkeypatch.delenv("METHODBENCH_OFFLINE", raising=False)
    assert wikitext2("validation").content == data.read_text(encoding="utf-8")


def test_entries_describe_tasks_and_lm_eval_names() -> None:
    assert {task.name for task in TASKS} == {"decode-speed", "pydoc-ppl", "pydoc-probe", "wikitext2-ppl"}
    assert all(build(resolve_name(task.impl), task.options, task.name) for task in TASKS)
    piqa = task_named("lm-eval:piqa")
    assert piqa is not None
    assert piqa.primary.name == "acc"
    other = task_named("lm-eval:arc_easy")
    assert other is not None
    assert other.options["first_as"] == other.primary.name == "score"
    assert task_named("lm-eval:") is None
    assert task_named("pydoc-ppl") is None


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """SmolLM2-135M, where its weights are in the cache of sources."""
    entry = next(model for model in MODELS if model.name == "smollm2-135m")
    if not is_cached(entry.source, entry.sha256):
        pytest.skip(f"{entry.source} is not in the cache: run `methodbench sources fetch {entry.name}`")
    folder = tmp_path_factory.mktemp("smollm2")
    GGUFCausalLM().prepare(fetch(entry.source, sha256=entry.sha256).path, folder, Context())
    return GGUFCausalLM().load(folder, Context())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [(16, -1, 25.49), (4, -1, 36.67), (4, 64, 31.71), (3, 64, 68.73)],
)
def test_smollm2_on_wikitext2_gives_the_known_perplexities(
    smollm2: LoadedModel, bits: Any, group_size: int, expected: float
) -> None:
    from methodbench.torchkit.model import Calibration
    from methodbench_quant.llm.rtn import RTN

    _data("wikitext2/test.txt")
    model = smollm2
    if bits < 16:
        rtn = RTN(bits=bits, group_size=group_size, convention="gptq")
        model = rtn.compress(model, Calibration.none(), Context())
    losses = Perplexity(text="wikitext2", windows=4).evaluate(model, Context()).scores["perplexity"].values
    assert math.exp(losses.mean()) == pytest.approx(expected, rel=0.01)


def _data(relative: str) -> Path:
    root = os.environ.get("METHODBENCH_DATA", "")
    path = Path(root) / relative
    if not root or not path.is_file():
        pytest.skip(f"needs {relative} below METHODBENCH_DATA")
    return path
