"""Values as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench_leaderboard import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (25.4912, "25.49"),
        (0.8655, "0.8655"),
        (564.53, "564.5"),
        (512_345.6, "512,346"),
        (-0.0123, "−0.0123"),
        (3.2e-7, "3.20e−7"),
        (0.0, "0"),
        (math.inf, "diverged (inf)"),
        (math.nan, "not a number"),
        (None, "–"),
    ],
)
def test_numbers_keep_the_digits_that_matter(value, text):
    assert formats.number(value) == text


def test_sizes_and_times_have_units():
    assert formats.size(58_400_000) == "58.4 MB"
    assert formats.size(512) == "512 B"
    assert formats.seconds(0.0123) == "12 ms"
    assert formats.seconds(125) == "2 min 5 s"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_a_name_never_leaves_its_folder(name):
    for made in (formats.slug(name), formats.run_slug(name)):
        assert made
        assert not set(made) & set("/\\ \"'<>&?#%:\0")
        assert not made.startswith(".")


def test_different_names_have_different_files():
    names = ["a", "A", "a/b", "../a", "a.html", "", "x" * 500, "<script>"]
    assert len({formats.slug(name) for name in names}) == len(names)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=80))
def test_harmless_text_can_be_written_and_turns_no_direction(text):
    clean = formats.harmless(text)
    clean.encode("utf-8")
    assert not set(clean) & {"\u202e", "\u2066", "\u200f", "\x07", "\x00"}


def test_addresses_are_made_only_from_identifiers():
    assert formats.arxiv_url("2306.00978") == "https://arxiv.org/abs/2306.00978"
    assert formats.repository_url("mit-han-lab/llm-awq") == "https://github.com/mit-han-lab/llm-awq"
    for bad in ("javascript:alert(1)", '2306"onload', "", "a b/c", "../../x y"):
        assert formats.arxiv_url(bad) == ""
        assert formats.repository_url(bad) == ""
