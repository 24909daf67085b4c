"""Time and memory to quantize or prune a language model: our GPTQ, AWQ, SmoothQuant, SparseGPT and Wanda beside
llm-compressor's.

    python benchmarks/against_llmcompressor.py --peer PYTHON [--methods gptq,sparsegpt,wanda-2of4] [--block]
        [--blocks N] [--sequences 16] [--length 512] [--threads 1] [--rounds 3] [--json FILE]

PYTHON is the interpreter of an environment that holds ``llmcompressor``; without it nothing is measured. Every run is a
process of its own, and rounds alternate between the two. Both get the same weights, calibration tokens and threads, and
do the same work: 4 bits in groups of 64 with zero points for GPTQ (columns in their own order) and AWQ (20 exponents
judged on all tokens, no clip search, which the peer lacks), 8 bits for weights and activations for SmoothQuant,
half of the weights for SparseGPT and Wanda, anywhere or 2:4. ``--blocks`` takes the first blocks of SmolLM2-135M alone,
``--block`` one block of Llama-2-7B's shape with random weights in their place. Figures are runs per hour, and the
reciprocal of the memory that compression needs on top of the loaded model, at its peak. The dense model is handed over,
and nothing else holds it: the peer overwrites its weights, ours gives them up block by block.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Figure, language_model, parser, report

METHODS = ("gptq", "awq", "smoothquant", "sparsegpt", "sparsegpt-2of4", "wanda", "wanda-2of4")
BITS, GROUP_SIZE = 4, 64
SPARSITY = 0.5

#: The shape of a block of Llama-2-7B, with a vocabulary that adds little to it.
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 1,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}


def main() -> int:
    """Measure, print, and return 1 when ours is slower, or takes more memory, than the peer; 2 without one."""
    options = parser(__doc__ or "", rounds=3)
    options.add_argument("--peer", type=Path, help="interpreter of the environment that holds llmcompressor")
    options.add_argument("--methods", default=",".join(METHODS))
    options.add_argument("--block", action="store_true", help="one block of Llama-2-7B's shape")
    options.add_argument("--blocks", type=int, default=0, help="blocks of SmolLM2-135M; 0 for all")
    options.add_argument("--sequences", type=int, default=16)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--run", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run:
        print(json.dumps(measure(given.run, given.folder, given.threads)))
        return 0
    if given.peer is None or not has_peer(given.peer):
        print("skipped: name with --peer the interpreter of an environment that holds llmcompressor")
        return 0
    with tempfile.TemporaryDirectory(prefix="methodbench-bench-") as name:
        folder = Path(name)
        prepare(folder, given)
        figures = []
        for method in given.methods.split(","):
            figures += compare(method, folder, given)
        return report(figures, given.json)


def has_peer(python: Path) -> bool:
    """Whether ``python`` can import llmcompressor."""
    try:
        return subprocess.run([python, "-c", "import llmcompressor"], capture_output=True).returncode == 0
    except OSError:
        return False


def prepare(folder: Path, given: Any) -> None:
    """Write the model and the calibration tokens [sequences, length] into ``folder``."""
    import torch
    from safetensors.torch import save_file

    sequences, length = given.sequences, given.length
    generator = torch.Generator().manual_seed(0)
    if given.block:
        import transformers

        torch.manual_seed(0)
        module = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**LLAMA_2_7B, tie_word_embeddings=False)
        )
        tokens = torch.randint(LLAMA_2_7B["vocab_size"], (sequences + 2, length), generator=generator)
    else:
        from methodbench.context import Context
        from methodbench_quant.tasks.texts import pydoc_topics
        from methodbench_quant.tasks.tokens import consecutive, token_ids

        model = language_model(None)
        module = model.module
        if given.blocks:
            module.model.layers = module.model.layers[: given.blocks]
            module.config.num_hidden_layers = given.blocks
        windows = consecutive(token_ids(pydoc_topics(), model.tokenizer, Context()), length)
        tokens = windows[torch.randperm(len(windows), generator=generator)[: sequences + 2]]
    module.save_pretrained(folder)
    save_file({"tokens": tokens.contiguous()}, folder / "tokens.st")


def compare(method: str, folder: Path, given: Any) -> list[Figure]:
    """Return the figures of one method: speed, and memory on top of the model."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(given.rounds):
        for side, python in (("ours", sys.executable), ("peer", given.peer)):
            command = [python, __file__, "--run", f"{side}-{method}", "--folder", folder]
            command += ["--threads", str(given.threads)]
            threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
            done = subprocess.run(
                [str(part) for part in command],
                capture_output=True,
                text=True,
                env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""},
            )
            if done.returncode:
                raise SystemExit(f"{side}, {method}:\n{done.stderr[-2000:]}")
            found[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for side, runs in found.items()
    }
    for side, values in median.items():
        print(
            f"{method}, {side}: {values['seconds']:.1f} s, {values['cpu']:.1f} CPU seconds, "
            f"{values['extra_bytes'] / 2**20:.0f} MiB on top of {values['start_bytes'] / 2**20:.0f} MiB, "
            f"loss {values['dense_loss']:.4f} before and {values['loss']:.4f} after, "
            f"{values['zeros']:.1%} of the Linears' weights zero"
        )
    ours, peer = median["ours"], median["peer"]
    model = f"{given.blocks} blocks of SmolLM2-135M" if given.blocks else "SmolLM2-135M"
    what = f"{method}, {'block of 7B' if given.block else model}"
    return [
        Figure(what, 3600 / ours["seconds"], 3600 / peer["seconds"], 1.0, "runs/h"),
        Figure(f"{what}, memory", 2**30 / ours["extra_bytes"], 2**30 / peer["extra_bytes"], 1.0, "1/GiB"),
    ]


def measure(run: str, folder: Path, threads: int) -> dict[str, float]:
    """Compress once and return seconds, CPU seconds, bytes and the losses on text outside of calibration."""
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    side, _, method = run.partition("-")
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    module.requires_grad_(False)
    # Weights of a mapped file stay in memory as long as any of them: each gets memory of its own.
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    tokens = load_file(folder / "tokens.st")["tokens"]
    calibration, held_out = tokens[:-2], tokens[-2:]
    dense_loss = loss_of(module, held_out)
    compress = (ours if side == "ours" else peer)(method, module, calibration)
    # The peer overwrites the model, ours returns another: neither measurement holds the dense one beside it.
    del module
    start_bytes = resident_bytes("VmRSS")
    forget_peak()
    start, cpu = time.perf_counter(), time.process_time()
    module = compress()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resident_bytes("VmHWM")
    return {
        "seconds": seconds,
        "cpu": cpu,
        "start_bytes": start_bytes,
        "extra_bytes": max(1, peak - start_bytes),
        "zeros": zeros_of(module),
        "dense_loss": dense_loss,
        "loss": loss_of(module, held_out),
    }


def loss_of(module: Any, tokens: Any) -> float:
    """Return the mean loss of ``module`` on ``tokens``, nats."""
    import torch

    with torch.no_grad():
        logits = module(tokens, use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def zeros_of(module: Any) -> float:
    """Return the share of zeros in the dense Linears of the blocks; 0 where none is left."""
    import torch

    weights = [
        layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
    ]
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights)
    return zeros / max(1, sum(weight.numel() for weight in weights))


def resident_bytes(key: str) -> int:
    """Return the resident memory of this process: ``VmRSS`` as it is, ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"this system does not tell {key}: memory is measured on Linux only")


def forget_peak() -> None:
    """Let the peak of resident memory start from what it is at this moment."""
    Path("/proc/self/clear_refs").write_text("5")


def ours(method: str, module: Any, tokens: Any) -> Any:
    """Return what compresses ``module`` with our implementation."""
    from methodbench.context import Context
    from methodbench.torchkit.adapters import detect
    from methodbench.torchkit.model import Calibration, LoadedModel
    from methodbench_quant.llm.awq import AWQ
    from methodbench_quant.llm.gptq import GPTQ
    from methodbench_quant.llm.smoothquant import SmoothQuant
    from methodbench_sparse.sparsegpt import SparseGPT
    from methodbench_sparse.wanda import Wanda

    adapter = detect(module)
    held = [LoadedModel("measured", adapter.kind, module, adapter)]
    implementations = {
        "gptq": GPTQ(bits=BITS, group_size=GROUP_SIZE),
        "awq": AWQ(bits=BITS, group_size=GROUP_SIZE, search_tokens=0, clip=False),
        "smoothquant": SmoothQuant(),
        "sparsegpt": SparseGPT(sparsity=SPARSITY),
        "sparsegpt-2of4": SparseGPT(sparsity=SPARSITY, pattern="2:4"),
        "wanda": Wanda(sparsity=SPARSITY),
        "wanda-2of4": Wanda(sparsity=SPARSITY, pattern="2:4"),
    }
    return lambda: implementations[method].compress(held.pop(), Calibration(tokens), Context()).module


def peer(method: str, module: Any, tokens: Any) -> Any:
    """Return what compresses ``module`` with llm-compressor."""
    import tokenizers
    import torch
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    weights = QuantizationArgs(num_bits=BITS, symmetric=False, strategy="group", group_size=GROUP_SIZE)
    pruned: dict[str, Any] = {"sparsity": SPARSITY, "ignore": ["re:.*lm_head.*"]}
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipes = {
        "gptq": lambda: [GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder=None)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
        "smoothquant": lambda: [
            SmoothQuantModifier(smoothing_strength=0.5),
            QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"]),
        ],
        "sparsegpt": lambda: [SparseGPTModifier(**pruned)],
        "sparsegpt-2of4": lambda: [SparseGPTModifier(**pruned, mask_structure="2:4")],
        "wanda": lambda: [WandaPruningModifier(**pruned)],
        "wanda-2of4": lambda: [WandaPruningModifier(**pruned, mask_structure="2:4")],
    }
    batches = DataLoader([{"input_ids": row} for row in tokens], batch_size=1)
    recipe = recipes[method]()
    if not torch.cuda.is_available():
        # Its AWQ pins memory for a GPU and fails where there is none.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    # It asks for a tokenizer beside inputs that are tokens already.
    words = tokenizers.models.WordLevel({"?": 0}, unk_token="?")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    return lambda: oneshot(
        model=module,
        tokenizer=tokenizer,
        dataset=batches,
        recipe=recipe,
        num_calibration_samples=len(tokens),
    )


if __name__ == "__main__":
    sys.exit(main())
