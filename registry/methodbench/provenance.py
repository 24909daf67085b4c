"""Where a number comes from: digests of sources, and the environment that a run was made in."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Packages whose code every method may use; their modules count towards a method's digest where it imports them.
_SHARED = "methodbench.torchkit"

#: Environment variables that change results or explain them. Others are never recorded: they may hold secrets.
_VARIABLES = (
    "OMP_NUM_THREADS", "OMP_DYNAMIC", "OMP_PROC_BIND", "OMP_PLACES", "OMP_SCHEDULE", "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY", "KMP_DETERMINISTIC_REDUCTION", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE",
    "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "TORCH_NUM_THREADS", "ATEN_CPU_CAPABILITY", "NPY_DISABLE_CPU_FEATURES",
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONHASHSEED", "PYTHONOPTIMIZE",
    "MALLOC_ARENA_MAX", "LD_PRELOAD", "HF_HUB_OFFLINE", "METHODBENCH_OFFLINE",
)  # fmt: skip

#: Flags of a processor that choose between kernels: vector and matrix instructions.
_FLAGS = re.compile(r"^(avx|sse|ssse|fma|f16c|amx|bf16|i8mm|asimd|sve|sme\d*$|neon|vsx|fphp|vnni)")


#: One encoder for all calls: making one costs more than most of the values it writes.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, ASCII.

    Raises:
        TypeError, ValueError: the value holds something that JSON has no form for, NaN and infinity included.
    """
    return _ENCODER.encode(value)


def digest(value: Any) -> str:
    """Return sha256 over :func:`canonical_json`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def module_file(module: str) -> Path | None:
    """Return the source file of a module without importing it or its parents; None for anything else."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@functools.cache
def source_digest(implementation: str) -> str:
    """Return sha256 over the source of an implementation and of what it imports of its own package and torchkit.

    Args:
        implementation: ``"package.module:attribute"``; the whole module counts.

    Returns:
        64 hexadecimal digits; a digest of nothing when the module has no source file.
    """
    hasher = hashlib.sha256()
    for name, content in sorted(source_files(implementation).items()):
        hasher.update(f"{name}\0{len(content)}\0".encode())
        hasher.update(content)
    return hasher.hexdigest()


def source_files(implementation: str) -> dict[str, bytes]:
    """Return the source that :func:`source_digest` covers, by name of the module."""
    module = implementation.partition(":")[0]
    own = module.split(".")[0]
    files: dict[str, bytes] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        found = _source(name)
        if name in files or found is None:
            continue
        files[name], imports = found
        pending += [
            other
            for other in imports
            if _within(other, own if own != "methodbench" else module) or _within(other, _SHARED)
        ]
    return files


@functools.cache
def _source(module: str) -> tuple[bytes, tuple[str, ...]] | None:
    """Return the source of a module and what it imports; None when it has no source file."""
    path = module_file(module)
    if path is None:
        return None
    content = path.read_bytes()
    return content, tuple(_imports(content, module, is_package=path.name == "__init__.py"))


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _imports(source: bytes, module: str, *, is_package: bool) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    package = module if is_package else module.rpartition(".")[0]
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # A name imported from a package may be a module of it.
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found


@functools.cache
def wheel(distribution: str) -> str:
    """Return name, version and content digest of an installed distribution; empty for one that is not installed.

    The digest covers the paths, sizes and sha256 of the files that the wheel brought, as its ``RECORD`` lists them, so
    it is the same wherever that wheel is installed. An editable installation has no such content and says so.
    """
    try:
        found = importlib.metadata.distribution(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""
    lines = []
    for line in (found.read_text("RECORD") or "").splitlines():
        path = line.split(",")[0]
        # The installer wrote these: scripts outside the package, its own notes, compiled files.
        own = path.startswith("..") or path.endswith(".pyc")
        if not own and path.rpartition("/")[2] not in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            lines.append(line)
    name = f"{found.metadata['Name']} {found.version}"
    if not any(line.split(",")[0].endswith(".py") for line in lines):
        return f"{name} editable"
    return f"{name} sha256:{hashlib.sha256(chr(10).join(sorted(lines)).encode()).hexdigest()}"


@functools.cache
def environment() -> Mapping[str, Any]:
    """Return a description of the machine and its software, captured once per process.

    What only a worker can tell (numeric libraries and their settings) is added by :func:`numerics`. Hold no
    secrets: of the environment's variables only those that are listed here are read.
    """
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": _accelerators(),
        "packages": _packages(),
        "variables": variables(),
        "commit": _commit(),
    }


def variables() -> dict[str, str]:
    """Return the environment variables of this process that change results or explain them."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def numerics(device: str = "cpu") -> dict[str, Any]:
    """Return what this process computes with: numeric libraries, their threads and determinism settings.

    Imports nothing: a library that is not loaded has had no part in the result.

    Args:
        device: as torch names it; for ``cuda`` the accelerator's libraries are described too.

    Returns:
        JSON-ready values; ``variables`` are those of this process, ``torch`` is absent where it is not loaded.
    """
    found: dict[str, Any] = {"variables": variables()}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        blas = numpy.__config__.CONFIG.get("Build Dependencies", {}).get("blas", {})
        found["numpy_blas"] = f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    if torch is not None:
        found["torch"] = _torch_numerics(torch, device)
    return found


def _torch_numerics(torch: Any, device: str) -> dict[str, Any]:
    backends = torch.backends
    mode = {0: "off", 1: "warn", 2: "error"}[torch.get_deterministic_debug_mode()]
    found = {
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": mode,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cpu_capability": backends.cpu.get_cpu_capability(),
        "libraries": list(_torch_libraries(torch)),
    }
    if device.startswith("cuda") and torch.cuda.is_initialized():
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": backends.cudnn.version(),
            "cudnn_deterministic": backends.cudnn.deterministic,
            "cudnn_benchmark": backends.cudnn.benchmark,
            "tf32": {"matmul": backends.cuda.matmul.allow_tf32, "cudnn": backends.cudnn.allow_tf32},
            "accelerator": f"{properties.name}, compute capability {properties.major}.{properties.minor}",
        }
    return found


@functools.cache
def _torch_libraries(torch: Any) -> tuple[str, ...]:
    """Return the lines of torch's build report that name BLAS, LAPACK, OpenMP and kernels, with their versions."""
    names = ("Math Kernel", "MKL-DNN", "OpenMP", "OpenBLAS", "BLAS", "LAPACK", "NNPACK", "Accelerate")
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    return tuple(
        line for line in lines if not line.startswith("Build settings") and any(n in line for n in names)
    )


def described(host: Mapping[str, Any], numeric: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (digest, description) of a run's environment: its machine, and what its process computed with."""
    data = {**host, **numeric}
    return digest(data), data


def _processor() -> dict[str, str]:
    info = {"model": platform.processor(), "flags": ""}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                info["model"] = value.strip()
            elif key.strip() in ("flags", "Features"):
                info["flags"] = " ".join(sorted(flag for flag in value.split() if _FLAGS.match(flag)))
                break
    except OSError:
        # Only Linux has this file; the platform string above still tells the machine.
        info["flags"] = "unknown"
    return info


def _accelerators() -> list[str]:
    """Return name, memory, driver and compute capability of each GPU."""
    fields = "name,memory.total,driver_version,compute_cap"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(line.strip() for line in answer.stdout.splitlines() if line.strip())


def _packages() -> dict[str, str]:
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found[name.lower().replace("_", "-")] = distribution.version
    return dict(sorted(found.items()))


def _commit() -> dict[str, Any]:
    """Return the commit of the checkout that methodbench runs from, else an empty dictionary.

    ``dirty`` says whether tracked files differ from it, ``changes`` is the digest of that difference.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, timeout=10, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "--no-ext-diff", "--no-color", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {"commit": commit, "dirty": bool(changes)}
    return found | ({"changes": hashlib.sha256(changes).hexdigest()} if changes else {})
