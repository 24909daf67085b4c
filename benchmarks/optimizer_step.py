"""Time of one optimizer step: ours beside torch.optim's, lion-pytorch's and pytorch_optimizer's, in one run.

    python benchmarks/optimizer_step.py [--params 10000000] [--tensors 200] [--rounds 7] [--device cpu]

Every contestant steps on tensors of its own; rounds alternate between contestants, so that whatever else the
machine does hits all alike. A step is limited by memory: beside its time stands the time per byte that the
rule has to move at the least (parameter, gradient and state read once, parameter and state written once).
Peers that are not installed are named under "skipped"; an environment for them needs lion-pytorch and
pytorch_optimizer beside this project. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from methodbench_optim.diffgrad import DiffGradOptimizer
from methodbench_optim.lion import LionOptimizer

Build = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def contestants() -> tuple[dict[str, tuple[Build, int]], dict[str, str]]:
    """Return how to build each optimizer and how many state tensors per parameter it keeps; why peers are missing."""
    built: dict[str, tuple[Build, int]] = {
        "adamw (torch, foreach)": (lambda params: torch.optim.AdamW(params, foreach=True), 2),
        "adamw (torch, default)": (lambda params: torch.optim.AdamW(params), 2),
        "lion": (LionOptimizer, 1),
        "diffgrad": (DiffGradOptimizer, 3),
    }
    skipped: dict[str, str] = {}
    try:
        import lion_pytorch
    except ImportError as error:
        skipped["lion-pytorch"] = f"not installed: {error}"
    else:
        built["lion (lion-pytorch)"] = (lambda params: lion_pytorch.Lion(params, lr=1e-4), 1)
    try:
        import pytorch_optimizer
    except ImportError as error:
        skipped["pytorch_optimizer"] = f"not installed: {error}"
    else:
        built["lion (pytorch_optimizer)"] = (lambda params: pytorch_optimizer.Lion(params), 1)
        built["diffgrad (pytorch_optimizer)"] = (
            lambda params: pytorch_optimizer.DiffGrad(params, weight_decouple=False),
            3,
        )
    return built, skipped


def seconds_per_step(optimizer: torch.optim.Optimizer, steps: int, device: str) -> float:
    """Return wall-clock seconds per step over ``steps`` steps."""
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--params", type=int, default=10_000_000)
    parser.add_argument("--tensors", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = args.params // args.tensors

    running: dict[str, torch.optim.Optimizer] = {}
    state_tensors: dict[str, int] = {}
    entrants, skipped = contestants()
    for name, (build, states) in entrants.items():
        params = [nn.Parameter(torch.randn(size, device=args.device)) for _ in range(args.tensors)]
        for p in params:
            p.grad = torch.randn_like(p)
        running[name], state_tensors[name] = build(params), states
        seconds_per_step(running[name], 2, args.device)

    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(args.rounds):
        for name, optimizer in running.items():
            times[name].append(seconds_per_step(optimizer, args.steps, args.device))

    reference = statistics.median(times["adamw (torch, foreach)"])
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": args.device,
        "threads": args.threads,
        "parameters": size * args.tensors,
        "tensors": args.tensors,
        "rounds": args.rounds,
        "skipped": skipped,
        "optimizers": {},
    }
    for name, measured in times.items():
        median = statistics.median(measured)
        moved = 4 * size * args.tensors * (3 + 2 * state_tensors[name])
        report["optimizers"][name] = {
            "milliseconds_per_step": round(1e3 * median, 3),
            "range_milliseconds": [round(1e3 * min(measured), 3), round(1e3 * max(measured), 3)],
            "picoseconds_per_byte": round(1e12 * median / moved, 2),
            "ratio_to_adamw_foreach": round(median / reference, 3),
        }
    # Ours over each peer's, round by round: what else the machine did hit both of a round alike.
    report["ratios_to_peers"] = {
        f"{name.partition(' ')[0]} / {name}": round(
            statistics.median(a / b for a, b in zip(times[name.partition(" ")[0]], measured, strict=True)), 3
        )
        for name, measured in times.items()
        if " " in name and name.partition(" ")[0] in times
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
