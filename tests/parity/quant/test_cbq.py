"""CBQ against an independent implementation of its specification; the authors have published no code."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors
from methodbench.torchkit.learned_rounding import commitment, nearest_offset, rounded, stretched_sigmoid
from methodbench_quant.llm.cbq import channel_scale, reconstruction_error, split_outliers

pytestmark = pytest.mark.vectors("quant", "cbq")


def close(vectors: Vectors, ours: Tensor | float, name: str) -> None:
    tolerance = vectors.meta["tolerance"]
    expected = vectors.tensor(name)
    ours = torch.as_tensor(ours, dtype=expected.dtype)
    torch.testing.assert_close(ours, expected, rtol=tolerance["rtol"], atol=tolerance["atol"], msg=name)


def test_outliers_are_split_as_specified(vectors: Vectors) -> None:
    sets = [name.removesuffix("_v") for name in vectors if re.fullmatch(r"cfp\d+_v", name)]
    assert sets
    for name in sets:
        values = vectors.tensor(f"{name}_v")
        split = split_outliers(values.abs(), vectors.meta["l1"], vectors.meta["l2"])
        close(vectors, split.threshold, f"{name}_T")
        close(vectors, split.smallest, f"{name}_min_outlier")
        close(vectors, split.limit, f"{name}_max_reserved")
        close(vectors, split.merit, f"{name}_M")
        close(vectors, channel_scale(values.abs(), split), f"{name}_act_scale")
        close(vectors, values.clamp(-split.limit, split.limit), f"{name}_truncated")


def test_bounded_data_have_no_outliers(vectors: Vectors) -> None:
    values = vectors.tensor("cfp_uniform_v")
    split = split_outliers(values, vectors.meta["l1"], vectors.meta["l2"])
    assert int((values >= split.smallest).sum()) == int(vectors["cfp_uniform_n_outliers"])


@pytest.mark.parametrize("suffix", ["V0", "V"])
def test_low_rank_rounding_is_as_specified_at_its_start_and_later(vectors: Vectors, suffix: str) -> None:
    weight, step = vectors.tensor("lr_W"), vectors.tensor("lr_S")
    v = nearest_offset(weight / step)
    if suffix == "V":
        v = v + vectors.tensor("lr_A1") @ vectors.tensor("lr_A2")
    d = stretched_sigmoid(v)
    close(vectors, d, f"lr_D_{suffix}")
    for name in [name for name in vectors if name.startswith(f"lr_com_{suffix}_beta")]:
        close(vectors, commitment(d, float(name.rpartition("beta")[2])), name)
    found = re.search(r"symmetric (\d+)-bit", vectors.meta["notes"])
    assert found is not None
    for kind, rounding in (("soft", d), ("hard", d.round())):
        close(vectors, step * rounded(weight / step, rounding, None, int(found[1])), f"lr_Wq_{kind}_{suffix}")


def test_the_error_is_as_specified(vectors: Vectors) -> None:
    h1, h2 = vectors.tensor("e_h1"), vectors.tensor("e_h2")
    squared, total = reconstruction_error(h1, h2, use_kl=False), reconstruction_error(h1, h2)
    close(vectors, squared, "e_l2")
    close(vectors, total - squared, "e_kl")
    close(vectors, total, "e_total")
