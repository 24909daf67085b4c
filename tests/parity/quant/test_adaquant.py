"""AdaQuant against the authors' code: quantizer, measured ranges, gradient steps, integer program."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from methodbench.testing.parity import Vectors, stated_by
from methodbench_quant.learned_ranges import LearnedRange, QuantizedLinear, adaquant, allocate

pytestmark = pytest.mark.vectors("quant", "adaquant")


def tolerance(vectors: Vectors) -> dict[str, float]:
    return {name: vectors.meta["tolerance"][name] for name in ("rtol", "atol")}


def measured(vectors: Vectors) -> tuple[QuantizedLinear, Tensor]:
    bits = vectors.meta["bits"]
    layer = QuantizedLinear(vectors.tensor("W"), vectors.tensor("bias"), bits, bits)
    x = vectors.tensor("X")
    layer.measure(x.chunk(2))
    return layer, x


def test_values_and_gradients_of_the_quantizer_are_the_authors(vectors: Vectors) -> None:
    x = vectors.tensor("q_x").requires_grad_()
    quantizer = LearnedRange(
        vectors.tensor("q_range").view(1), vectors.tensor("q_zero").view(1), vectors.meta["bits"]
    )
    out = quantizer(x)
    torch.testing.assert_close(out, vectors.tensor("q_out"), **tolerance(vectors))
    out.backward(vectors.tensor("q_gout"))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, vectors.tensor("q_gx"), **tolerance(vectors))
    for parameter, name in ((quantizer.range, "q_grange"), (quantizer.minimum, "q_gzero")):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.sum(), vectors.tensor(name), **tolerance(vectors))


def parameters(layer: QuantizedLinear) -> dict[str, Tensor]:
    assert layer.input_range is not None
    assert layer.bias is not None
    return {
        "weight": layer.weight,
        "bias": layer.bias,
        "quantize_input.running_range": layer.input_range.range,
        "quantize_input.running_zero_point": layer.input_range.minimum,
        "quantize_weight.running_range": layer.weight_range.range,
        "quantize_weight.running_zero_point": layer.weight_range.minimum,
    }


def compare(layer: QuantizedLinear, vectors: Vectors, prefix: str, rtol: float) -> None:
    ours = parameters(layer)
    names = [name for name in vectors if name.startswith(prefix)]
    assert names
    for name in names:
        torch.testing.assert_close(
            ours[name.removeprefix(prefix)].detach(),
            vectors.tensor(name),
            rtol=rtol,
            atol=vectors.meta["tolerance"]["atol"],
        )


def test_measured_ranges_and_outputs_are_the_authors(vectors: Vectors) -> None:
    layer, x = measured(vectors)
    compare(layer, vectors, "measured.", vectors.meta["tolerance"]["rtol"])
    torch.testing.assert_close(layer(x).detach(), vectors.tensor("y_q_before"), **tolerance(vectors))


def test_gradient_steps_end_where_the_authors_do(vectors: Vectors) -> None:
    layer, x = measured(vectors)
    rates = vectors.meta["lrs"]
    target = torch.nn.functional.linear(x, layer.weight, layer.bias).detach()
    fitted = adaquant(
        layer,
        x,
        target,
        iterations=vectors.meta["iters"],
        batch=len(x),
        lr_w=rates["weight"],
        lr_b=rates["bias"],
        lr_qin=rates["input_range_zero"],
        lr_qw=rates["weight_range_zero"],
    )
    rtol = vectors.meta["tolerance"]["after_rtol"]
    assert fitted.before == pytest.approx(float(vectors["mse_before"]), rel=rtol)
    assert fitted.after == pytest.approx(float(vectors["mse_after"]), rel=rtol)
    assert fitted.after < fitted.before
    compare(layer, vectors, "after.", rtol)
    ours, theirs = layer(x).detach(), vectors.tensor("y_q_after")
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


def test_the_integer_program_has_the_authors_optimum(vectors: Vectors) -> None:
    sizes, base = vectors["ip_params"].tolist(), float(vectors["ip_base_loss"])
    names = [name for name in vectors if re.fullmatch(r"ip_policy_\d+", name)]
    assert names
    for name in names:
        precisions = [int(digit) for digit in name.removeprefix("ip_policy_")]
        columns = [
            np.zeros(len(sizes)) if p == max(precisions) else vectors[f"ip_loss{p}"] - base
            for p in precisions
        ]
        suffix = name.removeprefix("ip_policy_")
        for row, size in enumerate(vectors["ip_D"]):
            found = allocate(np.stack(columns, 1), sizes, precisions, float(size))
            if not vectors[name][row].any():
                assert found is None
                continue
            assert found is not None
            # The solver's tolerance.
            limit = stated_by(vectors.meta["tolerance"]["ip"], r"within ([\d.e-]+)")
            objective = float(vectors[f"ip_objective_{suffix}"][row])
            assert found.objective == pytest.approx(objective, abs=limit)
            assert found.size <= float(size) + 1e-9
