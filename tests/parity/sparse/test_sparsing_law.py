"""PPL-p% sparsity against the authors' code, on a toy language model of two layers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench.torchkit.activation_sparsity import forget, observed, sites
from methodbench.torchkit.adapters import Adapter
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss
from methodbench_sparse.sparsing_law import CettCurve, at_cett, bisect

pytestmark = pytest.mark.vectors("sparse", "sparsing_law")


def limit(vectors: Vectors, pattern: str) -> float:
    """A number out of the sentence in which the vectors state their tolerances."""
    return stated_by(vectors.meta["tolerance"], pattern + r" ?([\d.]+(?:e-\d+)?)")


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class MLP(nn.Module):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(f"{name}_proj", layer)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = norm(x)
        return x + self.down_proj(self.act_fn(self.gate_proj(h)) * self.up_proj(h))


class Toy(nn.Module):
    """``meta["toy"]``: embeddings, a cumulative mean through M, gated networks, a head."""

    def __init__(self, vectors: Vectors) -> None:
        super().__init__()
        for name in "EMH":
            self.register_buffer(name, vectors.tensor(name))
        count = sum(bool(re.fullmatch(r"gate\d+", key)) for key in vectors)
        self.layers = nn.ModuleList(
            MLP({name: vectors.tensor(f"{name}{index}") for name in ("gate", "up", "down")})
            for index in range(count)
        )

    def forward(self, ids: Tensor) -> SimpleNamespace:
        x = self.E[ids]
        x = x + (x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]) @ self.M.T
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=norm(x) @ self.H.T)


@pytest.fixture
def model(vectors: Vectors) -> LoadedModel:
    module = Toy(vectors).eval()
    stages = tuple(f"layers.{index}" for index in range(len(module.layers)))
    return LoadedModel("toy", "causal-lm", module, Adapter(kind="causal-lm", stages=stages))


def curves_of(model: LoadedModel, vectors: Vectors) -> dict[str, CettCurve]:
    names = [f"{stage}.down_proj" for stage in model.adapter.stages]
    data = Calibration(vectors.tensor("ids"))
    found = {}
    for (name,), tensors in observed(model, data, names, "a test"):
        hidden = torch.cat([x.flatten(0, -2) for x in tensors])
        index = names.index(name)
        torch.testing.assert_close(hidden, vectors.tensor(f"h{index}").flatten(0, -2))
        weight = model.module.get_submodule(name).weight
        found[name] = CettCurve(hidden, weight, vectors.meta["hyper"]["candidates"])
    return found


def ratio_and_share(
    model: LoadedModel, curves: dict[str, CettCurve], cett: float, ids: Tensor
) -> tuple[float, float]:
    sparse = at_cett(model, curves, cett)
    forget(sparse)
    ratio = float(np.exp(next_token_loss(sparse, ids) - next_token_loss(model, ids)))
    return ratio, 1 - float(np.mean([site.sparsity for site in sites(sparse.module).values()]))


def test_thresholds_shares_and_perplexities_at_a_cett_equal_the_reference(
    model: LoadedModel, vectors: Vectors
) -> None:
    curves, ids = curves_of(model, vectors), vectors.tensor("ids")
    for cett, row in zip(vectors["cetts"].tolist(), vectors["cett_rows"].tolist(), strict=True):
        *thresholds, share, ratio = row
        got = [curve.threshold(cett) for curve in curves.values()]
        assert got == pytest.approx(thresholds, rel=limit(vectors, "thresholds rtol"))
        found = ratio_and_share(model, curves, cett, ids)
        assert found[1] == pytest.approx(share, abs=limit(vectors, "activation ratio atol"))
        assert found[0] == pytest.approx(ratio, rel=limit(vectors, "ppl ratio rtol"))


def test_the_search_for_a_rise_of_perplexity_equals_the_reference(
    model: LoadedModel, vectors: Vectors
) -> None:
    curves, ids = curves_of(model, vectors), vectors.tensor("ids")
    for target, (cett, share, ratio) in zip(
        vectors["pplp"].tolist(), vectors["pplp_rows"].tolist(), strict=True
    ):
        got = bisect(
            lambda c: ratio_and_share(model, curves, c, ids)[0],
            target,
            vectors.meta["hyper"]["tolerance_cett"],
        )
        assert got == pytest.approx(cett, rel=limit(vectors, "pplp cett rtol"))
        found = ratio_and_share(model, curves, got, ids)
        assert found[1] == pytest.approx(share, abs=2 * limit(vectors, "activation ratio atol"))
        assert found[0] == pytest.approx(ratio, rel=2 * limit(vectors, "ppl ratio rtol"))
