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
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Packages whose code every method may use; their modules count towards a method's digest where it imports them.
_SHARED = "methodbench.torchkit"

#: Environment variables that change results or explain them. Others are never recorded: they may hold secrets.
_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG",
    "PYTHONHASHSEED", "HF_HUB_OFFLINE", "METHODBENCH_OFFLINE", "TORCH_NUM_THREADS", "ATEN_CPU_CAPABILITY",
)  # fmt: skip


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, ASCII.

    Raises:
        TypeError, ValueError: the value holds something that JSON has no form for, NaN and infinity included.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


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
    module = implementation.partition(":")[0]
    own = module.split(".")[0]
    files: dict[str, bytes] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        path = module_file(name)
        if name in files or path is None:
            continue
        files[name] = path.read_bytes()
        pending += [
            found
            for found in _imports(files[name], name, is_package=path.name == "__init__.py")
            if _within(found, own if own != "methodbench" else module) or _within(found, _SHARED)
        ]
    hasher = hashlib.sha256()
    for name in sorted(files):
        hasher.update(f"{name}\0{len(files[name])}\0".encode())
        hasher.update(files[name])
    return hasher.hexdigest()


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
def environment() -> tuple[str, Mapping[str, Any]]:
    """Return (digest, description) of the machine and software, captured once per process."""
    data = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": _accelerators(),
        "packages": _packages(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "commit": _commit(),
    }
    return digest(data), data


def _processor() -> dict[str, str]:
    info = {"model": platform.processor(), "flags": ""}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                info["model"] = value.strip()
            elif key.strip() in ("flags", "Features"):
                wanted = (
                    "avx",
                    "avx2",
                    "avx512f",
                    "avx512_bf16",
                    "avx512_vnni",
                    "amx_bf16",
                    "amx_int8",
                    "fma",
                    "asimd",
                )
                info["flags"] = " ".join(flag for flag in wanted if flag in value.split())
                break
    except OSError:
        # Only Linux has this file; the platform string above still tells the machine.
        info["flags"] = "unknown"
    return info


def _accelerators() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
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
    """Return commit and dirty flag when methodbench runs from a checkout, else an empty dictionary."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    try:
        run = functools.partial(
            subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        dirty = bool(run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": dirty}
