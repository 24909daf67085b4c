"""Quantizing a 7B-shaped language model on a GPU, and decoding with it: time, memory, tokens per second.

    python benchmarks/gpu_quantize.py [--methods rtn gptq awq] [--bits 4] [--group-size 128] [--blocks 32]
                                      [--sequences 128] [--length 2048] [--tokens 128] [--json FILE]

The model has Llama-2-7B's shapes and random weights in half precision, made block by block on the device. What is
measured does not depend on the weights' values; perplexities would, and are not measured here. Decoding is greedy at
batch 1 with a key-value cache; for both models one step is a CUDA graph. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from methodbench.context import Context
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import decoding, materialized, packed_layers
from methodbench.torchkit.size import tensor_bytes
from methodbench_quant.decode import Decoder, decode_rate
from methodbench_quant.llm.awq import AWQ
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.rtn import RTN

GIB = 2**30
METHODS: dict[str, Any] = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ}


def seven_b(blocks: int, device: str, dtype: torch.dtype) -> LoadedModel:
    """Return a model of Llama-2-7B's shapes with ``blocks`` blocks and random weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        module = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for part in [*module.model.layers, module.model.embed_tokens, module.model.norm, module.lm_head]:
        part.to_empty(device=device)
        for weight in part.parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
    module.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    module.config.use_cache = False
    return LoadedModel("llama-2-7b-shaped", "causal-lm", module, detect(module))


def difference(module: nn.Module, prompt: Tensor) -> float:
    """Return the relative difference of a step's logits with the chosen kernels from unpacked weights."""
    logits = []
    for manager in (materialized, decoding):
        with manager(module):
            decoder = Decoder(module, prompt, 2)
            decoder.prefill()
            decoder.ids.fill_(1)
            decoder.step()
            assert decoder.logits is not None
            logits.append(decoder.logits.float())
    return float((logits[1] - logits[0]).norm() / logits[0].norm())


def measure(
    method: Any, model: LoadedModel, data: Calibration, prompt: Tensor, tokens: int
) -> dict[str, Any]:
    """Return time, memory and decoding rate of one method."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    start = time.perf_counter()
    ctx = Context(device="cuda", dtype="float16")
    compressed = method.compress(model, data, ctx)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    start = time.perf_counter()
    with decoding(compressed.module) as kernels:
        chosen = time.perf_counter() - start
        rate = decode_rate(compressed.module, prompt, tokens)
    layers = packed_layers(compressed.module)
    return {
        "seconds": seconds,
        "phases": ctx.phases,
        "warnings": ctx.warnings,
        "peak_gib": peak / GIB,
        "peak_beyond_dense_model_gib": (peak - before) / GIB,
        "packed_model_gib": tensor_bytes(compressed.module) / GIB,
        "bits_per_weight": compressed.accounted_bits,
        "decode_tokens_per_second": rate.tokens_per_second,
        "decode_range": [rate.lowest, rate.highest],
        "kernels": {str(count): name for name, count in tally(kernels).items()},
        "layers_with_kernel": f"{len(kernels)} of {len(layers)}",
        "choosing_seconds": chosen,
        "logits_relative_difference": difference(compressed.module, prompt),
    }


def tally(kernels: dict[str, str]) -> dict[str, int]:
    """Return how many layers use each kernel."""
    counts: dict[str, int] = {}
    for kernel in kernels.values():
        counts[kernel] = counts.get(kernel, 0) + 1
    return counts


def main() -> int:
    """Measure and print; 1 when the packed model does not decode faster than the dense one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    model = seven_b(args.blocks, "cuda", getattr(torch, args.dtype))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (args.sequences, args.length), generator=generator)
    data = Calibration(ids, "random tokens")
    prompt = ids[:1, :128].cuda()
    dense = decode_rate(model.module, prompt, args.tokens)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "dense": {
            "model_gib": tensor_bytes(model.module) / GIB,
            "decode_tokens_per_second": dense.tokens_per_second,
            "decode_range": [dense.lowest, dense.highest],
        },
    }
    print(json.dumps(report, indent=1), flush=True)
    slower = False
    for name in args.methods:
        method = METHODS[name](bits=args.bits, group_size=args.group_size)
        found = measure(method, model, data, prompt, args.tokens)
        found["decode_ratio"] = found["decode_tokens_per_second"] / dense.tokens_per_second
        slower |= found["decode_ratio"] <= 1
        report[name] = found
        print(json.dumps({name: found}, indent=1), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
