"""Masks of the lowest scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methodbench.errors import NotApplicableError
from methodbench_sparse import masks
from methodbench_sparse.masks import check_groups, check_pattern, nm_mask, parse_pattern, row_mask

seeds = st.integers(0, 2**16)


def scores(seed: int, rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, group=st.integers(2, 8), groups=st.integers(1, 5), data=st.data())
def test_nm_masks_the_lowest_n_of_every_group(
    seed: int, group: int, groups: int, data: st.DataObject
) -> None:
    zeros = data.draw(st.integers(1, group - 1))
    s = scores(seed, 5, group * groups)
    mask = nm_mask(s, zeros, group).view(5, groups, group)
    assert (mask.sum(dim=-1) == zeros).all()
    parts = s.view(5, groups, group)
    highest_gone = parts.masked_fill(~mask, -1).amax(dim=-1)
    lowest_kept = parts.masked_fill(mask, 2).amin(dim=-1)
    assert (highest_gone <= lowest_kept).all()


@pytest.mark.parametrize("group", [2, 4, 8, 16, 20])
def test_nm_masks_what_a_stable_sort_puts_first(group: int) -> None:
    # Few different scores, so that there are ties; infinity, and NaN, which a sort puts last.
    s = (6 * scores(group, 7, 5 * group)).round()
    s[0, :3], s[1, 1], s[2, 0] = float("inf"), float("nan"), float("-inf")
    for zeros in range(1, group):
        first = s.view(7, 5, group).sort(dim=-1, stable=True).indices[..., :zeros]
        expected = torch.zeros(7, 5, group, dtype=torch.bool).scatter_(-1, first, True)
        assert torch.equal(nm_mask(s, zeros, group), expected.view(7, -1))
    assert s[0, 0] == float("inf")


def test_a_shorter_last_group_loses_as_many() -> None:
    mask = nm_mask(scores(0, 4, 11), 2, 4)
    assert mask[:, :8].view(4, 2, 4).sum(dim=-1).eq(2).all()
    assert mask[:, 8:].sum(dim=-1).eq(2).all()


@settings(max_examples=30, deadline=None)
@given(seed=seeds, columns=st.integers(1, 40), sparsity=st.floats(0, 0.999))
def test_every_row_loses_the_same_truncated_count(seed: int, columns: int, sparsity: float) -> None:
    s = scores(seed, 6, columns)
    mask = row_mask(s, sparsity)
    assert (mask.sum(dim=-1) == int(columns * sparsity)).all()
    assert (s.masked_fill(~mask, -1).amax(dim=-1) <= s.masked_fill(mask, 2).amin(dim=-1)).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    columns=st.integers(1, 12),
    sparsity=st.floats(0, 0.999),
    levels=st.integers(1, 6),
    selected=st.sampled_from([1, 30, 1 << 22]),
)
def test_rows_are_masked_as_a_stable_sort_would(
    seed: int, columns: int, sparsity: float, levels: int, selected: int
) -> None:
    s = (scores(seed, 7, columns) * levels).round()
    s[3, scores(seed + 1, 1, columns)[0] > 0.5] = torch.nan
    s[4] = torch.inf
    count = int(columns * sparsity)
    expected = torch.zeros_like(s, dtype=torch.bool)
    expected.scatter_(1, s.sort(dim=1, stable=True).indices[:, :count], True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_SELECTED", selected)
        assert torch.equal(row_mask(s, sparsity), expected)


def test_ties_go_to_the_lower_column() -> None:
    equal = torch.ones(1, 8)
    assert row_mask(equal, 0.5).tolist() == [[True] * 4 + [False] * 4]
    assert nm_mask(equal, 1, 4).tolist() == [[True, False, False, False] * 2]


@pytest.mark.parametrize(("pattern", "parsed"), [("unstructured", None), ("2:4", (2, 4)), ("1:16", (1, 16))])
def test_patterns_read_as_zeros_of_group(pattern: str, parsed: tuple[int, int] | None) -> None:
    assert parse_pattern(pattern) == parsed


def test_a_pattern_that_contradicts_the_sparsity_is_refused_with_both_numbers() -> None:
    check_pattern("1:4", 0.25)
    with pytest.raises(ValueError, match=r"1:4 zeroes 1 of 4: sparsity is 0\.25, not 0\.75"):
        check_pattern("1:4", 0.75)
    with pytest.raises(ValueError, match="zeroes whole groups"):
        check_pattern("4:4", 0.5)


def test_a_width_that_does_not_divide_names_layer_and_width() -> None:
    check_groups("blocks.0.q", 48, 4)
    with pytest.raises(NotApplicableError, match=r"blocks\.0\.q has 46 inputs"):
        check_groups("blocks.0.q", 46, 4)
