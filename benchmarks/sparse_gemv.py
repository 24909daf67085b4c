"""Sparse matrix-vector products: reading active columns alone beside the dense product of the same inputs.

    python benchmarks/sparse_gemv.py [--shapes 4096x4096,11008x4096,4096x11008] [--dtypes float32,bfloat16]
        [--threads 1,2] [--sparsities 0,0.25,0.4,0.5,0.65,0.8] [--way choose|gather|stream] [--clock wall|cpu]
        [--rounds 7] [--json FILE]

Shapes are out x in, by default those of a Llama of 7 billion parameters. Every pass goes through several weights and
draws new masks, so that neither sits in cache; dense and sparse passes alternate. The first figure of a shape is its
crossover: the sparsity from which reading less is faster, by linear interpolation; figures at 50 % have a limit. Beside
it stand the bytes of weights that dense and sparse product read per second at the highest sparsity. The clock ``cpu``
counts the processor's time of one thread, for a machine that others use as well.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Figure, alternate, parser, report
from torch import Tensor
from torch.nn import functional as F

from methodbench.torchkit.kernels.native import native
from methodbench.torchkit.sparse_gemv import Choice, choose, column_blocks, gather_gemv

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65, 0.8)
LIMIT_AT_HALF = 1.3
#: Bytes of weights that a pass goes through at least: more than the largest caches of servers hold.
ROTATED = 2**30
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
def gains(
    out: int, width: int, dtype: torch.dtype, sparsities: Sequence[float], rounds: int, way: str, clock: str
) -> tuple[str, list[tuple[float, float]]]:
    """Return the way that was taken, and (dense, sparse) products per second at each sparsity."""
    size = out * width * dtype.itemsize
    count = max(2, -(-ROTATED // size))
    draw = torch.Generator().manual_seed(0)
    # The values do not matter to the time, so that one draw serves all weights.
    first = (torch.randn(out, width, generator=draw) / width**0.5).to(dtype)
    weights = [first.clone() for _ in range(count)]
    choice = {"gather": Choice(out, 1.0), "stream": Choice(out, 1.0, True)}.get(way) or choose(
        weights, 0.5, rounds=3
    )
    block = choice.block or out
    tables = [column_blocks(weight, block) for weight in weights]
    code = native() if choice.streamed else None

    def product(index: int, x: Tensor, mask: Tensor) -> Tensor:
        if code is None:
            return gather_gemv(tables[index], x, mask)
        return code.columns(tables[index][0], x, mask)

    inputs = [torch.randn(width, generator=draw).to(dtype) for _ in weights]
    found = []
    for sparsity in sparsities:

        def masked(
            run: Callable[[int, Tensor, Tensor], Any], sparsity: float = sparsity
        ) -> Callable[[], None]:
            def go() -> None:
                for index, x in enumerate(inputs):
                    run(index, x, torch.rand(width) >= sparsity)

            return go

        seconds = alternate(
            {
                "dense": masked(lambda index, x, m: F.linear(x * m, weights[index])),
                "sparse": masked(product),
            },
            rounds,
            time.process_time if clock == "cpu" else time.perf_counter,
        )
        found.append((count / seconds["dense"], count / seconds["sparse"]))
    return "streamed" if code is not None else f"blocks of {block}", found


def main() -> int:
    """Measure, print, and return 1 where the gain at 50 % is below the limit."""
    options = parser(__doc__ or "", rounds=7)
    options.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008")
    options.add_argument("--dtypes", default="float32,bfloat16")
    options.add_argument("--threads", default=str(torch.get_num_threads()))
    options.add_argument("--sparsities", default="0,0.25,0.4,0.5,0.65,0.8")
    options.add_argument("--way", choices=("choose", "gather", "stream"), default="choose")
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    given = options.parse_args()
    sparsities = [float(part) for part in given.sparsities.split(",")]
    figures = []
    for threads in given.threads.split(","):
        torch.set_num_threads(int(threads))
        for dtype in given.dtypes.split(","):
            for shape in given.shapes.split(","):
                out, width = (int(part) for part in shape.split("x"))
                way, found = gains(
                    out, width, DTYPES[dtype], sparsities, given.rounds, given.way, given.clock
                )
                at = crossover(sparsities, [sparse / dense for dense, sparse in found])
                told = f"none up to {sparsities[-1]:.0%}" if at is None else f"{at:.0%}"
                size = out * width * DTYPES[dtype].itemsize / 1e9
                dense, sparse = found[-1]
                print(
                    f"{shape} {dtype}, {threads} threads: {way}, crossover {told}; at {sparsities[-1]:.0%} dense reads "
                    f"{dense * size:.1f} GB/s, sparse {sparse * size * (1 - sparsities[-1]):.1f} GB/s",
                    flush=True,
                )
                for sparsity, (dense, sparse) in zip(sparsities, found, strict=True):
                    limit = LIMIT_AT_HALF if sparsity == 0.5 else 0.0
                    name = f"{shape} {dtype} {threads}t {sparsity:.0%}"
                    figures.append(Figure(name, sparse, dense, limit, "products/s"))
    return report(figures, given.json)


if __name__ == "__main__":
    sys.exit(main())
