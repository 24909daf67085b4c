"""L2 adaptive computation: what is a void, what becomes of it, and what is counted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import ParameterError
from methodbench.params import build
from methodbench.torchkit.activation_sparsity import forget, measured
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_sparse.void_lac import Mode, Stream, VoidLAC, watch

seeds = st.integers(0, 2**16)


class Scale(nn.Module):
    """A block that multiplies each token by a factor of its own."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factors[: hidden.shape[1], None]


def passed(norms: Tensor, alpha: float, mode: Mode = "final-state") -> tuple[Tensor, Stream]:
    """Send tokens of these norms [blocks + 1, tokens] through blocks, and return the last output and the stream."""
    blocks: list[nn.Module] = [Scale(after / before) for before, after in pairwise(norms)]
    stream = watch(blocks, alpha, mode)
    return nn.Sequential(*blocks)(norms[0][None, :, None] * torch.ones(1, 1, 4) / 2), stream


def logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits


def lac(model: LoadedModel, **hyper: object) -> LoadedModel:
    return VoidLAC(**hyper).compress(model, Calibration.none(), Context())  # type: ignore[arg-type]


def norms_of(seed: int, blocks: int = 6, tokens: int = 5) -> Tensor:
    return 1 + torch.rand(blocks + 1, tokens, generator=torch.Generator().manual_seed(seed)).cumsum(0) * 2


def test_a_void_is_a_growth_below_the_range_of_those_before() -> None:
    norms = torch.tensor([[1.0], [3.0], [4.0], [4.5], [7.0]])  # deltas 2, 1, 0.5, 2.5
    _, stream = passed(norms, 0.5)
    # thresholds 0; 0.5 * 0; 0.5 * (2 - 1); 0.5 * (2 - 0.5)
    assert torch.cat(stream.active).flatten().tolist() == [True, True, True, True]
    _, stream = passed(norms, 1.0)
    assert torch.cat(stream.active).flatten().tolist() == [True, True, False, True]


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_without_alpha_voids_are_the_blocks_where_the_norm_falls(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norms = 1 + torch.rand(7, 5, generator=generator)
    _, stream = passed(norms, 0.0)
    deltas = torch.cat(stream.deltas)
    assert torch.equal(torch.cat(stream.active), deltas >= 0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, alpha=st.floats(0.05, 1), factor=st.sampled_from([0.25, 2.0, 16.0]))
def test_decisions_do_not_change_with_the_scale_of_all_states(seed: int, alpha: float, factor: float) -> None:
    norms = norms_of(seed)
    for one, other in zip(
        passed(norms, alpha)[1].active, passed(factor * norms, alpha)[1].active, strict=True
    ):
        assert torch.equal(one, other)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_alpha_has_no_more_active_blocks(seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    norms = norms_of(seed)
    few, many = (int(torch.cat(passed(norms, alpha)[1].active).sum()) for alpha in (high, low))
    assert few <= many


@settings(max_examples=25, deadline=None)
@given(seed=seeds, alpha=st.floats(0.3, 1))
def test_a_token_leaves_with_the_output_of_its_last_active_block(seed: int, alpha: float) -> None:
    norms = norms_of(seed)
    output, stream = passed(norms, alpha)
    active = torch.cat(stream.active)
    for token in range(norms.shape[1]):
        last = max((block for block in range(len(active)) if active[block, token]), default=-1)
        assert float(output[0, token].norm()) == pytest.approx(float(norms[last + 1, token]), rel=1e-4)


def test_a_void_passes_its_input_on_where_that_is_asked_for() -> None:
    norms = torch.tensor([[1.0], [3.0], [4.0], [4.2], [7.0]])
    output, stream = passed(norms, 1.0, "residual-skip")
    assert torch.cat(stream.active).flatten().tolist()[2] is False
    # The last block multiplies by 7 / 4.2 what the block before the void gave.
    assert float(output[0, 0].norm()) == pytest.approx(4 * 7 / 4.2, rel=1e-5)


def test_tracing_changes_nothing_and_counts_prompts_and_generation_apart(
    llama: LoadedModel, tokens: Tensor
) -> None:
    traced = lac(llama, mode="trace")
    assert torch.equal(logits(traced, tokens), logits(llama, tokens))
    logits(traced, tokens[:, :1])
    facts = measured(traced)
    assert 0 < facts["blocks_active_prompt"] <= 1
    assert 0 <= facts["blocks_active_generation"] <= 1
    forget(traced)
    assert measured(traced) == {}
    assert measured(llama) == {}


def test_tokens_whose_last_block_is_active_keep_their_logits(llama: LoadedModel, tokens: Tensor) -> None:
    watched = llama.clone()
    stream = watch(watched.adapter.blocks(watched.module), 1.0, "final-state")
    got, dense = logits(watched, tokens), logits(llama, tokens)
    active = stream.active[-1]
    assert torch.equal(got[active], dense[active])
    assert bool((~active).any())
    assert not torch.equal(got[~active], dense[~active])


def test_a_clone_counts_for_itself(llama: LoadedModel, tokens: Tensor) -> None:
    first = lac(llama)
    second = first.clone()
    logits(first, tokens)
    assert measured(second) == {}
    logits(second, tokens)
    assert measured(second) == measured(first)


@pytest.mark.parametrize(
    ("passed_in", "message"), [({"alpha": 2}, "alpha = 2"), ({"mode": "skip"}, "mode = 'skip'")]
)
def test_invalid_hyperparameters_are_refused_by_name(passed_in: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(VoidLAC, passed_in, "void-lac")
