"""Outlier metrics against the authors' expressions, and the fit against a reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated_by
from methodbench_quant.llm import outlier_metrics as m

pytestmark = pytest.mark.vectors("quant", "outlier_metrics")


def rtol(vectors: Vectors) -> float:
    """The number at the beginning of the vectors' tolerance, for everything but the fit."""
    return float(str(vectors.meta["tolerance"]).split(";")[0])


def close(ours: Tensor | float, theirs: Tensor, vectors: Vectors) -> None:
    torch.testing.assert_close(
        torch.as_tensor(ours).double(), theirs.double(), rtol=rtol(vectors), atol=rtol(vectors)
    )


def test_activation_outliers(vectors: Vectors) -> None:
    x = vectors.tensor("act_feat")
    tokens = torch.stack([m.token_outliers(row, vectors.meta["hyper"]["act_eta"]) for row in x])
    assert torch.equal(tokens, vectors.tensor("act_mask_tokens"))
    close(m.largest(x, len(vectors["act_top3"])), vectors.tensor("act_top3"), vectors)
    close(x.abs().median(), vectors.tensor("act_median"), vectors)
    expected = vectors.tensor("act_top2_channels")
    assert torch.equal(m.top_channels(x, expected.shape[-1]), expected)


def test_massive_activations(vectors: Vectors) -> None:
    x, limits = vectors.tensor("act_feat"), vectors.meta["hyper"]["massive"]
    name = next(name for name in vectors if name.startswith("massive_mask"))
    assert torch.equal(m.massive(x, limits["abs"], limits["times_median"]), vectors.tensor(name))
    close(m.top_to_median(x), vectors.tensor("ratio_top1_median"), vectors)


def test_weight_outliers(vectors: Vectors) -> None:
    weight = vectors.tensor("w")
    ratios = m.column_ratios(weight)
    close(ratios, vectors.tensor("w_col_ratio"), vectors)
    close(ratios.max(), vectors.tensor("w_ratio_max"), vectors)
    close(ratios.median(), vectors.tensor("w_ratio_median"), vectors)
    assert torch.equal(ratios.topk(len(vectors["w_top3_cols"])).indices, vectors.tensor("w_top3_cols"))
    close(m.row_or_column_ratio(weight), vectors.tensor("w_rowcol_max_ratio"), vectors)


def test_attention_outliers(vectors: Vectors) -> None:
    (probabilities,) = vectors.tensor("attn")
    received = m.attention_received(probabilities)
    close(received, vectors.tensor("attn_colsum"), vectors)
    limit = vectors.meta["hyper"]["attn_fraction"] * len(received)
    assert torch.equal(received >= limit, vectors.tensor("attn_outlier_keys"))
    close(received.topk(len(vectors["attn_top2"])).values, vectors.tensor("attn_top2"), vectors)
    close(float(np.median(received.numpy())), vectors.tensor("attn_median"), vectors)


def test_kurtosis(vectors: Vectors) -> None:
    each = [m.excess_kurtosis(hidden) for hidden in vectors.tensor("kurt_hidden")]
    close(torch.tensor(each), vectors.tensor("kurt_each"), vectors)
    close(float(np.mean(each)), vectors.tensor("kurt_model"), vectors)


def test_the_fit_predicts_the_reference_curve(vectors: Vectors) -> None:
    curve = m.fit_training_curve(vectors["fit_t"], vectors["fit_y"])
    limits = vectors.meta["tolerance"]
    predicted, explained = (stated_by(limits, rf"{word} \(\D*([\d.e-]+)\)") for word in ("predictions", "R2"))
    np.testing.assert_allclose(curve(vectors["fit_t"]), vectors["fit_pred"], rtol=predicted)
    assert curve.r2 == pytest.approx(float(vectors["fit_r2"]), abs=explained)
