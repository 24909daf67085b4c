"""The quantities of the small-scale proxies against a reference implementation in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methodbench.testing.parity import Vectors
from methodbench_optim.workloads.decoder import attention_logits, token_loss, z_loss
from methodbench_optim.workloads.proxies import lr_sensitivity, rate_at

pytestmark = pytest.mark.vectors("optim", "small_scale_proxies")


def close(actual: object, vectors: Vectors, name: str) -> None:
    np.testing.assert_allclose(actual, vectors[name], rtol=0, atol=vectors.meta["tolerance"])


def test_sensitivity_of_the_recorded_losses(vectors: Vectors) -> None:
    at_start = vectors.meta["hyperparameters"]["loss_at_init"]
    close(lr_sensitivity(vectors["losses"], at_start), vectors, "lr_sensitivity")


def test_cross_entropy_and_z_loss(vectors: Vectors) -> None:
    coefficient = vectors.meta["hyperparameters"]["z_coef"]
    logits, labels = vectors.tensor("logits"), vectors.tensor("labels")
    close(token_loss(logits, labels).item(), vectors, "ce")
    close(coefficient * z_loss(logits).item(), vectors, "z_loss")
    whole = token_loss(logits, labels, z=coefficient).item()
    np.testing.assert_allclose(
        whole, vectors["ce"] + vectors["z_loss"], rtol=0, atol=vectors.meta["tolerance"]
    )


def test_attention_logits_of_normalized_queries_and_keys(vectors: Vectors) -> None:
    q, k, q_scale, k_scale = (vectors.tensor(name) for name in ("q", "k", "q_scale", "k_scale"))
    logits = attention_logits(q, k, q_scale, k_scale, eps=vectors.meta["hyperparameters"]["ln_eps"])
    assert logits.dtype == getattr(torch, vectors.meta["dtype"])
    close(logits.numpy(), vectors, "attn_logits")


def test_schedule(vectors: Vectors) -> None:
    given = vectors.meta["hyperparameters"]["schedule"]
    rates = [
        rate_at(step, given["steps"], given["warmup"], given["peak"], given["min"])
        for step in range(len(vectors["schedule"]))
    ]
    close(rates, vectors, "schedule")
