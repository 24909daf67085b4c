"""Sparse matrix-vector products: reading active columns alone beside the dense product of the same inputs.

    python benchmarks/sparse_gemv.py [--shapes 4096x4096,11008x4096,4096x11008] [--rounds 7] [--json FILE]

Shapes are out x in, by default those of a Llama of 7 billion parameters. Every pass goes through several weights and
draws new masks, so that neither sits in cache; dense and sparse passes alternate. The first figure of a shape is its
crossover: the sparsity from which reading less is faster, by linear interpolation; figures at 50 % have a limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Figure, alternate, parser, report
from torch import Tensor
from torch.nn import functional as F

from methodbench.torchkit.sparse_gemv import choose, column_blocks, gather_gemv

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65, 0.8)
LIMIT_AT_HALF = 1.3
#: Bytes of weights that a pass goes through at least: several times a large cache.
ROTATED = 256 * 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def crossover(sparsities: Sequence[float], gains: Sequence[float]) -> float | None:
    """Return the sparsity at which the gain passes 1 for good, linear between neighbours; None where it does not."""
    if gains[-1] < 1:
        return None
    last = max((index for index, gain in enumerate(gains) if gain < 1), default=-1)
    if last < 0:
        return sparsities[0]
    low, high = gains[last], gains[last + 1]
    return sparsities[last] + (1 - low) / (high - low) * (sparsities[last + 1] - sparsities[last])


@torch.no_grad()
def gains(out: int, width: int, dtype: torch.dtype, rounds: int) -> tuple[int, list[tuple[float, float]]]:
    """Return the block width that was chosen, and (dense, sparse) products per second at each sparsity."""
    size = out * width * dtype.itemsize
    count = max(2, -(-ROTATED // size))
    draw = torch.Generator().manual_seed(0)
    weights = [(torch.randn(out, width, generator=draw) / width**0.5).to(dtype) for _ in range(count)]
    block = choose(weights, 0.5, rounds=3).block or out
    tables = [column_blocks(weight, block) for weight in weights]
    inputs = [torch.randn(width, generator=draw).to(dtype) for _ in weights]
    found = []
    for sparsity in SPARSITIES:

        def masked(
            run: Callable[[Tensor, Tensor, int], Any], sparsity: float = sparsity
        ) -> Callable[[], None]:
            def go() -> None:
                for index, x in enumerate(inputs):
                    run(x, torch.rand(width) >= sparsity, index)

            return go

        seconds = alternate(
            {
                "dense": masked(lambda x, m, index: F.linear(x * m, weights[index])),
                "sparse": masked(lambda x, m, index: gather_gemv(tables[index], x, m)),
            },
            rounds,
        )
        found.append((count / seconds["dense"], count / seconds["sparse"]))
    return block, found


def main() -> int:
    """Measure, print, and return 1 where the gain at 50 % is below the limit."""
    options = parser(__doc__ or "", rounds=7)
    options.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008")
    options.add_argument("--dtypes", default="float32,bfloat16")
    given = options.parse_args()
    figures = []
    for dtype in given.dtypes.split(","):
        for shape in given.shapes.split(","):
            out, width = (int(part) for part in shape.split("x"))
            block, found = gains(out, width, DTYPES[dtype], given.rounds)
            at = crossover(SPARSITIES, [sparse / dense for dense, sparse in found])
            told = "none up to 80 %" if at is None else f"{at:.0%}"
            print(f"{shape} {dtype}: blocks of {block}, crossover {told}, {torch.get_num_threads()} threads")
            for sparsity, (dense, sparse) in zip(SPARSITIES, found, strict=True):
                limit = LIMIT_AT_HALF if sparsity == 0.5 else 0.0
                figures.append(Figure(f"{shape} {dtype} {sparsity:.0%}", sparse, dense, limit, "products/s"))
    return report(figures, given.json)


if __name__ == "__main__":
    sys.exit(main())
