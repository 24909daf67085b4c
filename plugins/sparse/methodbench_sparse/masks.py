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
from methodbench.torchkit.model import LoadedModel, set_weight

#: Accepted by the pattern fields of the pruners; :func:`parse_pattern` reads it.
PATTERN = r"^(unstructured|[1-9][0-9]*:[1-9][0-9]*)$"

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


def check_pattern(pattern: str, sparsity: float) -> None:
    """Raise ValueError unless ``sparsity`` is what ``pattern`` implies."""
    nm = parse_pattern(pattern)
    if nm is None:
        return
    zeros, group = nm
    if zeros >= group:
        raise ValueError(f"pattern {pattern} zeroes whole groups: the first number must be below the second")
    if abs(sparsity - zeros / group) > 1e-9:
        raise ValueError(
            f"pattern {pattern} zeroes {zeros} of {group}: sparsity is {zeros / group:g}, not {sparsity:g}"
        )


def weight_matrix(linear: nn.Module) -> Tensor:
    """Return the weight of a Linear or a convolution as [out, in], the kernel's taps counted as inputs."""
    weight = linear.get_parameter("weight").detach()
    return weight.flatten(1)


def nm_mask(scores: Tensor, zeros: int, group: int) -> Tensor:
    """Mask the ``zeros`` lowest scores in every ``group`` consecutive columns of a row; ties go to the
    lower column.

    A last group that is shorter loses as many. Scores [rows, columns] are compared in float32.
    """
    rows, columns = scores.shape
    padded = F.pad(scores.float(), (0, -columns % group), value=float("inf")).view(rows, -1, group)
    lowest = padded.sort(dim=-1, stable=True).indices[..., :zeros]
    mask = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, lowest, True)
    return mask.view(rows, -1)[:, :columns]


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Mask the ``int(columns * sparsity)`` lowest scores of every row; ties go to the lower column."""
    lowest = scores.sort(dim=-1, stable=True).indices[:, : int(scores.shape[1] * sparsity)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, lowest, True)


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
        weight = linear.get_parameter("weight")
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
