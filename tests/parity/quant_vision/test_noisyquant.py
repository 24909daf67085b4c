"""NoisyQuant against the authors' code: weights, the three searches, and outputs on unseen inputs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated_by
from methodbench_quant.vit.noisyquant import quantize_rows, search_clip, search_mean, search_noise, snap

pytestmark = pytest.mark.vectors("quant_vision", "noisyquant")


def close(actual: Tensor, vectors: Vectors, name: str) -> None:
    tolerance = vectors.meta["tolerance"]
    expected = vectors.tensor(name)
    torch.testing.assert_close(
        actual.reshape(expected.shape), expected, rtol=tolerance["rtol"], atol=tolerance["atol"]
    )


@pytest.fixture
def x(vectors: Vectors) -> Tensor:
    return vectors.tensor("x").flatten(0, -2)


def steps(vectors: Vectors, name: str) -> int:
    """How many candidates a search of the authors' functions tries, from the list of functions."""
    text = vectors.meta["functions"]
    pattern = {"clip": r"search_space=(\d+)", "mean": r"mean search (\d+)", "noise": r"range search (\d+)"}
    found = re.search(pattern[name], text)
    assert found is not None
    return int(found[1])


def output(vectors: Vectors, name: str, added: Tensor, scale: Tensor | None = None) -> Tensor:
    scale = vectors.tensor("act_scale") if scale is None else scale
    levels = snap(vectors.tensor(name) + added, scale, vectors.meta["bits"])
    return (levels - added) @ vectors.tensor("w_q").T + vectors.tensor("b")


def error(vectors: Vectors, added: Tensor, scale: Tensor | None = None) -> Tensor:
    exact = vectors.tensor("x") @ vectors.tensor("w_q").T + vectors.tensor("b")
    return (output(vectors, "x", added, scale) - exact).square().mean()


def found_or_tied(found: Tensor, vectors: Vectors, name: str, reached: Tensor, stage: str) -> None:
    """The authors' candidate, or another one whose error is the same up to what the vectors allow for ties."""
    try:
        close(found, vectors, name)
    except AssertionError:
        rtol = stated_by(vectors.meta["tolerance"]["note"], r"rtol ([\d.e-]+)")
        torch.testing.assert_close(reached, vectors.tensor(f"mse_calib_{stage}"), rtol=rtol, atol=0)


def test_weights_are_the_authors(vectors: Vectors) -> None:
    close(quantize_rows(vectors.tensor("w"), vectors.meta["bits"]).dequantize(), vectors, "w_q")


def test_clip_is_the_authors(vectors: Vectors, x: Tensor) -> None:
    found = search_clip(x, vectors.tensor("w_q"), vectors.meta["bits"], steps(vectors, "clip"))
    found_or_tied(found, vectors, "act_scale", error(vectors, torch.zeros(()), found), "clip")
    close(output(vectors, "x", torch.zeros(())), vectors, "y_calib_clip")
    close(output(vectors, "x_test", torch.zeros(())), vectors, "y_clip")


def test_mean_is_the_authors(vectors: Vectors, x: Tensor) -> None:
    found = search_mean(
        x, vectors.tensor("w_q"), vectors.tensor("act_scale"), vectors.meta["bits"], steps(vectors, "mean")
    )
    found_or_tied(found, vectors, "mean_bias", error(vectors, found), "mean")
    mean = vectors.tensor("mean_bias")
    close(output(vectors, "x", mean), vectors, "y_calib_mean")
    close(output(vectors, "x_test", mean), vectors, "y_mean")


@pytest.mark.parametrize(("prefix", "mean"), [("noise", None), ("mean_noise", "mean_bias")])
def test_noise_is_the_authors(vectors: Vectors, x: Tensor, prefix: str, mean: str | None) -> None:
    start = torch.zeros(()) if mean is None else vectors.tensor(mean)
    found = search_noise(
        x,
        vectors.tensor("w_q"),
        vectors.tensor("act_scale"),
        start,
        vectors.tensor("noise_direction").flatten(),
        vectors.meta["bits"],
        steps(vectors, "noise"),
    )
    found_or_tied(found, vectors, f"{prefix}_bias", error(vectors, found), prefix)
    noise = vectors.tensor(f"{prefix}_bias")
    close(output(vectors, "x", noise), vectors, f"y_calib_{prefix}")
    close(output(vectors, "x_test", noise), vectors, f"y_{prefix}")


@pytest.mark.parametrize("stage", ["clip", "mean", "noise", "mean_noise"])
def test_errors_on_calibration_inputs_are_the_authors(vectors: Vectors, stage: str) -> None:
    added = torch.zeros(()) if stage == "clip" else vectors.tensor(f"{stage}_bias")
    close(error(vectors, added), vectors, f"mse_calib_{stage}")
