"""Methods of training against their authors' code, or reference implementations of their equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors
from methodbench_optim.training import atlas, gere, noprop
from methodbench_optim.training.asft import anchored_loss
from methodbench_optim.training.tract import TrActLayer


def same(vectors: Vectors, name: str, actual: Any) -> None:
    value = actual.detach().numpy() if isinstance(actual, Tensor) else actual
    np.testing.assert_allclose(value, vectors[name], rtol=0, atol=vectors.meta["tolerance"], err_msg=name)


@pytest.mark.vectors("optim", "tract")
@pytest.mark.parametrize("case", ["lin", "lin2", "conv"])
def test_tract_gives_the_recorded_gradients(vectors: Vectors, case: str) -> None:
    given, dtype = vectors.meta["hyperparameters"], getattr(torch, vectors.meta["dtype"])
    layer: nn.Linear | nn.Conv2d
    owner = "conv" if case == "conv" else "lin"
    weight, bias = vectors.tensor(f"{owner}_w", dtype), vectors.tensor(f"{owner}_b", dtype)
    if case == "conv":
        geometry = given["conv"]
        layer = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            geometry["kernel"],
            stride=geometry["stride"],
            padding=geometry["padding"],
        )
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    replaced = TrActLayer(layer, given["l"])
    x = vectors.tensor(f"{case}_x", dtype).requires_grad_()
    y = replaced(x)
    y.backward(vectors.tensor(f"{case}_grad_out", dtype))
    assert layer.weight.grad is not None
    actual = {"y": y, "dw": layer.weight.grad, "db": layer.bias.grad, "dx": x.grad}
    for name, value in actual.items():
        if f"{case}_{name}" in vectors:
            same(vectors, f"{case}_{name}", value)


@pytest.mark.vectors("optim", "asft")
@pytest.mark.parametrize("mode", ["sft", "dft", "sft+kl", "asft"])
def test_asft_gives_the_recorded_loss_and_gradient(vectors: Vectors, mode: Any) -> None:
    given, dtype = vectors.meta["hyperparameters"], getattr(torch, vectors.meta["dtype"])
    logits = vectors.tensor("logits", dtype).requires_grad_()
    reference, labels = vectors.tensor("ref_logits", dtype), vectors.tensor("labels")
    loss = anchored_loss(
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        reference[:, :-1].flatten(0, 1),
        mode,
        given["kl_weight"],
        given["ignore_index"],
    )
    loss.backward()
    name = mode.replace("+", "_")
    same(vectors, f"loss_{name}", loss)
    same(vectors, f"grad_{name}", logits.grad)


@pytest.mark.vectors("optim", "gere")
def test_gere_gives_the_recorded_thresholds_losses_and_gradient(vectors: Vectors) -> None:
    given, dtype = vectors.meta["hyperparameters"], getattr(torch, vectors.meta["dtype"])
    mean, deviation = gere.statistics(vectors.tensor("flat_states", dtype))
    same(vectors, "stat_mean", mean)
    same(vectors, "stat_std", deviation)
    states = vectors.tensor("pred_hidden", dtype).requires_grad_()
    low, high = mean - given["k_std"] * deviation, mean + given["k_std"] * deviation
    mask = vectors.tensor("attention_mask")
    margin = gere.margin_loss(states, vectors.tensor("base_hidden", dtype), low, high, mask)
    margin.backward()
    same(vectors, "margin_loss", margin)
    same(vectors, "margin_grad", states.grad)
    logits, labels = vectors.tensor("logits", dtype), vectors.tensor("labels")
    same(vectors, "ce_loss", gere.token_cross_entropy(logits[:, :-1], labels[:, 1:]))


@pytest.mark.vectors("optim", "atlas")
@pytest.mark.parametrize("granularity", ["block", "scalar"])
def test_atlas_gives_the_recorded_outputs_and_gradients(vectors: Vectors, granularity: str) -> None:
    dtype, names = getattr(torch, vectors.meta["dtype"]), vectors.meta["hyperparameters"]["blocks"]
    shapes = [vectors[f"p_{index}"].shape for index in range(len(names))]
    model = nn.Sequential(
        nn.Linear(shapes[0][1], shapes[0][0]), nn.Tanh(), nn.Linear(shapes[2][1], shapes[2][0])
    ).to(dtype)
    assert [name for name, _ in model.named_parameters()] == names
    model.load_state_dict({name: vectors.tensor(f"p_{i}", dtype) for i, name in enumerate(names)})
    given = vectors.tensor(f"coef_{granularity}", dtype)
    task_vectors = [
        {name: vectors.tensor(f"tv{k}_{i}", dtype) for i, name in enumerate(names)} for k in range(len(given))
    ]
    composition = atlas.Composition(model, task_vectors, granularity)
    with torch.no_grad():
        composition.coefficients.copy_(given)
    outputs = composition(vectors.tensor("x", dtype))
    loss = nn.functional.cross_entropy(outputs, vectors.tensor("y"))
    loss.backward()
    same(vectors, f"out_{granularity}", outputs)
    same(vectors, f"loss_{granularity}", loss)
    same(vectors, f"grad_{granularity}", composition.coefficients.grad)
    same(vectors, f"lp1_reg_{granularity}", atlas.penalty(composition.coefficients, p=1, gamma=0.5))


@pytest.mark.vectors("optim", "noprop")
def test_noprop_gives_the_recorded_schedule_losses_and_chain(vectors: Vectors) -> None:
    given, dtype = vectors.meta["hyperparameters"], getattr(torch, vectors.meta["dtype"])
    bars = noprop.cosine_schedule(given["T"], given["cosine_s"], *given["clip"])
    a, b, c = noprop.coefficients(bars)
    for name, value in {
        "alpha_bar": bars,
        "alpha": noprop.alphas(bars),
        "snr": noprop.snr(bars),
        "a": a,
        "b": b,
        "c": c,
    }.items():
        same(vectors, name, value)
    embedding, noise = vectors.tensor("W_embed", dtype), vectors.tensor("eps", dtype)
    clean, logits = embedding[vectors.tensor("y")], vectors.tensor("block_logits", dtype)
    predicted = noprop.embedded(logits, embedding)
    same(vectors, "u_hat", predicted)
    same(vectors, "z_in", torch.stack([noprop.noisy(clean, bars[t], noise[t]) for t in range(given["T"])]))
    losses = [
        noprop.distance_loss(predicted[t - 1], clean, t, bars, given["eta"]) for t in range(1, given["T"] + 1)
    ]
    same(vectors, "l2_loss", torch.stack(losses))
    same(vectors, "kl", noprop.kl_loss(clean, bars[0]))
    z, path = vectors.tensor("z0", dtype), [vectors.tensor("z0", dtype)]
    for index, drawn in enumerate(vectors.tensor("infer_noise", dtype)):
        z = noprop.chain_step(predicted[index], z, drawn, a[index], b[index], c[index])
        path.append(z)
    same(vectors, "z_traj", torch.stack(path))
