"""OSTQuant against the authors' code: loss, quantizers with their gradients, merge; QSUR against its formula."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated, stated_by
from methodbench_quant.llm.ostquant import (
    BlockTransforms,
    Site,
    TokenQuantizer,
    kl_top,
    log_qsur,
    merged,
    weight_grid,
)

pytestmark = pytest.mark.vectors("quant", "ostquant")


def tolerance(vectors: Vectors, kind: str) -> list[float]:
    return stated(vectors.meta["tolerance"][kind])


def assert_few_flips(vectors: Vectors, ours: Tensor, theirs: Tensor) -> None:
    atol, share = tolerance(vectors, "quant")[:2]
    close = torch.isclose(ours, theirs, rtol=atol, atol=atol)
    assert float((~close).float().mean()) <= share


@pytest.mark.parametrize("post", [1, 0])
def test_the_loss_and_its_gradient_are_the_authors(vectors: Vectors, post: int) -> None:
    (rtol,) = tolerance(vectors, "kl")
    student = vectors.tensor("kl_student").requires_grad_(True)
    loss = kl_top(vectors.tensor("kl_teacher"), student, vectors.meta["hyper"]["k"], softmax_first=bool(post))
    assert loss.item() == pytest.approx(float(vectors[f"kl_loss_post{post}"]), rel=rtol)
    loss.backward()
    assert student.grad is not None
    expected = vectors.tensor(f"kl_grad_post{post}")
    torch.testing.assert_close(student.grad, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def clip_of(vectors: Vectors, name: str) -> float:
    """Return the clipping ratio of a case: 1, or the one that ``meta`` gives or the levels tell."""
    if not name.endswith("_clip"):
        return 1.0
    given = vectors.meta["hyper"].get("clip")
    if given is not None:
        return float(given)
    x, y = vectors.tensor("q_x"), vectors.tensor(name)
    spread = (y.amax(-1) - y.amin(-1)) / (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0))
    return round(float(spread.median()), 2)


@pytest.mark.parametrize("name", ["q_asym", "q_asym_clip", "q_sym"])
def test_activations_and_their_gradients_are_the_authors(vectors: Vectors, name: str) -> None:
    x = vectors.tensor("q_x").requires_grad_(True)
    quantizer = TokenQuantizer(
        vectors.meta["hyper"]["bits"], symmetric=name == "q_sym", clip=clip_of(vectors, name)
    )
    y = quantizer(x)
    assert_few_flips(vectors, y.detach(), vectors.tensor(name))
    if f"{name}_grad" in vectors:
        period = int(stated_by(vectors.meta["hyper"]["q_grad"], r"mod (\d+)"))
        y.backward((torch.arange(y.numel()) % period).view_as(y).to(y))
        assert x.grad is not None
        assert_few_flips(vectors, x.grad, vectors.tensor(f"{name}_grad"))


def test_groups_of_activations_are_the_authors(vectors: Vectors) -> None:
    (name,) = [name for name in vectors if re.fullmatch(r"q_group\d+_asym", name)]
    size = int(name.removeprefix("q_group").removesuffix("_asym"))
    quantizer = TokenQuantizer(vectors.meta["hyper"]["bits"], group_size=size)
    assert_few_flips(vectors, quantizer(vectors.tensor("q_xg")), vectors.tensor(name))


def test_the_merged_weights_are_the_authors(vectors: Vectors) -> None:
    (atol,) = tolerance(vectors, "merge")
    shape = vectors.meta["hyper"]["gqa"]
    heads = shape["n_kv"] * shape["groups"]
    roles = ("q", "k", "v", "o", "up", "gate", "down")
    site = Site("norm1", "norm2", *roles, head_dim=shape["head_dim"], heads=heads, kv_heads=shape["n_kv"])
    scales = {
        "vo": "ov",
        "qk": "qk",
        "updown": "up_down",
        "attention": "norm_qkv",
        "mlp": "norm_upgate",
    }
    block = BlockTransforms(
        vectors.tensor("m_R_ov"), {ours: vectors.tensor(f"m_S_{theirs}") for ours, theirs in scales.items()}
    )
    before = {role: vectors.tensor(f"m_{role}_W0").double() for role in roles}
    with torch.no_grad():
        after = merged(before, site, block, vectors.tensor("m_R_res").double())
    for role in roles:
        expected = vectors.tensor(f"m_{role}_W1")
        torch.testing.assert_close(after[role].float(), expected, rtol=0, atol=atol, msg=role)
    for name, scale in (("qkv", block.attention), ("upgate", block.mlp)):
        expected = vectors.tensor(f"m_norm_{name}_weight")
        torch.testing.assert_close((1 / scale).detach(), expected, rtol=0, atol=atol)


def test_qsur_follows_its_formula(vectors: Vectors) -> None:
    x, rotation = vectors.tensor("qsur_X"), vectors.tensor("qsur_rot")
    ours = []
    for with_mean in (False, True):
        for rows in (x, x @ rotation):
            ours.append(log_qsur(rows.T.cov(), rows.mean(0) if with_mean else None))
    (rtol,) = tolerance(vectors, "kl")
    assert ours == pytest.approx(list(vectors["qsur_log_per_dim"]), rel=rtol)


def test_weights_with_the_clip_search_are_the_authors(vectors: Vectors) -> None:
    weight = vectors.tensor("q_w")
    grid = weight_grid(weight, vectors.meta["hyper"]["bits"])
    assert_few_flips(vectors, grid.snap(weight), vectors.tensor("q_w_clip_sym"))
