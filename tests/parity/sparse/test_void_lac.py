"""L2 adaptive computation against the authors' hooks: a prompt and a single token, at each alpha of the vector."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors, stated_by
from methodbench_sparse.void_lac import VoidLAC, watch

pytestmark = pytest.mark.vectors("sparse", "void_lac")


class ToyBlock(nn.Module):
    """The block that ``meta["toy"]`` describes: y = x + tanh(x A^T) + g x."""

    def __init__(self, a: Tensor, g: Tensor) -> None:
        super().__init__()
        self.a, self.g = a, g

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.a.T) + self.g * x


@pytest.mark.parametrize("inputs", ["prompt", "token"])
def test_voids_and_final_states_equal_the_reference_at_every_alpha(vectors: Vectors, inputs: str) -> None:
    text = vectors.meta["tolerance"]
    rtol, near = stated_by(text, r"rtol ([\d.e-]+)"), stated_by(text, r"within ([\d.e-]+) of theta")
    for place, alpha in enumerate(vectors.meta["hyper"]["alphas"]):
        blocks: list[nn.Module] = [
            ToyBlock(a, g) for a, g in zip(vectors.tensor("A"), vectors.tensor("g"), strict=True)
        ]
        x = vectors.tensor(f"x_{inputs}")
        stream = watch(blocks, VoidLAC(alpha=alpha).alpha, "final-state")
        final = nn.Sequential(*blocks)(x)
        deltas, active = torch.cat(stream.deltas), torch.cat(stream.active)
        expected = vectors.tensor(f"{inputs}_{place}_delta")
        norms = vectors.tensor(f"{inputs}_{place}_norms")
        # Norms are compared with one another, so what rounding makes of their differences is on their scale.
        torch.testing.assert_close(deltas, expected, rtol=rtol, atol=rtol * float(norms.max()))
        theirs = vectors.tensor(f"{inputs}_{place}_active").bool()
        thresholds = torch.stack([
            alpha * (expected[:at].amax(0) - expected[:at].amin(0)) if at else torch.zeros_like(expected[0])
            for at in range(len(expected))
        ])  # fmt: skip
        tied = (expected - thresholds).abs() <= near
        assert bool(((active == theirs) | tied).all()), (inputs, alpha)
        same = ((active == theirs) | ~tied).all(0) & (active == theirs).all(0)
        assert bool(same.any())
        torch.testing.assert_close(
            final[0][same], vectors.tensor(f"{inputs}_{place}_final")[same], rtol=rtol, atol=rtol
        )
