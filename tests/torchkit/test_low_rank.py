"""Low-rank updates: nothing at first, trained apart from the weights, merged without a trace."""

from __future__ import annotations

import torch
from torch import nn

from methodbench.torchkit.low_rank import LowRankUpdate, merge_updates


def test_an_update_begins_as_nothing_and_merges_into_the_weight() -> None:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).requires_grad_(False)
    x = torch.randn(2, 7, 6)
    before, shared = root(x), root[0].weight
    updates = {}
    for name in ("0", "1"):
        updates[name] = LowRankUpdate(root.get_submodule(name), 2, torch.Generator().manual_seed(1))
        root[int(name)] = updates[name]
    assert torch.equal(root(x), before)
    for update in updates.values():
        update.up.data.normal_()
    trained = [name for name, parameter in root.named_parameters() if parameter.requires_grad]
    assert trained == ["0.down", "0.up", "1.down", "1.up"]
    updated = root(x)
    assert not torch.allclose(updated, before)
    merge_updates(root, updates)
    assert all(isinstance(layer, nn.Linear) for layer in root)
    torch.testing.assert_close(root(x), updated)
    assert root[0].weight is not shared
    assert torch.equal(shared, updates["0"].linear.weight) is False


def test_the_dtype_of_the_layer_stays() -> None:
    linear = nn.Linear(4, 4).to(torch.bfloat16)
    update = LowRankUpdate(linear, 1, torch.Generator().manual_seed(0))
    assert update(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert update.down.dtype == torch.float32
