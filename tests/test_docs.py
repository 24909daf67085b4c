"""The documentation tells the truth: its commands exist, and its example of a method works as written."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from methodbench import hookspecs
from methodbench.catalog import Catalog, load_catalog, load_implementation
from methodbench.cli import COMMANDS, cli
from methodbench.suite import parse_suite

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands() -> list[list[str]]:
    lines = [
        line for text in (README, CONTRIBUTING) for block in blocks(text, "sh") for line in block.splitlines()
    ]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("methodbench ")]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_in_the_documentation_parses(words: list[str]) -> None:
    import click

    command: click.Command = cli
    context = click.Context(cli)
    arguments = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(context, arguments[0])
        assert found is not None, f"no command {arguments[0]}"
        command, arguments = found, arguments[1:]
    command.make_context(words[1], arguments)


def test_every_command_is_mentioned_in_the_readme() -> None:
    for name in COMMANDS:
        assert re.search(rf"(methodbench|make) {name}\b|`{name}`", README) or name in ("status", "sources"), (
            name
        )


def test_methods_and_tasks_in_the_readmes_table_are_those_that_are_installed(catalog: Catalog) -> None:
    table = README.split("## What there is")[1].split("\n\n")[1]
    named = set(re.findall(r"`([a-z0-9-]+)`", table))
    assert set(catalog.methods) - {"identity"} <= named
    unknown = named - set(catalog.methods) - set(catalog.tasks) - {"-f3"}
    assert not unknown


def test_the_suite_in_the_readme_is_valid() -> None:
    (text,) = blocks(README, "yaml")
    suite = parse_suite(text, "README.yaml")
    assert suite.name == "three-bits"


def test_the_readme_opens_with_the_two_commands() -> None:
    first = blocks(README, "sh")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z]+)", README + CONTRIBUTING, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_method_of_the_contributing_page_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from methodbench import params
    from methodbench.context import Context
    from methodbench.torchkit.adapters import detect
    from methodbench.torchkit.model import Calibration, LoadedModel

    plugin, implementation = blocks(CONTRIBUTING, "python")
    package = tmp_path / "methodbench_halve"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(plugin)
    (package / "halve.py").write_text(implementation)
    monkeypatch.syspath_prepend(str(tmp_path))
    installed = load_catalog(points=[EntryPoint("halve", "methodbench_halve.plugin", hookspecs.GROUP)])
    assert installed.problems == []
    method = installed.method("halve")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    module = transformers.LlamaForCausalLM(config).eval()
    model = LoadedModel("tiny", "causal-lm", module, detect(module))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    built = params.build(load_implementation(method.impl), method.presets["odd"], method.name)
    halved = built.compress(model, Calibration.none(), Context())
    for linear in halved.adapter.targets(halved.module).values():
        assert not linear.weight[:, 1::2].any()
        assert linear.weight[:, ::2].all()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    sys.modules.pop("methodbench_halve", None)


def test_every_hook_is_documented() -> None:
    for name in dir(hookspecs):
        if name.startswith("methodbench_"):
            text = getattr(hookspecs, name).__doc__ or ""
            assert len(text.split()) >= 10, name


def test_every_field_of_a_suite_is_described() -> None:
    from methodbench.suite import Comparison, MethodUse, Suite, TaskUse

    for model in (Suite, Comparison, MethodUse, TaskUse):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
