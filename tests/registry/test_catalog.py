"""The catalogue survives plugins that are broken in every way that we can think of."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from methodbench import hookimpl, hookspecs
from methodbench.catalog import Catalog, load_catalog
from methodbench.entries import EntryError, Method, Metric, Model, Task
from methodbench.errors import UnknownNameError

BUILTIN = EntryPoint("builtin", "methodbench.builtin.plugin", "methodbench")


def _method(name: str = "fine", **more: object) -> Method:
    fields = {"kind": "compressor", "family": "f", "impl": "a.b:C", "summary": "s", **more}
    return Method(name=name, **fields)  # type: ignore[arg-type]


def _plugin(monkeypatch: pytest.MonkeyPatch, name: str, **hooks: object) -> EntryPoint:
    module = types.ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, f"methodbench_{hook}", function)
    monkeypatch.setitem(sys.modules, name, module)
    return EntryPoint(name, name, "methodbench")


def _hook(value: object) -> object:
    def function() -> object:
        if isinstance(value, BaseException):
            raise value
        return value

    return function


def _methods(value: object) -> object:
    function = _hook(value)
    function.__name__ = "methodbench_methods"  # type: ignore[attr-defined]
    return hookimpl(function)  # type: ignore[type-var]


def _unknown_argument() -> object:
    @hookimpl
    def methodbench_methods(nonsense: object) -> list[Method]:
        return []

    return methodbench_methods


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (RuntimeError("boom"), "RuntimeError: boom"),
        (None, "TypeError"),
        (["text"], "returned str, not Method"),
        ([_method("identity")], "method 'identity' is already registered by builtin"),
        ([_method(), _method()], "method 'fine' is already registered by bad"),
        ([_method(kind="nonsense")], "method 'fine' is of unknown kind 'nonsense'"),
        (SystemExit(1), "SystemExit"),
    ],
)
def test_a_broken_hook_is_named_and_everything_else_works(
    monkeypatch: pytest.MonkeyPatch, value: object, problem: str
) -> None:
    good = _plugin(monkeypatch, "good", methods=_methods([_method("other")]))
    bad = _plugin(monkeypatch, "bad", methods=_methods(value))
    catalog = load_catalog(points=[BUILTIN, bad, good])
    assert {"identity", "other"} <= catalog.methods.keys()
    assert [(p.plugin, problem in p.error) for p in catalog.problems] == [("bad", True)], catalog.problems


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("def (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("from methodbench.entries import Family\nFamily(name='Bad Name', title='', summary='')", "EntryError"),
        ("from methodbench import hookimpl\n@hookimpl\ndef methodbench_typo():\n    return []", "methodbench_typo"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, problem: str
) -> None:
    (tmp_path / "hopeless_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hopeless_plugin", raising=False)
    catalog = load_catalog(points=[BUILTIN, EntryPoint("hopeless", "hopeless_plugin", "methodbench")])
    assert "identity" in catalog.methods
    assert [p.plugin for p in catalog.problems] == ["hopeless"]
    assert problem in catalog.problems[0].error


def _write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> EntryPoint:
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return EntryPoint(name, name, "methodbench")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 0\nfor i in range(20_000_000): x += i", "CPU seconds, and the budget is 0.10"),
        ("METHODBENCH_HOOKS = 0", "hook version 0, and this methodbench speaks version 1: update the plugin"),
        (
            "METHODBENCH_HOOKS = 99",
            "hook version 99, and this methodbench speaks version 1: update methodbench",
        ),
        ("METHODBENCH_HOOKS = 'one'", "METHODBENCH_HOOKS is 'one', not a whole number"),
        (
            "from methodbench import hookimpl\nfrom methodbench.entries import Method\n@hookimpl\n"
            "def methodbench_methods():\n    while True:\n        yield 1",
            "more than 10,000 entries",
        ),
        (
            "from methodbench import hookimpl\nfrom methodbench.entries import Method\n@hookimpl\n"
            "def methodbench_methods():\n"
            "    return [Method(name='m', kind='probe', family='f', impl='a.b:C', summary='s', applies_to=('vit'))]",
            "applies_to is 'vit', not a tuple",
        ),
    ],
    ids=["laborious", "older", "newer", "version-of-text", "endless", "text-for-tuple"],
)
def test_a_plugin_out_of_bounds_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, problem: str
) -> None:
    monkeypatch.setenv("METHODBENCH_IMPORT_BUDGET", "0.1")
    good = _plugin(monkeypatch, "good", methods=_methods([_method("other")]))
    catalog = load_catalog(points=[BUILTIN, _write(tmp_path, monkeypatch, "odd_plugin", source), good])
    assert {"identity", "other"} <= catalog.methods.keys()
    assert [(p.plugin, problem in p.error) for p in catalog.problems] == [("odd_plugin", True)], (
        catalog.problems
    )


def test_an_import_that_hangs_is_broken_off(tmp_path: Path) -> None:
    (tmp_path / "sleepy.py").write_text("import time\ntime.sleep(60)")
    # In a process of its own: the test runner holds the alarm signal itself.
    code = (
        "import sys; from importlib.metadata import EntryPoint; from methodbench import catalog\n"
        f"sys.path.insert(0, {str(tmp_path)!r}); catalog.IMPORT_LIMIT = 0.3\n"
        "points = [EntryPoint('builtin', 'methodbench.builtin.plugin', 'methodbench'),"
        " EntryPoint('sleepy', 'sleepy', 'methodbench')]\n"
        "found = catalog.load_catalog(points=points)\n"
        "print(found.problems[0].error, '/', *found.methods)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.strip() == "its import was broken off after 0.3 seconds / identity", done.stderr


def test_two_plugins_of_one_name_leave_the_first_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = _plugin(monkeypatch, "first_module", methods=_methods([_method("one")]))
    second = _plugin(monkeypatch, "second_module", methods=_methods([_method("two")]))
    points = [EntryPoint("twin", point.value, "methodbench") for point in (first, second)]
    catalog = load_catalog(points=points)
    assert list(catalog.methods) == ["one"]
    assert "the name is taken by first_module" in catalog.problems[0].error


def test_what_a_plugin_prints_while_it_loads_stays_off_standard_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = load_catalog(points=[BUILTIN, _write(tmp_path, monkeypatch, "chatty_plugin", "print('hello')")])
    assert catalog.problems == []
    assert capsys.readouterr() == ("", "hello\n")


def test_arguments_and_hooks_that_are_to_go_are_named_and_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = types.ModuleType("specs")
    vars(specs).update(vars(hookspecs))
    spec = hookspecs.hookspec(
        warn_on_impl_args={"board": DeprecationWarning("the argument board goes in version 2")}
    )

    def methodbench_methods(board: object) -> list[Method]:
        raise NotImplementedError

    specs.methodbench_methods = spec(methodbench_methods)  # type: ignore[attr-defined]

    plugin = _plugin(monkeypatch, "elder", methods=_takes_board())
    catalog = load_catalog(points=[BUILTIN, plugin], specs=specs)
    assert [(r.plugin, "the argument board goes in version 2" in r.error) for r in catalog.remarks] == [
        ("elder", True)
    ]


def _takes_board() -> object:
    @hookimpl
    def methodbench_methods(board: object) -> list[Method]:
        return []

    return methodbench_methods


def test_a_hook_with_an_unknown_argument_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = _plugin(monkeypatch, "bad", methods=_unknown_argument())
    catalog = load_catalog(points=[BUILTIN, bad])
    assert "nonsense" in catalog.problems[0].error
    assert "identity" in catalog.methods


def test_plugins_can_be_left_out(toy_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [BUILTIN, EntryPoint("toybench", "toybench.plugin", "methodbench")]
    assert "noop" in load_catalog(points=points).methods
    assert "noop" not in load_catalog(points=points, without=["toybench"]).methods
    monkeypatch.setenv("METHODBENCH_NO_PLUGIN", "toybench")
    assert "noop" not in load_catalog(points=points).methods


def test_names_are_looked_up_with_the_nearest_ones_in_the_message(catalog: Catalog) -> None:
    assert catalog.method("noop").family == "toy"
    with pytest.raises(UnknownNameError, match="Did you mean noop"):
        catalog.method("nop")
    with pytest.raises(UnknownNameError, match="Did you mean toy-linear"):
        catalog.model("toy-linaer")


def test_a_plugin_that_fails_on_a_qualified_name_is_named(catalog: Catalog) -> None:
    with pytest.raises(UnknownNameError):
        catalog.task("toy:many")
    assert any("ValueError" in problem.error for problem in catalog.problems)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _method("Upper"),
        lambda: _method("../escape"),
        lambda: _method(impl="no colon"),
        lambda: _method(fidelity="hearsay"),
        lambda: _method(presets={"Bad Preset": {}}),
        lambda: Metric(name="m", direction="sideways"),  # type: ignore[arg-type]
        lambda: Model(name="m", kind="k", source="nowhere", loader="a.b:C", summary="s"),
        lambda: Task(name="t", kinds=("probe",), impl="a.b:C", summary="s", metrics=(), protocol=1),
        lambda: Task(
            name="t", kinds=("probe",), impl="a.b:C", summary="s", protocol=0,
            metrics=(Metric(name="m", direction="lower", primary=True),),
        ),
    ],
)  # fmt: skip
def test_entries_that_contradict_themselves_are_refused(make: object) -> None:
    with pytest.raises(EntryError):
        make()  # type: ignore[operator]


def test_installed_plugins_load_without_problems_and_without_heavy_imports() -> None:
    code = (
        "import sys; from methodbench.catalog import load_catalog; catalog = load_catalog()\n"
        "assert not catalog.problems, catalog.problems\n"
        "heavy = {'torch', 'sqlmodel', 'polars', 'numpy', 'pydantic', 'transformers', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "print(len(catalog.methods))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 14
