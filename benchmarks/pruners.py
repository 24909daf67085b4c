"""Time to prune single layers: our SparseGPT and Wanda beside llm-compressor's.

    python benchmarks/pruners.py --peer PYTHON [--shapes 576x576,1536x576] [--threads 1] [--rounds 3] [--json FILE]

PYTHON is the interpreter of an environment that holds ``llmcompressor``; without it nothing is measured. Both prune the
same weights, [out, in] in float32, by the same statistics of the same 2,048 inputs, to half of the weights and to 2:4;
shapes are those of SmolLM2-135M unless given. Rounds alternate, each in a process of its own that takes the least CPU
seconds of several repetitions; figures are medians over rounds, in layers per second. It fails where the two prune to
different weights. ``against_llmcompressor.py`` has whole models, calibration included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from against_llmcompressor import has_peer
from common import Figure, parser, report

SHAPES = "576x576,1536x576,576x1536"
SPARSITY, TOKENS, SEQUENCES, REPETITIONS = 0.5, 2048, 4, 5


def main() -> int:
    """Measure, print, and return 1 when ours is slower than the peer."""
    options = parser(__doc__ or "", rounds=3)
    options.add_argument("--peer", type=Path, help="interpreter of the environment that holds llmcompressor")
    options.add_argument("--shapes", default=SHAPES, help="outputs x inputs of the layers")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--run", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run:
        print(json.dumps(measure(given.run, given.shapes.split(","), given.threads)))
        return 0
    if given.peer is None or not has_peer(given.peer):
        print("skipped: name with --peer the interpreter of an environment that holds llmcompressor")
        return 0
    found: dict[str, list[dict[str, list[float]]]] = {"ours": [], "peer": []}
    for _ in range(given.rounds):
        for side, python in (("ours", sys.executable), ("peer", given.peer)):
            command = [str(python), __file__, "--run", side, "--shapes", given.shapes]
            threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
            done = subprocess.run(
                [*command, "--threads", str(given.threads)],
                capture_output=True,
                text=True,
                env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""},
            )
            if done.returncode:
                raise SystemExit(f"{side}:\n{done.stderr[-2000:]}")
            found[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
    figures = []
    for what in found["ours"][0]:
        (ours, weight), (theirs, peer_weight) = (
            (statistics.median(run[what][0] for run in runs), runs[0][what][1]) for runs in found.values()
        )
        if abs(weight - peer_weight) > 1e-4 * peer_weight:
            raise SystemExit(f"{what}: sums of magnitudes differ, {weight} and the peer's {peer_weight}")
        figures.append(Figure(what, 1 / ours, 1 / theirs, 1.0, "layers/s"))
    return report(figures, given.json)


def measure(side: str, shapes: list[str], threads: int) -> dict[str, list[float]]:
    """Return the least CPU seconds, and the sum of magnitudes that are left, of every method, pattern and shape."""
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    prune = (ours if side == "ours" else peer)()
    found = {}
    for shape in shapes:
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        x = torch.randn(TOKENS, columns, generator=generator) * torch.rand(columns, generator=generator)
        hessian, scaler = 2 / SEQUENCES * x.T @ x, x.square().sum(0) / SEQUENCES
        for method in ("sparsegpt", "wanda"):
            for pattern in ("unstructured", "2:4"):
                seconds = []
                for _ in range(REPETITIONS):
                    statistic = (hessian if method == "sparsegpt" else scaler).clone()
                    start = time.process_time()
                    pruned = prune(method, weight, statistic, pattern)
                    seconds.append(time.process_time() - start)
                magnitude = float(pruned.double().abs().sum())
                found[f"{method}, {pattern}, {shape}"] = [min(seconds), magnitude]
    return found


def ours() -> Callable[..., Any]:
    """Return what prunes one weight with our implementation, given its statistic."""
    from methodbench_sparse.sparsegpt import sparsegpt
    from methodbench_sparse.wanda import Wanda

    def prune(method: str, weight: Any, statistic: Any, pattern: str) -> Any:
        if method == "sparsegpt":
            return sparsegpt(weight, statistic, sparsity=SPARSITY, pattern=pattern).weight
        return weight.masked_fill(Wanda(sparsity=SPARSITY, pattern=pattern).mask(weight, statistic), 0)

    return prune


def peer() -> Callable[..., Any]:
    """Return what prunes one weight with llm-compressor, given its statistic."""
    import torch
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    @torch.no_grad()
    def prune(method: str, weight: Any, statistic: Any, pattern: str) -> Any:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        zeros, group = (0, 0) if pattern == "unstructured" else map(int, pattern.split(":"))
        if method == "wanda":
            return wanda_sparsify.sparsify_weight(linear, {linear: statistic}, SPARSITY, zeros, group)
        # The block size, damping and mask that are its defaults, and ours.
        more = (128, 0.01, False)
        return sgpt_sparsify.sparsify_weight(linear, {linear: statistic}, SPARSITY, zeros, group, *more)[1]

    return prune


if __name__ == "__main__":
    sys.exit(main())
