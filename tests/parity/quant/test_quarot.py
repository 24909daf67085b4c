"""QuaRot against the authors' code: tables, transforms, quantizers, a rotated toy block, GPTQ on its grids."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated
from methodbench.torchkit.compensation import Hessian, add_batch
from methodbench.torchkit.hadamard import hadamard, hadamard_transform, signed_hadamard
from methodbench.torchkit.quantizers import Convention, UniformGrid, find_grid, find_grid_by_mse
from methodbench.torchkit.rotation import rotate_heads_out
from methodbench_quant.llm.gptq import gptq

pytestmark = pytest.mark.vectors("quant", "quarot")


def tolerances(vectors: Vectors, kind: str) -> list[float]:
    """Return the numbers of a tolerance that ``meta`` gives in words; percentages as shares."""
    return stated(vectors.meta["tolerance"][kind])


def assert_quantized(vectors: Vectors, ours: Tensor, theirs: Tensor, scale: Tensor) -> None:
    rtol, share = tolerances(vectors, "quant")[:2]
    close = torch.isclose(ours, theirs, rtol=rtol, atol=rtol)
    assert float((~close).float().mean()) <= share
    assert bool((((ours - theirs) / scale).round().abs() <= 1).all())


def test_every_table_equals_the_authors(vectors: Vectors) -> None:
    tables = [name for name in vectors if re.fullmatch(r"had\d+", name)]
    assert tables
    for name in tables:
        order = int(name.removeprefix("had"))
        positive = np.unpackbits(vectors[name], axis=1)[:, :order].astype(bool)
        assert np.array_equal(hadamard(order).numpy() > 0, positive), name


def test_transforms_equal_the_authors(vectors: Vectors) -> None:
    inputs = [name for name in vectors if name.startswith("hadU_x_")]
    assert inputs
    for name in inputs:
        expected = vectors.tensor(name.replace("_x_", "_y_"))
        (atol,) = tolerances(vectors, "hadU")
        torch.testing.assert_close(hadamard_transform(vectors.tensor(name)), expected, rtol=0, atol=atol)


def test_the_random_rotation_follows_from_its_signs(vectors: Vectors) -> None:
    (atol,) = tolerances(vectors, "hadU")
    ours = signed_hadamard(vectors.tensor("sign_s"))
    torch.testing.assert_close(ours, vectors.tensor("Q"), rtol=0, atol=atol)


@pytest.mark.parametrize("grid", ["sym", "asym", "group_sym", "group_asym"])
def test_activation_grids_equal_the_authors(vectors: Vectors, grid: str) -> None:
    hyper = vectors.meta["hyper"]
    x, expected = vectors.tensor("act_x"), vectors.tensor(f"act_{grid}")
    clip = hyper.get(f"act_{grid}_clip", hyper.get(f"{grid}_clip"))
    symmetric, grouped = not grid.endswith("asym"), grid.startswith("group")
    if grouped:
        x, expected = (t.unflatten(-1, (-1, hyper["group"])) for t in (x, expected))
    conventions: dict[tuple[bool, bool], Convention] = {
        (True, False): "absmax",
        (True, True): "absmax",
        (False, False): "gptq",
        (False, True): "omni",
    }
    found = find_grid(
        x, hyper["act_bits"], conventions[symmetric, grouped], symmetric=symmetric, clip=(clip, clip)
    )
    scale = vectors.tensor(f"act_{grid}_scale").view_as(found.scale)
    torch.testing.assert_close(found.scale, scale, rtol=tolerances(vectors, "quant")[0], atol=0)
    if found.zero is not None:
        assert torch.equal(found.zero, vectors.tensor(f"act_{grid}_zero").view_as(found.zero))
    assert_quantized(vectors, found.snap(x), expected, scale)


def weight_options(description: str) -> tuple[int, Convention, bool, bool]:
    """Return bits, convention, symmetry and clip search of a weight grid that ``meta`` gives in words."""
    found = re.match(r"(\d+)-bit (a?sym)", description)
    assert found is not None
    symmetric = found[2] == "sym"
    clip = "mse" in description or "clip" in description
    return int(found[1]), "absmax" if symmetric else "gptq", symmetric, clip


def test_weight_grids_equal_the_authors(vectors: Vectors) -> None:
    weight = vectors.tensor("w")
    for name, description in vectors.meta["hyper"]["weight"].items():
        bits, convention, symmetric, clip = weight_options(description)
        grid: UniformGrid = (
            find_grid_by_mse(weight, bits, convention, symmetric=symmetric)
            if clip
            else find_grid(weight, bits, convention, symmetric=symmetric)
        )
        scale = vectors.tensor(f"{name}_scale")
        torch.testing.assert_close(grid.scale, scale, rtol=tolerances(vectors, "quant")[0], atol=0)
        if grid.zero is not None:
            assert torch.equal(grid.zero, vectors.tensor(f"{name}_zero")), name
        assert_quantized(vectors, grid.snap(weight), vectors.tensor(name), scale)


def test_the_toy_block_is_fused_and_rotated_like_the_authors(vectors: Vectors) -> None:
    rotation, gain = vectors.tensor("Q"), vectors.tensor("toy_gamma").double()

    def before(name: str) -> Tensor:
        return vectors.tensor(f"toy_{name}0").double()

    down = hadamard_transform(rotation.T @ before("down_W"))
    ours = {
        "E": (before("E") - before("E").mean(1, keepdim=True)) @ rotation,
        "q_W": before("q_W") * gain @ rotation,
        "up_W": before("up_W") * gain @ rotation,
        "o_W": rotation.T @ before("o_W"),
        "o_b": rotation.T @ before("o_b"),
        "down_W": down,
        "down_b": rotation.T @ before("down_b"),
    }
    (atol,) = tolerances(vectors, "hadU")
    # The authors centre the embedding where the norms had a mean; the vectors do not say which kind they hold.
    if not torch.allclose(vectors.tensor("toy_E1").double(), ours["E"], rtol=0, atol=atol):
        ours["E"] = before("E") @ rotation
    for name, weight in ours.items():
        expected = vectors.tensor(f"toy_{name}1")
        torch.testing.assert_close(weight.float(), expected, rtol=0, atol=atol, msg=name)


def test_value_heads_are_rotated_like_the_authors(vectors: Vectors) -> None:
    (name,) = [name for name in vectors if name.startswith("toy_v_W1_headdim")]
    size = int(name.removeprefix("toy_v_W1_headdim"))
    rotation = hadamard_transform(torch.eye(size, dtype=torch.float64))[None]
    ours = rotate_heads_out(vectors.tensor("toy_v_W0").double(), rotation)
    (atol,) = tolerances(vectors, "hadU")
    torch.testing.assert_close(ours.float(), vectors.tensor(name), rtol=0, atol=atol)


def test_gptq_on_the_authors_grid(vectors: Vectors) -> None:
    options: dict[str, Any] = vectors.meta["hyper"]["gptq"]
    hessian = Hessian(torch.zeros(vectors["gptq_H"].shape))
    for batch in vectors.tensor("gptq_X"):
        add_batch(hessian, batch)
    atol, share = tolerances(vectors, "gptq")
    torch.testing.assert_close(hessian.matrix, vectors.tensor("gptq_H"), rtol=atol, atol=atol)
    convention: Literal["absmax", "gptq"] = "absmax" if options["sym"] else "gptq"
    rounded = gptq(
        vectors.tensor("gptq_W"),
        hessian.matrix,
        bits=options["bits"],
        convention=convention,
        symmetric=options["sym"],
        mse=options["clip"],
        percdamp=options["percdamp"],
        blocksize=options["block"],
    )
    rtol = tolerances(vectors, "quant")[0]
    torch.testing.assert_close(rounded.quantized.scale, vectors.tensor("gptq_scale"), rtol=rtol, atol=0)
    close = torch.isclose(rounded.dequantize(), vectors.tensor("gptq_Wq"), rtol=0, atol=atol)
    assert float(close.float().mean()) >= share
