"""Decoding and reading prompts with a sparse 7B-shaped language model on a GPU, beside the dense one.

    python benchmarks/gpu_sparse.py [--methods teal wina ...] [--sparsities 0.25 0.4 0.5 0.65] [--blocks 32]
                                    [--tokens 128] [--prompts 128 1024 4096] [--json FILE]

The model is that of ``gpu_quantize.py``: Llama-2-7B's shapes, random half-precision weights. Decoding is greedy at
batch 1, one CUDA graph per token, and alternates with the dense model. Activations are sparse by ``execution=sparse``,
and for comparison by masks in dense products; the sparsity is what was measured while decoding. Weights pruned 2:4 are
stored without their zeros; single tokens take the product that is fastest, prompts that of the tensor cores, as CUDA
graphs too. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_quantize import seven_b, tally

from methodbench.context import Context
from methodbench.torchkit.activation_sparsity import forget, measured
from methodbench.torchkit.compressed import semi_structured
from methodbench.torchkit.kernels import graph_of
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import decoding
from methodbench.torchkit.size import tensor_bytes
from methodbench_quant.decode import Decoder, paired_rates
from methodbench_sparse.cats import CATS
from methodbench_sparse.magnitude import Magnitude
from methodbench_sparse.teal import TEAL
from methodbench_sparse.wina import WINA

METHODS: dict[str, Any] = {
    "teal": lambda **more: TEAL(positions="all", **more),
    "wina": lambda **more: WINA(positions="all", transform=False, mask_by="threshold", **more),
    "wina, top k": lambda **more: WINA(positions="all", transform=False, mask_by="topk", **more),
    "cats": lambda **more: CATS(positions="all", **more),
}


def speed(sparse: LoadedModel, dense: LoadedModel, prompt: torch.Tensor, tokens: int) -> dict[str, Any]:
    """Return decoding rates of both, the median ratio over repeats and its range."""
    forget(sparse)
    with decoding(sparse.module) as kernels:
        (ours, theirs), _ = paired_rates(sparse.module, dense.module, prompt, tokens, 5)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "tokens_per_second": statistics.median(ours),
        "dense_tokens_per_second": statistics.median(theirs),
        "speedup": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "kernels": {str(count): name for name, count in tally(kernels).items()},
    }


def activations(
    dense: LoadedModel,
    data: Calibration,
    prompt: torch.Tensor,
    names: list[str],
    sparsities: list[float],
    tokens: int,
) -> list[dict[str, Any]]:
    """Measure every method at every sparsity, its masks in dense products at 0.5 alone."""
    rows = []
    for sparsity in sparsities:
        for name in names:
            for execution in ("sparse", "masked") if sparsity == 0.5 else ("sparse",):
                start = time.perf_counter()
                method = METHODS[name](sparsity=sparsity, execution=execution)
                sparse = method.compress(dense, data, Context(device="cuda", dtype="float16"))
                seconds = time.perf_counter() - start
                row = {"method": name, "asked": sparsity, "execution": execution, "seconds": seconds}
                row |= speed(sparse, dense, prompt, tokens)
                row |= {"measured": measured(sparse)["sparsity_model"]}
                row["promised"] = 1 / (1 - row["measured"])
                row["how"] = sparse.facts.get("execution", "")
                row["gains"] = sparse.facts.get("execution_gain", {})
                rows.append(row)
                print(json.dumps(row), flush=True)
                del sparse
                gc.collect()
                torch.cuda.empty_cache()
    return rows


def patterns(
    dense: LoadedModel, prompt: torch.Tensor, prompts: list[int], tokens: int
) -> list[dict[str, Any]]:
    """Measure 2:4 weights: decoding, and reading prompts."""
    start = time.perf_counter()
    small = Magnitude(pattern="2:4", weights="nm").compress(dense, Calibration.none(), Context(device="cuda"))
    row: dict[str, Any] = {"method": "magnitude 2:4, stored", "seconds": time.perf_counter() - start}
    row |= {"model_gib": tensor_bytes(small.module) / 2**30}
    row |= {"dense_gib": tensor_bytes(dense.module) / 2**30} | speed(small, dense, prompt, tokens)
    print(json.dumps(row), flush=True)
    rows = [row]
    for length in prompts:
        ids = torch.randint(0, 32000, (1, length), device="cuda")
        # Graphs: the host takes longer to launch a 2:4 product than the GPU to compute it.
        # A graph does not hold what it reads.
        readers = [Decoder(model.module, ids, 1) for model in (dense, small)]
        with semi_structured(small.module) as names:
            graphs = [graph_of(reader.prefill) for reader in readers]
            seconds = alternating(*(graph.replay for graph in graphs))
        rows.append(
            {
                "method": "magnitude 2:4, tensor cores",
                "prompt": length,
                "layers": len(names),
                "dense_seconds": seconds[0],
                "seconds": seconds[1],
                "speedup": seconds[0] / seconds[1],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


@torch.no_grad()
def alternating(*runs: Any, rounds: int = 5) -> list[float]:
    """Return the median seconds of each of ``runs``, which take turns."""
    taken: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for run, seconds in zip(runs, taken, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if round_:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def main() -> int:
    """Measure and print one JSON object per row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.65])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 1024, 4096])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured")
        return 0
    dense = seven_b(args.blocks, "cuda", torch.float16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (8, 512), generator=generator)
    data, prompt = Calibration(ids, "random tokens"), ids[:1, :128].cuda()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
    }
    print(json.dumps(report), flush=True)
    report["activations"] = activations(dense, data, prompt, args.methods, args.sparsities, args.tokens)
    report["patterns"] = patterns(dense, prompt, args.prompts, args.tokens)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
