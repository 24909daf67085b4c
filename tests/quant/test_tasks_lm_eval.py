"""The lm-eval back end against lm-eval's own, and tasks on local data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from methodbench.context import Context
from methodbench.errors import NotApplicableError, SourceError, UnknownNameError
from methodbench.sources import fetch, is_cached
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_quant.models.causal_lm import GGUFCausalLM
from methodbench_quant.models.entries import MODELS
from methodbench_quant.tasks.batched_lm import BatchedLM
from methodbench_quant.tasks.lm_eval_task import LMEvalTask
from methodbench_quant.tasks.local_data import local_data
from methodbench_quant.tasks.prefix_tree import batches, build_trees

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)

CONTEXTS = ("Question: how to open a jar\nAnswer:", "Question: tea\nAnswer:", "The sun ", "", "x" * 200)
ANSWERS = (" twist the lid", " twist the lid the other way", " boil", " boil the water first and then wait")
EXAMPLES = "Q: one and one? A: two. Q: two and two? A: four. "


def byte_tokenizer() -> Any:
    """Return a tokenizer with one id per byte, made here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


CONFIGS: dict[str, Any] = {
    "llama": lambda sizes: hf.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True),
    "opt": lambda sizes: hf.OPTConfig(
        **{key: value for key, value in sizes.items() if key != "intermediate_size"},
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    "gpt-neox": lambda sizes: hf.GPTNeoXConfig(**sizes),
    "gemma2": lambda sizes: hf.Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, sliding_window=16
    ),
}


def language_model(name: str) -> LoadedModel:
    tokenizer = byte_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    module = hf.AutoModelForCausalLM.from_config(CONFIGS[name](sizes)).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return LoadedModel(name, "causal-lm", module, detect(module), tokenizer)


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return language_model(request.param)


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return language_model("llama")


def peer(model: LoadedModel, batch: int = 3) -> HFLM:
    return HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=batch)


def pairs(contexts: Sequence[str] = CONTEXTS, before: str = "") -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (before + context, answer), index)
        for context in contexts
        for index, answer in enumerate(ANSWERS)
    ]


def assert_same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], atol=1e-3, rtol=0)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_log_likelihoods_equal_lm_evals_own(model: LoadedModel) -> None:
    lm = BatchedLM(model)
    assert_same(lm.loglikelihood(pairs()), peer(model).loglikelihood(pairs(), disable_tqdm=True))
    assert lm.requests == len(pairs())


def test_greedy_continuations_are_recognized(llama: LoadedModel) -> None:
    ids = llama.tokenizer.encode("Hello")
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(llama.module(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % len(llama.tokenizer)]
    asked = [(None, ids[:5], ids[5:]), (None, ids[:5], other[5:])]
    assert [greedy for _, greedy in BatchedLM(llama)._loglikelihood_tokens(asked)] == [True, False]


def test_examples_that_all_requests_share_change_nothing(llama: LoadedModel) -> None:
    asked = pairs(CONTEXTS[:2], before=EXAMPLES[:40])
    assert_same(BatchedLM(llama).loglikelihood(asked), peer(llama).loglikelihood(asked, disable_tqdm=True))


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_packing_and_batch_size_change_nothing(llama: LoadedModel, trees: bool, tokens: int) -> None:
    reference = BatchedLM(llama, trees=False).loglikelihood(pairs())
    assert_same(BatchedLM(llama, trees=trees, batch_tokens=tokens).loglikelihood(pairs()), reference)


def test_the_head_sees_only_positions_that_are_asked_for(llama: LoadedModel) -> None:
    rows: list[int] = []
    lm = BatchedLM(llama)
    lm.loglikelihood(pairs(CONTEXTS[:1])[:1])
    head = llama.adapter.head(llama.module)
    assert head is not None
    hook = head.register_forward_hook(lambda _, __, output: rows.append(output[..., 0].numel()))
    try:
        lm.loglikelihood(pairs(CONTEXTS[:1])[:1])
    finally:
        hook.remove()
    assert sum(rows) == len(llama.tokenizer.encode(ANSWERS[0]))


def test_a_model_that_ignores_masks_is_run_without_trees(llama: LoadedModel) -> None:
    class Deaf(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config, self.lm_head = inner, inner.config, inner.lm_head

        def forward(self, ids: torch.Tensor, **_: Any) -> Any:
            return self.inner(ids)

    deaf = LoadedModel("deaf", "causal-lm", Deaf(llama.module), detect(llama.module), llama.tokenizer)
    lm = BatchedLM(deaf)
    assert_same(lm.loglikelihood(pairs()), peer(llama).loglikelihood(pairs(), disable_tqdm=True))
    assert not lm._honours_trees()
    assert BatchedLM(llama)._honours_trees()


def test_rolling_log_likelihoods_equal_lm_evals_own(model: LoadedModel) -> None:
    asked = [
        Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("short", EXAMPLES * 6, "mid " * 20)
    ]
    ours = BatchedLM(model).loglikelihood_rolling(asked)
    np.testing.assert_allclose(ours, peer(model).loglikelihood_rolling(asked, disable_tqdm=True), atol=2e-3)


@pytest.mark.parametrize("before", ["", EXAMPLES[:30]])
def test_greedy_generations_equal_lm_evals_own(model: LoadedModel, before: str) -> None:
    prompts = ("once", "a longer beginning of a text", "Q: three? A:", "once upon")
    settings_ = {"until": ["e", "\n\n"], "do_sample": False, "max_gen_toks": 12}
    asked = [Instance("generate_until", {}, (before + prompt, settings_), 0) for prompt in prompts]
    # One prompt at a time: lm-eval's batches pad, and padding alone may turn near ties around.
    expected = [peer(model, 1).generate_until([request], disable_tqdm=True)[0] for request in asked]
    assert BatchedLM(model).generate_until(asked) == expected


def test_sampled_generations_follow_the_seed(llama: LoadedModel) -> None:
    settings_ = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    asked = [Instance("generate_until", {}, ("once", settings_), 0)]
    first, again, other = (BatchedLM(llama, seed=seed).generate_until(asked) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_continuation_longer_than_the_model_is_refused(llama: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="exceeds the 96 positions"):
        BatchedLM(llama).loglikelihood([Instance("loglikelihood", {}, ("a", "b" * 120), 0)])


@settings(max_examples=60, deadline=None)
@given(sequences=SEQUENCES, worth=st.integers(1, 4), fill=st.integers(0, 12), limit=st.integers(1, 20))
def test_trees_hold_every_sequence_and_keep_to_the_limit(
    sequences: list[list[int]], worth: int, fill: int, limit: int
) -> None:
    trees = build_trees(sequences, limit=limit, worth=worth, fill=fill)
    paths = {number: (tree, path) for tree in trees for number, path in tree.paths.items()}
    assert sorted(paths) == list(range(len(sequences)))
    for number, (tree, path) in paths.items():
        assert [tree.tokens[node] for node in path] == sequences[number]
        assert [tree.depths[node] for node in path] == list(range(len(path)))
        assert np.flatnonzero(tree.visible()[path[-1]]).tolist() == sorted(path)
    for tree in trees:
        assert len(tree) <= max(limit, fill) or len(tree.paths) == 1


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(1, 200))
def test_batches_hold_each_once_within_the_budget(lengths: list[int], budget: int) -> None:
    made = batches(lengths, budget)
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


@pytest.fixture
def piqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data" / "piqa"
    folder.mkdir(parents=True)
    rows = [{"goal": f"goal {i}", "sol1": f"do {i}", "sol2": f"do not {i}"} for i in range(6)]
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "valid-labels.lst").write_text("0\n1\n0\n1\n0\n1\n")
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_piqa_from_local_files_scores_each_sample(llama: LoadedModel, piqa: Path) -> None:
    ctx = Context(cache=piqa / "cache")
    result = LMEvalTask(task="piqa", limit=5, first_as="score").evaluate(llama, ctx)
    assert set(result.scores) == {"acc", "acc_norm", "score"}
    asked = [
        Instance("loglikelihood", {}, (f"Question: goal {i}\nAnswer:", f" {answer} {i}"), 0)
        for i in range(5)
        for answer in ("do", "do not")
    ]
    values = np.array([value for value, _ in peer(llama).loglikelihood(asked, disable_tqdm=True)]).reshape(
        5, 2
    )
    expected = (values.argmax(1) == np.array([0, 1, 0, 1, 0])).astype(float)
    np.testing.assert_array_equal(result.scores["acc"].values, expected)
    np.testing.assert_array_equal(result.scores["score"].values, expected)
    assert result.facts["data"] == "local files"
    assert result.facts["documents"] == {"piqa": 5}
    assert result.throughput is not None
    assert result.throughput[1] == "requests/s"


def test_damaged_local_files_are_named(piqa: Path) -> None:
    (piqa / "data" / "piqa" / "valid-labels.lst").write_text("0\n")
    with pytest.raises(SourceError, match="local data of piqa"):
        local_data("piqa", piqa / "cache")


def test_local_data_is_absent_for_other_tasks(piqa: Path) -> None:
    assert local_data("piqa_ar", piqa) is None
    assert local_data("blimp_wh_island", piqa) is None
    assert local_data("arc_easy", piqa) is None


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
def test_an_unknown_task_gets_the_nearest_names(llama: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="piqa"):
        LMEvalTask(task="piqaa").evaluate(llama, Context(cache=tmp_path))


@pytest.mark.slow
def test_smollm2_on_piqa_gives_the_known_accuracies(smollm2: LoadedModel, tmp_path: Path) -> None:
    root = os.environ.get("METHODBENCH_DATA", "")
    if not root or not (Path(root) / "piqa" / "valid.jsonl").is_file():
        pytest.skip("needs piqa below METHODBENCH_DATA")
    scores = LMEvalTask(task="piqa", limit=200).evaluate(smollm2, Context(cache=tmp_path)).scores
    assert scores["acc"].values.mean() == pytest.approx(0.640, abs=1e-9)
    assert scores["acc_norm"].values.mean() == pytest.approx(0.655, abs=1e-9)
