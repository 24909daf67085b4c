"""What happens inside a worker process: one job, from the model's file to scores on disk.

A worker gets a job as plain JSON data and writes one JSON file per cell into the job's folder. It never touches the
database, and nothing it does can harm the driver.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.random  # NumPy imports it on first use, which would be in every worker

from methodbench import params, pictures, stats
from methodbench.catalog import load_implementation
from methodbench.context import Context
from methodbench.engine.prepared import is_prepared, list_files
from methodbench.entries import Metric
from methodbench.errors import DivergedError, MethodbenchError, NotApplicableError
from methodbench.kinds import MODEL_KINDS
from methodbench.locks import locked
from methodbench.provenance import digest, numerics, source_digest

if TYPE_CHECKING:
    from methodbench.protocols import Evaluation
    from methodbench.torchkit.fingerprints import Mark
    from methodbench.torchkit.model import Calibration, LoadedModel

Emit = Callable[[Mapping[str, Any]], None]


def execute(job: Mapping[str, Any], emit: Emit) -> None:
    """Run a job and write its results; failures of a cell are results too.

    Args:
        job: what the driver made of cells.
        emit: reports ``{"event": "cell", "index": i}`` and ``{"event": "phase", "phase": name}`` to the driver.
    """
    if "prepare" in job:
        _prepare_model(job, emit)
        return
    bench: _Bench | None = None
    part = -1
    for index in range(job["first"], len(job["cells"])):
        if bench is None or part != job["cells"][index]["part"]:
            part = job["cells"][index]["part"]
            bench = _Bench({**job, **job["parts"][part]}, emit)
        bench.run(index)


def _settle(job: Mapping[str, Any]) -> None:
    """Fix threads and seeds, and ask torch for deterministic algorithms; once implementations are imported."""
    seed = job["seed"]
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(job["threads"])
        torch.manual_seed(seed)
        # The debug mode sets the same switch as use_deterministic_algorithms, which imports the compiler as well.
        torch.set_deterministic_debug_mode("warn")
        if job["device"].startswith("cuda"):
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
            # TF32 keeps ten bits of mantissa: float32 results are to be float32 results on every accelerator.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False


def _prepare_model(job: Mapping[str, Any], emit: Emit) -> None:
    """Let a loader write its model's folder, unless it is there already."""
    wanted = job["prepare"]
    emit({"event": "phase", "phase": f"prepare {wanted['name']}"})
    try:
        loader = params.build(load_implementation(wanted["loader"]), wanted["options"], wanted["name"])
        _settle(job)
        target = Path(wanted["folder"])
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock")):
            temporary = target.with_suffix(".partial")
            # What an attempt that was killed or failed has left; the lock says that nobody works on it.
            shutil.rmtree(temporary, ignore_errors=True)
            if not is_prepared(target):
                shutil.rmtree(target, ignore_errors=True)
                temporary.mkdir()
                source = Path(wanted["source"]) if wanted["source"] else None
                loader.prepare(source, temporary, Context(seed=job["seed"], threads=job["threads"]))
                list_files(temporary)
                temporary.replace(target)
        result = {"status": "ok"}
    except Exception as error:
        result = _failure(error)
    _write(job, 0, result)
    emit({"event": "cell", "index": 0})


def _failure(error: Exception) -> dict[str, str]:
    """Return status and reason of what went wrong, and leave the traceback in the log where it helps."""
    if isinstance(error, NotApplicableError):
        return {"status": "not-applicable", "reason": error.message}
    if isinstance(error, DivergedError):
        return {"status": "failed", "reason": f"diverged: {error.message}"}
    traceback.print_exception(error)
    if isinstance(error, MemoryError):
        return {"status": "oom", "reason": f"out of memory: {error}".rstrip(": ")}
    if _is_out_of_memory(error):
        return {"status": "oom", "reason": _first_line(error)}
    if isinstance(error, MethodbenchError):
        return {"status": "failed", "reason": error.message}
    return {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}


@dataclass(slots=True)
class _Compressed:
    """What a method made of the model, with what it took and what is to be known about it."""

    model: LoadedModel
    phases: dict[str, float]
    warnings: list[str]
    marks: list[Mark]


class _Bench:
    """State that the cells of one job share: the model, and what it was compressed into."""

    def __init__(self, job: Mapping[str, Any], emit: Emit) -> None:
        self.job = job
        self.emit = emit
        self.method: Any = None
        self.model: LoadedModel | None = None
        self.compressed: dict[str, _Compressed] = {}

    def run(self, index: int) -> None:
        """Run one cell and write its result."""
        cell = self.job["cells"][index]
        started = time.time()
        begin = time.perf_counter()
        _forget_peak()
        ctx = Context(
            seed=self.job["seed"],
            device=self.job["device"],
            dtype=self.job["dtype"],
            threads=self.job["threads"],
            cache=Path(self.job["cache"]),
        )
        result = self._guarded(cell, ctx)
        result["started"] = started
        result["wall_seconds"] = time.perf_counter() - begin
        result["phases"] = ctx.phases
        result["warnings"] = ctx.warnings
        result["numerics"] = numerics(self.job["device"])
        result["peak_memory_bytes"] = peak_memory_bytes()
        cuda = _cuda()
        if cuda is not None:
            result.setdefault("facts", {})["peak_gpu_memory_bytes"] = cuda.max_memory_allocated()
        sys.stdout.flush()
        # Where this cell's share of the job's log ends.
        result["log_end"] = os.fstat(1).st_size
        _write(self.job, index, result)
        self.emit({"event": "cell", "index": index})

    def _guarded(self, cell: Mapping[str, Any], ctx: Context) -> dict[str, Any]:
        try:
            return {"status": "ok", "reason": "", **self._cell(cell, ctx)}
        except Exception as error:
            return _failure(error)

    @contextlib.contextmanager
    def _phase(self, ctx: Context, name: str) -> Iterator[None]:
        self.emit({"event": "phase", "phase": name})
        with ctx.phase(name):
            yield

    def _cell(self, cell: Mapping[str, Any], ctx: Context) -> dict[str, Any]:
        wanted = self.job["method"]
        if self.method is None:
            with self._phase(ctx, "import"):
                self.method = _method(wanted)
        described = cell["task"]
        task = params.build(load_implementation(described["impl"]), described["params"], described["name"])
        _settle(self.job)
        if self.job["model"] is not None and self.model is None:
            with self._phase(ctx, "load"):
                self.model = self._load(ctx)
        result: dict[str, Any] = {}
        if wanted["kind"] in MODEL_KINDS:
            assert self.model is not None
            from methodbench.torchkit import activation_sparsity

            compressed = self._compress(task, described, ctx)
            activation_sparsity.forget(compressed.model)
            ctx.dense = self.model
            evaluation, marks = self._evaluate(
                compressed.model, ctx, lambda: task.evaluate(compressed.model, ctx)
            )
            result |= _storage(compressed.model)
            result["marks"] = [asdict(mark) for mark in (*compressed.marks, *marks)]
            facts = compressed.model.facts | activation_sparsity.measured(compressed.model)
        else:
            evaluation, marks = self._evaluate(
                self.model, ctx, lambda: task.evaluate(self.method, self.model, ctx)
            )
            result["marks"] = [asdict(mark) for mark in marks]
            facts = dict(self.model.facts) if self.model else {}
        return result | _outcome(evaluation, facts, described)

    def _evaluate(
        self, model: LoadedModel | None, ctx: Context, evaluate: Callable[[], Evaluation]
    ) -> tuple[Evaluation, list[Mark]]:
        # A phase starts from the same state, whichever cells ran before it in this process.
        _settle(self.job)
        with self._phase(ctx, "evaluate"):
            if model is None:
                return evaluate(), []
            from methodbench.torchkit.fingerprints import Watch

            with Watch(model) as watch:
                return evaluate(), watch.marks

    def _load(self, ctx: Context) -> LoadedModel:
        wanted = self.job["model"]
        loader = params.build(load_implementation(wanted["loader"]), wanted["options"], wanted["name"])
        model: LoadedModel = loader.load(Path(wanted["folder"]), ctx)
        model.name = wanted["name"]
        if ctx.device != "cpu" or ctx.dtype != "float32":
            import torch

            model.module.to(device=ctx.device, dtype=getattr(torch, ctx.dtype))
        return model

    def _compress(self, task: Any, described: Mapping[str, Any], ctx: Context) -> _Compressed:
        from methodbench.torchkit import fingerprints
        from methodbench.torchkit.model import Calibration

        assert self.model is not None
        data = Calibration.none()
        if "calibration" in self.job["method"]["needs"]:
            with self._phase(ctx, "calibrate"):
                data = self._calibration(task, described, ctx)
        key = data.source
        if key not in self.compressed:
            self.compressed.clear()
            scratch = Context(ctx.seed, ctx.device, ctx.dtype, ctx.threads, ctx.cache)
            # Whether the calibration inputs were drawn here or come from the cache, what follows is the same.
            _settle(self.job)
            with self._phase(scratch, "compress"):
                model = self.method.compress(self.model, data, scratch)
            if data.source:
                model.facts.setdefault("calibration", data.source)
            marks = [fingerprints.mark("calibration", "", data.inputs)] if data.source else []
            marks += fingerprints.weight_marks(model)
            self.compressed[key] = _Compressed(model, scratch.phases, scratch.warnings, marks)
        compressed = self.compressed[key]
        ctx.phases.update(compressed.phases)
        ctx.warnings.extend(compressed.warnings)
        return compressed

    def _calibration(self, task: Any, described: Mapping[str, Any], ctx: Context) -> Calibration:
        """Return the task's calibration inputs, made once per machine for all methods on this model."""
        from safetensors.torch import save_file

        assert ctx.cache is not None
        identity = [
            described["name"],
            described["params"],
            described["digest"],
            self.job["model"]["digest"],
            ctx.seed,
        ]
        path = ctx.cache / "calibration" / f"{digest(identity)}.safetensors"
        with locked(path.with_suffix(".lock")):
            stored = _stored_calibration(path, ctx.device)
            if stored is not None:
                return stored
            data: Calibration = task.calibration(self.model, ctx)
            data.inputs = data.inputs.to(ctx.device)
            temporary = path.with_suffix(f".{os.getpid()}.partial")
            save_file({"inputs": data.inputs.contiguous()}, temporary, metadata={"source": data.source})
            temporary.replace(path)
        return data


def _method(wanted: Mapping[str, Any]) -> Any:
    """Build a method, of the source that was planned.

    Raises:
        MethodbenchError: its source was changed since, and the record would name the wrong one.
    """
    implementation = load_implementation(wanted["impl"])
    if source_digest(wanted["impl"]) != wanted["source_digest"]:
        raise MethodbenchError(
            f"the source of {wanted['name']} was changed while the plan ran; run the same command again"
        )
    if wanted["links"]:
        return implementation(
            wanted["name"], [(link, _method({**link, "links": []})) for link in wanted["links"]]
        )
    return params.build(implementation, wanted["params"], wanted["name"])


def _stored_calibration(path: Path, device: str) -> Calibration | None:
    """Read calibration inputs from the cache; None where there are none, or only a damaged file."""
    from safetensors import SafetensorError, safe_open

    from methodbench.torchkit.model import Calibration

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt", device=device) as stored:
            metadata = stored.metadata() or {}
            return Calibration(stored.get_tensor("inputs"), metadata.get("source", ""))
    except SafetensorError:
        return None


def _storage(model: LoadedModel) -> dict[str, Any]:
    from methodbench.torchkit.size import bits_per_weight, tensor_bytes

    compressible = bool(model.adapter.targets(model.module))
    return {
        "storage": model.storage,
        "model_bytes": tensor_bytes(model.module),
        "bits_per_weight": bits_per_weight(model) if compressible else None,
        "accounted_bits": model.accounted_bits,
    }


def _outcome(evaluation: Evaluation, facts: dict[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    listed = {metric["name"]: Metric(**metric) for metric in described["metrics"]}
    metrics = []
    for name, scores in evaluation.scores.items():
        metric = listed.get(name) or scores.metric or Metric(name=name, direction="higher")
        value = stats.aggregate(scores.values, metric.aggregate)
        interval = stats.bootstrap_interval(scores.values, metric.aggregate) or (None, None)
        metrics.append(
            {
                "name": name,
                "title": metric.title,
                "unit": metric.unit,
                "direction": metric.direction,
                "aggregate": metric.aggregate,
                "primary": metric.primary,
                "value": None if math.isnan(value) else value,
                "low": interval[0],
                "high": interval[1],
                "scores": scores.values.tolist(),
            }
        )
    throughput = evaluation.throughput or (None, "")
    kept = {pictures.FACT: pictures.facts_of(evaluation.pictures)} if len(evaluation.pictures) else {}
    return {
        "metrics": metrics,
        "series": {
            name: np.asarray(curve, dtype=float).tolist() for name, curve in evaluation.series.items()
        },
        "facts": facts | dict(evaluation.facts) | kept,
        "throughput": throughput[0],
        "throughput_unit": throughput[1],
    }


def _forget_peak() -> None:
    """Let the peak of this process's memory start anew, where the system can, so that each cell has its own."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()


def _cuda() -> Any:
    """Return ``torch.cuda`` where this process uses a GPU, else None; touches none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process since :func:`_forget_peak`, or since it began."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:500]


def _plain(value: Any) -> Any:
    """Turn what methods put into facts (numpy and torch scalars, arrays, paths) into JSON values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _write(job: Mapping[str, Any], index: int, result: Mapping[str, Any]) -> None:
    path = Path(job["out"]) / f"{index}.json"
    temporary = path.with_suffix(".partial")
    # Messages may hold lone surrogates (undecodable file names), which no database takes.
    temporary.write_bytes(json.dumps(result, default=_plain, ensure_ascii=False).encode("utf-8", "replace"))
    temporary.replace(path)
