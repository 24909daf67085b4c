"""CoreInfer against the authors' layers: core sets, decoded tokens, and the clusters of a small set of sentences."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated_by
from methodbench_sparse.coreinfer import cluster, core_set, elbow, token_counts

pytestmark = pytest.mark.vectors("sparse", "coreinfer")


def limit(vectors: Vectors, pattern: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], pattern + r" ?([\d.]+(?:e-\d+)?)")


def scores(vectors: Vectors, kind: str) -> Tensor:
    return vectors.tensor("llama_h" if kind == "llama" else "opt_z", torch.float32).flatten(0, -2)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_counts_of_neurons_equal_the_reference(vectors: Vectors, kind: str) -> None:
    counts = token_counts(scores(vectors, kind), vectors.meta["hyper"]["token_sparsity"])
    assert int(counts.sum()) == int(vectors[f"{kind}_limit"]) * len(scores(vectors, kind))
    ids = counts.nonzero().flatten()
    assert ids.tolist() == vectors[f"{kind}_ids"].tolist()
    assert counts[ids].tolist() == vectors[f"{kind}_counts"].tolist()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_core_sets_have_the_counts_of_the_reference(vectors: Vectors, kind: str) -> None:
    hyper = vectors.meta["hyper"]
    counts = token_counts(scores(vectors, kind), hyper["token_sparsity"])
    got = core_set(counts, int(len(counts) * hyper["keep"]))
    expected = vectors.tensor(f"{kind}_core")
    assert Counter(counts[got].tolist()) == Counter(counts[expected].tolist())
    lowest = counts[got].min()
    assert set(got[counts[got] > lowest].tolist()) == set(expected[counts[expected] > lowest].tolist())


def masked(vectors: Vectors, kind: str, values: Tensor) -> Tensor:
    mask = torch.zeros(values.shape[-1], dtype=torch.bool)
    return values * mask.index_fill(0, vectors.tensor(f"{kind}_core"), True)


def test_a_llama_layer_decodes_with_the_core_what_the_reference_does(vectors: Vectors) -> None:
    gate, up, down = (vectors.tensor(f"llama_{name}") for name in ("gate", "up", "down"))

    def hidden(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)

    rtol = limit(vectors, "decode_y rtol")
    prompt = hidden(vectors.tensor("llama_prompt"))
    torch.testing.assert_close(prompt, vectors.tensor("llama_h"), rtol=rtol, atol=rtol)
    torch.testing.assert_close(prompt @ down.T, vectors.tensor("llama_prefill_y"), rtol=rtol, atol=rtol)
    got = masked(vectors, "llama", hidden(vectors.tensor("llama_tok"))) @ down.T
    torch.testing.assert_close(got, vectors.tensor("llama_decode_y"), rtol=rtol, atol=rtol)


def test_an_opt_layer_decodes_with_the_core_what_the_reference_does(vectors: Vectors) -> None:
    names = ("W1", "b1", "W2", "b2", "tok", "decode_y")
    w1, b1, w2, b2, token, expected = (vectors.tensor(f"opt_{name}", torch.float32) for name in names)
    got = masked(vectors, "opt", (token @ w1.T + b1).relu()) @ w2.T + b2
    rtol = limit(vectors, "fp16:")
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)


def test_clusters_of_sentences_equal_the_reference_up_to_their_order(vectors: Vectors) -> None:
    packed = np.unpackbits(vectors["sim_sets"], axis=1)
    neurons = int(stated_by(vectors.meta["note"], r"rows of (\d+) neurons"))
    labels, centres = cluster(torch.from_numpy(packed[:, :neurons].astype(np.float32)))
    assert len(centres) == int(vectors["sim_k"])
    pairs = set(zip(labels.tolist(), vectors["sim_labels"].tolist(), strict=True))
    assert (
        len(pairs) == len(centres) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs})
    )


def test_the_elbow_is_where_inertia_bends_most_and_at_least_four() -> None:
    assert elbow([100.0, 80, 60, 40, 20, 19, 18, 17, 16, 15]) == 5
    assert elbow([100.0, 10, 9, 8, 7, 6]) == 4
