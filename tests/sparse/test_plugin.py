"""Entries of the family: light, complete, and consistent with their implementations."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from methodbench.entries import Method
from methodbench.params import describe, resolve
from methodbench.protocols import KINDS
from methodbench_sparse import plugin
from methodbench_sparse.activation_entries import METHODS as ACTIVATION_METHODS
from methodbench_sparse.activation_entries import PROBES
from methodbench_sparse.training_entries import METHODS as TRAINING_METHODS

METHODS = plugin.methodbench_methods()


def implementation(method: Method) -> type:
    module, _, attribute = method.impl.partition(":")
    return getattr(importlib.import_module(module), attribute)


def test_the_family_lists_its_methods_once() -> None:
    (family,) = plugin.methodbench_families()
    names = [method.name for method in METHODS]
    pruners = ["magnitude", "wanda", "sparsegpt", "gblm-pruner", "cfsp", "unified-sparsity", "read-me"]
    listed = (*TRAINING_METHODS, *ACTIVATION_METHODS, *PROBES)
    assert names == [*pruners, *(method.name for method in listed)]
    assert len(set(names)) == len(names)
    assert {method.family for method in METHODS} == {family.name}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_preset_is_valid_and_differs_from_the_others(method: Method) -> None:
    cls = implementation(method)
    resolved = [resolve(cls, preset, method.name) for preset in method.presets.values()]
    assert all(first != other for i, first in enumerate(resolved) for other in resolved[:i])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_implementation_is_of_its_kind_with_described_hyperparameters(method: Method) -> None:
    cls = implementation(method)
    assert isinstance(cls(), KINDS[method.kind])
    rows = describe(cls)
    # How much is left out is a share, the alpha of a rule that decides token by token, or what ReLUs leave out.
    assert method.kind != "compressor" or {"sparsity", "alpha", "shift"} & {row["name"] for row in rows}
    assert all(row["description"] for row in rows)


def test_listing_the_entries_imports_no_torch() -> None:
    code = (
        "import sys; from methodbench_sparse import plugin; plugin.methodbench_methods();"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
