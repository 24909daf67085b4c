"""AP against the authors' code: masks of both steps, over cycles with rewinding."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from methodbench.testing.parity import Vectors
from methodbench_sparse.ap import AP, Masked, occurrences, prune_smallest, prune_unmoved_negatives

pytestmark = pytest.mark.vectors("sparse", "ap")


class Toy(nn.Module):
    """The parameters of the vectors under their names, in their order."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            owner, leaf = name.split(".")
            if not hasattr(self, owner):
                self.add_module(owner, nn.Module())
            self.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))


def named(vectors: Vectors, prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): vectors.tensor(key)
        for key in vectors
        if key.startswith(prefix) and "running" not in key
    }


def test_masks_equal_the_reference_over_all_cycles(vectors: Vectors) -> None:
    hyper = vectors.meta["hyper"]
    method = AP(base=hyper["base_percent"], ap=hyper["ap_percent"], count_biases=True)
    model = Masked(Toy(named(vectors, "init_")), method, seed=0)
    counts = occurrences(model.model, model.weights())
    cycles = sorted({int(match[1]) for key in vectors if (match := re.match(r"c(\d+)_", key))})
    for cycle in cycles:
        start, trained = (
            {name: values[name] for name in model.masks}
            for values in (named(vectors, f"c{cycle}_prev_"), named(vectors, f"c{cycle}_trained_"))
        )
        if cycle > cycles[0]:
            for name, weight in start.items():
                assert torch.equal(model.start[name], weight), f"cycle {cycle} begins at {name}"
        masks, number = prune_smallest(trained, model.masks, method.base, method.ap, counts)
        assert number == int(vectors[f"c{cycle}_num_ap"])
        for name, mask in masks.items():
            assert torch.equal(mask, vectors.tensor(f"c{cycle}_mask_lt_{name}", mask.dtype)), (
                f"{cycle} {name}"
            )
        masks = prune_unmoved_negatives(trained, start, masks, number, counts)
        for name, mask in masks.items():
            assert torch.equal(mask, vectors.tensor(f"c{cycle}_mask_ap_{name}", mask.dtype)), (
                f"{cycle} {name}"
            )
        with torch.no_grad():
            model.begin(masks, "rewind")
