"""Own GPU kernels beside torch's, against memory bandwidth: packed and sparse products of one token, optimizer steps.

    python benchmarks/gpu_kernels.py [--parts packed sparse optimizers] [--json FILE]

Products are those of a Llama-2-7B-shaped block in half precision. Every timed round goes through so many copies of a
weight that none is still in the cache, and is replayed as a CUDA graph, so that times are those of kernels. Bandwidth
is measured by copying a gigabyte. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from methodbench.torchkit.kernels import graph_of
from methodbench.torchkit.packed import PackedLinear
from methodbench.torchkit.quantizers import quantize

SHAPES = {"attention": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)}
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65)
#: Bytes that push everything else out of the cache.
_ROUND = 400 << 20


def microseconds(step: Callable[[], Any], calls: int = 1, rounds: int = 20) -> float:
    """Return the median time of one of the ``calls`` that ``step`` makes, by events around a graph's replay."""
    graph = graph_of(step, warm_up=2)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def bandwidth() -> float:
    """Return bytes per second of a copy, read and written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (microseconds(lambda: target.copy_(source)) * 1e-6)


def copies(weight_bytes: int) -> int:
    return max(2, -(-_ROUND // weight_bytes))


def each(products: Sequence[Callable[[], Any]]) -> float:
    """Return microseconds per product."""

    def step() -> None:
        for product in products:
            product()

    return microseconds(step, len(products))


def packed() -> list[dict[str, Any]]:
    """Measure the products with packed weights of several widths beside the dense product."""
    from methodbench.torchkit.kernels.packed import candidates

    rows = []
    for name, (outputs, inputs) in SHAPES.items():
        x = torch.randn(1, inputs, device="cuda", dtype=torch.float16)
        count = copies(outputs * inputs * 2)
        weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.float16) for _ in range(count)]
        dense = each([partial(F.linear, x, w) for w in weights])
        for bits, dtype in (
            (4, torch.float16),
            (4, torch.bfloat16),
            (3, torch.float16),
            (2, torch.float16),
            (8, torch.float16),
        ):
            quantized = quantize(weights[0].float(), bits, group_size=128)
            count = copies(outputs * inputs * bits // 8)
            layers = [PackedLinear.from_quantized(quantized, dtype=dtype) for _ in range(count)]
            token = x.to(dtype)
            expected = layers[0].multiply(token).float()
            tried = {}
            for make in candidates(layers[0]):
                kernels = [make(layer) for layer in layers]
                y = kernels[0](token).float()
                error = float((y - expected).norm() / expected.norm())
                tried[kernels[0].name] = (each([partial(kernel, token) for kernel in kernels]), error)
            stored = sum(b.numel() * b.element_size() for b in layers[0].buffers())
            best = min(tried, key=lambda key: tried[key][0])
            rows.append(
                {
                    "layer": name,
                    "bits": bits,
                    "dtype": str(dtype).removeprefix("torch."),
                    "dense_us": dense,
                    "packed_us": tried[best][0],
                    "speedup": dense / tried[best][0],
                    "gb_per_second": stored / tried[best][0] / 1e3,
                    "kernel": best,
                    "relative_error": tried[best][1],
                    "tried_us": {key: round(value[0], 2) for key, value in tried.items()},
                    "worst_error": max(value[1] for value in tried.values()),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def sparse() -> list[dict[str, Any]]:
    """Measure the product with sparse activations beside the dense product."""
    from methodbench.torchkit.kernels.sparse_gemv import SHAPES as LAUNCHES
    from methodbench.torchkit.kernels.sparse_gemv import SparseGEMV

    rows = []
    for name, (outputs, inputs) in SHAPES.items():
        count = copies(outputs * inputs * 2)
        weights = [torch.randn(inputs, outputs, device="cuda", dtype=torch.float16) for _ in range(count)]
        plain = [weight.T.contiguous() for weight in weights]
        x = torch.randn(1, inputs, device="cuda", dtype=torch.float16)
        dense = each([partial(F.linear, x, w) for w in plain])
        for sparsity in SPARSITIES:
            # Every copy has a mask of its own: rows that one product loaded help no other.
            inputs_of = []
            for _ in weights:
                kept = torch.rand(1, inputs, device="cuda").argsort(-1) >= int(sparsity * inputs)
                inputs_of.append(torch.randn(1, inputs, device="cuda", dtype=torch.float16) * kept)
            expected = F.linear(inputs_of[0], plain[0]).float()
            tried = {}
            for launch in LAUNCHES:
                products = [SparseGEMV(weight, launch) for weight in weights]
                y = products[0](inputs_of[0]).float()
                error = float((y - expected).norm() / expected.norm())
                assert error < 5e-3, (launch, error)
                pairs = list(zip(products, inputs_of, strict=True))
                tried[str(launch)] = each([partial(product, token) for product, token in pairs])
            best = min(tried, key=lambda key: tried[key])
            promised = 1 / (1 - sparsity)
            rows.append(
                {
                    "layer": name,
                    "sparsity": sparsity,
                    "dense_us": dense,
                    "sparse_us": tried[best],
                    "speedup": dense / tried[best],
                    "promised": promised,
                    "share_of_promised": dense / tried[best] / promised,
                    "share_of_gain": (dense / tried[best] - 1) / (promised - 1) if sparsity else None,
                    "launch": best,
                    "tried_us": {key: round(value, 2) for key, value in tried.items()},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def optimizers(peak: float) -> list[dict[str, Any]]:
    """Measure steps of Lion and diffGrad, fused and foreach, beside torch's fused AdamW."""
    from methodbench_optim import fused
    from methodbench_optim.diffgrad import DiffGradOptimizer
    from methodbench_optim.lion import LionOptimizer

    built: dict[str, tuple[Callable[..., Any], int]] = {
        "lion": (LionOptimizer, 20),
        "diffgrad": (DiffGradOptimizer, 36),
        "adamw (torch, fused)": (lambda params: torch.optim.AdamW(params, fused=True, capturable=True), 28),
    }
    rows = []
    for total in (10_000_000, 200_000_000, 1_000_000_000):
        for name, (build, moved) in built.items():
            for path in ("fused", "foreach") if "torch" not in name else ("fused",):
                params = [nn.Parameter(torch.randn(total // 200, device="cuda")) for _ in range(200)]
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer = build(params)
                layout_of = fused.layout_of
                if path == "foreach":
                    fused.layout_of = lambda *lists: None
                try:
                    optimizer.step()
                    kernels = microseconds(optimizer.step) if name != "diffgrad" or path == "fused" else None
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(20):
                        optimizer.step()
                    torch.cuda.synchronize()
                    wall = (time.perf_counter() - start) / 20 * 1e6
                finally:
                    fused.layout_of = layout_of
                rate = total * moved / 1e-6
                rows.append(
                    {
                        "optimizer": name,
                        "path": path,
                        "parameters": total,
                        "kernels_us": kernels,
                        "wall_us": wall,
                        "kernels_share_of_bandwidth": rate / kernels / peak if kernels else None,
                        "wall_share_of_bandwidth": rate / wall / peak,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
                del params, optimizer
                torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Measure and print one JSON object per row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["packed", "sparse", "optimizers"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured")
        return 0
    peak = bandwidth()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "copy_gb_per_second": peak / 1e9,
    }
    print(json.dumps(report), flush=True)
    for part in args.parts:
        report[part] = (
            optimizers(peak) if part == "optimizers" else {"packed": packed, "sparse": sparse}[part]()
        )
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
