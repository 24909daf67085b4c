"""Second-order compensation: replace a column of a weight, and spread its error over the columns that follow.

What GPTQ, SparseGPT and their kin share. The output error of a Linear on calibration inputs X grows by
``dw H dw^T / 2`` with ``H = 2 X^T X``. With ``U`` upper triangular such that ``U^T U = H^-1``, the best answer to
column j becoming q_j is (optimal brain surgeon, in a fixed order of columns)::

    e_j = (w_j - q_j) / U_jj;  w_k <- w_k - e_j U_jk  for every k > j
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from methodbench.errors import DivergedError
from methodbench.torchkit.quantizers import finite
from methodbench.torchkit.sequential import BlockStep, Observer

#: Columns whose mutual updates are applied one by one; wider updates are matrix products.
PANEL = 32


@dataclass(slots=True)
class Hessian:
    """``2 / n * sum of x^T x`` over ``n`` calibration sequences, fp32 [in, in]; see :func:`add_batch`."""

    matrix: Tensor
    sequences: int = 0
    tokens: int = 0


def add_batch(hessian: Hessian, x: Tensor) -> None:
    """Take a batch of inputs into the mean, in place (authors' ``add_batch``).

    Args:
        x: [sequences, tokens, in], or [tokens, in] for one sequence; counted by sequences, not by tokens.
    """
    new = 1 if x.ndim == 2 else x.shape[0]
    flat = x.reshape(-1, x.shape[-1]).float()
    total = hessian.sequences + new
    hessian.matrix.addmm_(flat.T, flat, beta=hessian.sequences / total, alpha=2 / total)
    hessian.sequences = total
    hessian.tokens += flat.shape[0]


def observe_hessians(step: BlockStep, names: Iterable[str]) -> list[tuple[list[str], Hessian]]:
    """Run the block once and return the Hessian of every layer's inputs, shared where layers read one tensor.

    Returns:
        Pairs of layer names and their Hessian, in the order of ``names``; a layer that no token reached (an
        expert) has one with ``tokens`` 0.
    """
    hessians: dict[str, Hessian] = {}
    leaders: dict[str, str] = {}
    latest: tuple[Tensor, str] | None = None

    def observer(name: str) -> Observer:
        def observe(x: Tensor) -> None:
            nonlocal latest
            leader = latest[1] if latest is not None and _same_tensor(latest[0], x) else name
            if leaders.setdefault(name, leader) != leader:
                raise RuntimeError(f"{step.name}.{name} shares its input with others in some batches only")
            if leader == name:
                latest = (x, name)
                if name not in hessians:
                    hessians[name] = Hessian(x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float32))
                add_batch(hessians[name], x)

        return observe

    names = list(names)
    step.forward({name: observer(name) for name in names})
    shared: dict[str, list[str]] = {}
    for name in names:
        shared.setdefault(leaders.get(name, name), []).append(name)
    for leader in shared.keys() - hessians.keys():
        weight = step.block.get_submodule(leader).get_parameter("weight")
        width = weight[0].numel()
        hessians[leader] = Hessian(torch.zeros(width, width, device=weight.device))
    return [(group, hessians[leader]) for leader, group in shared.items()]


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a._version == b._version


def inverse_factor(
    hessian: Tensor, percdamp: float, name: str = "the layer", *, dead: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return ``U``, upper triangular with ``U^T U = (H + damping)^-1``, and the damping that was needed.

    With ``J`` the reversal of rows, ``J H J = L L^T`` gives ``U = (J L J)^-1``: one factorization and no
    inverse of ``H``, the same ``U`` as the authors' Cholesky factor of the inverse. Damping is raised
    tenfold, up to 1, while the factorization fails. Two matrices of the size of ``H`` are made, ``U`` one of them.

    Args:
        hessian: fp32 [n, n], symmetric; left as it is.
        percdamp: damping as a share of the mean of the diagonal.
        dead: boolean [n], inputs that were always zero: their diagonal counts as 1. Without it the diagonal must be
            positive.

    Raises:
        DivergedError: NaN or infinity in ``hessian``, or no damping up to the mean of the diagonal helps.
    """
    if not finite(hessian):
        raise DivergedError(f"calibration activations that enter {name} hold NaN or infinity")
    diagonal = hessian.diagonal() if dead is None else hessian.diagonal().masked_fill(dead, 1.0)
    mean = diagonal.mean()
    damping = percdamp
    while True:
        # LAPACK works on columns in place: by columns, neither the factor nor the solution is copied.
        lower = hessian.flip(0, 1).mT
        lower.diagonal().copy_(diagonal.flip(0) + damping * mean)
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed):
            upper = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).mT
            torch.linalg.solve_triangular(lower, upper, upper=False, out=upper)
            _reverse(upper.mT.view(-1))
            return upper, damping
        if damping >= 1:
            raise DivergedError(
                f"the Hessian of {name} is not positive definite, even damped by its mean diagonal",
                "Calibrate with more or other inputs.",
            )
        damping = min(1.0, 10 * damping)


def _reverse(values: Tensor, step: int = 1 << 20) -> None:
    """Reverse ``values`` [n] in place; of a matrix that lies in one piece, that reverses its rows and its columns."""
    half = len(values) // 2
    for start in range(0, half, step):
        stop = min(start + step, half)
        front, back = values[start:stop], values[len(values) - stop : len(values) - start]
        ahead = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(ahead)


def compensate(
    columns: Tensor,
    upper: Tensor,
    blocksize: int,
    replace: Callable[[int, Tensor], Tensor],
    *,
    enter: Callable[[int, Tensor], None] = lambda start, block: None,
    panel: int = PANEL,
) -> float:
    """Replace one column after another, and spread the error of each over those that follow, in place.

    Updates are applied within a panel at once, to the rest of a block at the end of the panel, and to the rest of the
    weight at the end of the block, which changes nothing but rounding.

    Args:
        columns: the weight transposed, fp32 [columns, rows], contiguous. Rows of a block that is done are left as they
            were when it was entered: what replaced them is for ``replace`` to keep.
        upper: U [columns, columns] of :func:`inverse_factor`.
        blocksize: columns of a block.
        replace: called with j and the columns of the panel from j on, [1 and more, rows], as the replacements before
            j have left them; returns what column j becomes [rows].
        enter: called with the first column of a block and the block [at most blocksize, rows], before any is replaced.
        panel: columns of a panel.

    Returns:
        The sum of all ``e_j^2 / 2``.
    """
    pivots = upper.diagonal().tolist()
    loss = 0.0
    for start in range(0, len(columns), blocksize):
        stop = min(start + blocksize, len(columns))
        block = columns[start:stop].clone()
        enter(start, block)
        errors = torch.empty_like(block)
        for left in range(start, stop, panel):
            right = min(left + panel, stop)
            for j in range(left, right):
                ahead = block[j - start : right - start]
                error = errors[j - start]
                torch.sub(ahead[0], replace(j, ahead), out=error)
                error.div_(pivots[j])
                ahead[1:].addr_(upper[j, j + 1 : right], error, alpha=-1)
            block[right - start :].addmm_(
                upper[left:right, right:stop].T, errors[left - start : right - start], alpha=-1
            )
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        loss += float(errors.square().sum()) / 2
    return loss
