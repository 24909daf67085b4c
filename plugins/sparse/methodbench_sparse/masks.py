"""What the weight pruners share: patterns, masks of the lowest scores, and the count of zeros that goes on
record.

A mask is boolean, shaped like the scores [rows, columns], and True where the weight goes. Columns are input
features: a group of N:M sparsity is M consecutive inputs of one output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.compressed import WeightFormat
from methodbench.torchkit.model import LoadedModel, set_weight
from methodbench.torchkit.packed import PackedLayer

#: Accepted by the pattern fields of the pruners; :func:`parse_pattern` reads it.
PATTERN = r"^(unstructured|[1-9][0-9]*:[1-9][0-9]*)$"

#: Up to this size of a group, counting the smaller entries is faster than sorting (three times at 4).
COUNTED_GROUP = 16

#: What the field that says how pruned weights are stored is described as.
WEIGHTS = (
    "how the result is stored: dense, with its zeros; bitmask, one bit a weight and the others; "
    "nm, the kept ones of every group of the pattern and their places"
)

DENOMINATOR = "weights of the Linears inside the blocks; embeddings, norms, biases and head excluded"


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (zeros, group) of an N:M pattern, None for ``"unstructured"``.

    N is the number of zeros in every M, as in the reference of Wanda; where the field counts the kept ones,
    2:4 and 4:8 mean the same.
    """
    if pattern == "unstructured":
        return None
    zeros, group = (int(part) for part in pattern.split(":"))
    return zeros, group


def check_pattern(pattern: str, sparsity: float, weights: WeightFormat = "dense") -> None:
    """Raise ValueError unless ``sparsity`` is what ``pattern`` implies, and the format of the weights knows it."""
    nm = parse_pattern(pattern)
    if nm is None:
        if weights == "nm":
            raise ValueError("weights nm needs a pattern such as 2:4; without one there is weights bitmask")
        return
    zeros, group = nm
    if zeros >= group:
        raise ValueError(f"pattern {pattern} zeroes whole groups: the first number must be below the second")
    if abs(sparsity - zeros / group) > 1e-9:
        raise ValueError(
            f"pattern {pattern} zeroes {zeros} of {group}: sparsity is {zeros / group:g}, not {sparsity:g}"
        )


def weight_matrix(linear: nn.Module) -> Tensor:
    """Return the weight of a Linear or a convolution as [out, in], the kernel's taps counted as inputs.

    Raises:
        NotApplicableError: the layer is stored in a packed form.
    """
    if isinstance(linear, PackedLayer):
        raise NotApplicableError(
            f"a layer [{linear.out_features}, {linear.in_features}] is {linear.done} already ({linear.summary})",
            "Prune the dense model; the last pruner of a chain alone may compress what it stores.",
        )
    weight = linear.get_parameter("weight").detach()
    return weight.flatten(1)


def nm_mask(scores: Tensor, zeros: int, group: int) -> Tensor:
    """Mask the ``zeros`` lowest scores in every ``group`` consecutive columns of a row; ties go to the
    lower column.

    A last group that is shorter loses as many. Scores [rows, columns] are compared in float32.
    """
    rows, columns = scores.shape
    padded = F.pad(scores.float(), (0, -columns % group), value=float("inf")).view(-1, group)
    if group <= COUNTED_GROUP:
        mask = (_ranks(padded) < zeros).T
    else:
        lowest = padded.sort(dim=-1, stable=True).indices[..., :zeros]
        mask = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, lowest, True)
    return mask.reshape(rows, -1)[:, :columns]


#: Scores that are selected from at a time.
_SELECTED = 1 << 22


def _ranks(groups: Tensor) -> Tensor:
    """Return how many entries of its group come before each in a stable sort, uint8 [group, groups]; NaN is infinity.

    Args:
        groups: [groups, group].
    """
    lanes = groups.T.contiguous().nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    ranks = torch.zeros_like(lanes, dtype=torch.uint8)
    for k in range(1, len(lanes)):
        before = (lanes[:k] <= lanes[k]).view(torch.uint8)
        ranks[k] += before.sum(0, dtype=torch.uint8)
        ranks[:k] += 1 - before
    return ranks


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Mask the ``int(columns * sparsity)`` lowest scores of every row; ties go to the lower column, NaN comes last."""
    count = int(scores.shape[1] * sparsity)
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Some rows at a time: selecting takes copies of scores and places.
    return torch.cat([_lowest(some, count) for some in scores.split(max(1, _SELECTED // scores.shape[1]))])


def _lowest(scores: Tensor, count: int) -> Tensor:
    mask = scores <= scores.kthvalue(count, dim=-1, keepdim=True).values
    # Only where scores are equal at the cut, or not numbers, does their order need sorting.
    (unclear,) = torch.where(mask.sum(-1) != count)
    if len(unclear):
        lowest = scores[unclear].sort(dim=-1, stable=True).indices[:, :count]
        mask[unclear] = torch.zeros_like(mask[unclear]).scatter_(-1, lowest, True)
    return mask


def apply_mask(linear: nn.Module, mask: Tensor) -> None:
    """Zero the weights in ``mask`` [out, in] (see :func:`weight_matrix`); the kept ones stay bit for bit."""
    weight = linear.get_parameter("weight")
    set_weight(linear, weight.masked_fill(mask.view_as(weight), 0))


def check_groups(name: str, columns: int, group: int) -> None:
    """Raise NotApplicableError where the inputs of a Linear do not divide into groups."""
    if columns % group:
        raise NotApplicableError(
            f"{name} has {columns} inputs, which do not divide into groups of {group}",
            "Choose a group size that divides the widths of the model, or pattern=unstructured.",
        )


def record_zeros(model: LoadedModel) -> LoadedModel:
    """Mark ``model`` as pruned by masks on dense weights and put the measured zeros into its facts."""
    zeros, total, shares = 0, 0, []
    for linear in model.adapter.targets(model.module).values():
        weight = weight_matrix(linear)
        count = weight.numel() - int(torch.count_nonzero(weight))
        zeros, total = zeros + count, total + weight.numel()
        shares.append(count / weight.numel())
    if not shares:
        raise NotApplicableError(
            f"{model.name} has no Linear inside its blocks, so there is nothing to prune"
        )
    model.storage = "simulated"
    model.facts |= {
        "zeros_share": zeros / total,
        "zeros_share_min": min(shares),
        "zeros_share_max": max(shares),
        "zeros_denominator": DENOMINATOR,
    }
    return model
