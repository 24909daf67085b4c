from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from methodbench.params import build
from methodbench.protocols import KINDS, MethodTask
from methodbench_optim import plugin

METHODS = {method.name: method for method in plugin.methodbench_methods()}
TASKS = {task.name: task for task in plugin.methodbench_tasks()}


def load(impl: str) -> type:
    module, attribute = impl.split(":")
    return getattr(importlib.import_module(module), attribute)


def test_listing_the_family_imports_no_torch():
    code = (
        "import sys, methodbench_optim.plugin as p; p.methodbench_methods(); p.methodbench_tasks();"
        "assert not {'torch', 'numpy', 'sklearn', 'pydantic'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_builds_with_its_defaults_and_presets(name):
    entry = METHODS[name]
    implementation = load(entry.impl)
    for passed in ({}, *entry.presets.values()):
        method = build(implementation, dict(passed), name)
        assert isinstance(method, KINDS[entry.kind])
        for field, value in passed.items():
            assert getattr(method, field) == value


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_builds_and_names_its_scores(name):
    entry = TASKS[name]
    task = build(load(entry.impl), dict(entry.options), name)
    assert isinstance(task, MethodTask)
    documented = type(task).__doc__ or ""
    for metric in entry.metrics:
        assert f"``{metric.name}``" in documented
    for axis in entry.axes:
        assert f"``{axis.series}``" in documented
        for setting in filter(None, (axis.every, axis.last, axis.at)):
            assert hasattr(task, setting)


def test_all_belong_to_the_family_of_the_plugin():
    (family,) = plugin.methodbench_families()
    assert {method.family for method in METHODS.values() if not method.baseline} == {family.name}
    assert {method.kind for method in METHODS.values()} == {"optimizer", "training"}
