"""Decode speed: repeats in turn with the dense model, what is scored, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.torchkit.activation_sparsity import TopK, block_linears, mask_inputs, sites
from methodbench.torchkit.model import LoadedModel
from methodbench_quant import decode
from methodbench_quant.decode import decode_rate, paired_rates
from methodbench_quant.tasks.decode_speed import DecodeSpeed


class Letters:
    """A tokenizer of single characters."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(64)}


@pytest.fixture
def lettered(tiny: Callable[[str], LoadedModel]) -> LoadedModel:
    model = tiny("llama")
    model.tokenizer = Letters()
    return model


def greedy(module: nn.Module, prompt: Tensor, tokens: int) -> tuple[int, ...]:
    ids = prompt
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, module(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tuple(ids[0, prompt.shape[1] :].tolist())


def test_both_models_decode_greedily_what_they_do_without_a_cache(lettered: LoadedModel) -> None:
    prompt = torch.tensor([[3, 14, 15, 9, 26, 53, 5]])
    other = lettered.clone()
    other.module.lm_head.weight = nn.Parameter(other.module.lm_head.weight.flip(0), requires_grad=False)
    rates, ids = paired_rates(other.module, lettered.module, prompt, 6, 3)
    assert ids == (greedy(other.module, prompt, 6), greedy(lettered.module, prompt, 6))
    assert [len(found) for found in rates] == [3, 3]
    assert min(min(found) for found in rates) > 0
    assert decode_rate(lettered.module, prompt, 6, 2).ids == ids[1]


def test_what_is_zeroed_is_counted_in_one_pass_without_the_clock(lettered: LoadedModel) -> None:
    sparse = lettered.clone()
    mask_inputs(sparse, {name: TopK(8) for name in block_linears(sparse)}, "all")
    prompt = torch.tensor([[3, 14, 15, 9, 26, 53, 5]])
    paired_rates(sparse.module, lettered.module, prompt, 6, 3)
    assert {site.tokens for site in sites(sparse.module).values()} == {7 + 6}
    assert all(site.counting for site in sites(sparse.module).values())


def test_the_speedup_is_the_ratio_of_a_repeat_and_repeats_alternate(
    monkeypatch: pytest.MonkeyPatch, lettered: LoadedModel
) -> None:
    clock, order = {"now": 0.0}, []
    slow = lettered.clone()
    costs = {id(slow.module): 0.25, id(lettered.module): 0.5}
    step = decode.Decoder.step

    def timed(self: decode.Decoder) -> None:
        clock["now"] += costs[id(self.module)]
        order.append(id(self.module))
        step(self)

    monkeypatch.setattr(decode.Decoder, "step", timed)
    monkeypatch.setattr(decode.time, "perf_counter", lambda: clock["now"])
    task = DecodeSpeed(prompt=5, tokens=1, repeats=3)
    found = task.evaluate(slow, Context(dense=lettered))
    np.testing.assert_allclose(found.scores["speedup"].values, 2.0)
    np.testing.assert_allclose(found.scores["tokens_per_second"].values, 4.0)
    np.testing.assert_allclose(found.scores["dense_tokens_per_second"].values, 2.0)
    assert found.throughput == (4.0, "tokens/s")
    assert found.facts["tokens_before_first_difference"] == 1
    a, b = costs
    assert order == [a, b, a, b, b, a, a, b]


def test_what_cannot_be_timed_is_refused(lettered: LoadedModel) -> None:
    with pytest.raises(NotApplicableError, match="its dense model, which is not at hand"):
        DecodeSpeed(prompt=4, tokens=2).evaluate(lettered, Context())
    lettered.module.config.max_position_embeddings = 16
    with pytest.raises(NotApplicableError, match="12 \\+ 5 tokens exceed the 16 positions"):
        DecodeSpeed(prompt=12, tokens=5).evaluate(lettered, Context(dense=lettered))
