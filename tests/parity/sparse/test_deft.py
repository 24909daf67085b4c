"""DEFT against the authors' code: densities, the loss and its gradients."""

from __future__ import annotations

import pytest
import torch

from methodbench.testing.parity import Vectors, stated_by
from methodbench_sparse.deft import density_terms, exact_density

pytestmark = pytest.mark.vectors("sparse", "deft")


def test_densities_loss_and_gradients_equal_the_reference(vectors: Vectors) -> None:
    rtol, atol = (stated_by(vectors.meta["tolerance"], rf"{kind} ([\d.e-]+)") for kind in ("rtol", "atol"))
    layers = [layer.requires_grad_() for layer in vectors.tensor("acts")]
    terms = density_terms(layers, vectors.meta["hyper"]["eps"])
    torch.testing.assert_close(terms, vectors.tensor("D"), rtol=rtol, atol=atol)
    loss = terms.mean()
    torch.testing.assert_close(loss, vectors.tensor("loss"), rtol=rtol, atol=atol)
    gradients = torch.stack(torch.autograd.grad(loss, layers))
    expected = vectors.tensor("grads")
    largest = float(expected.abs().max())
    torch.testing.assert_close(gradients, expected, rtol=rtol, atol=rtol * largest)
    found = exact_density([layer.detach() for layer in layers])
    torch.testing.assert_close(
        found, vectors.tensor("exact_density"), rtol=rtol, atol=atol, check_dtype=False
    )
