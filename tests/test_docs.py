"""The documentation tells the truth: its commands exist, its examples run as written, its reference is complete.

In ``docs/``, every block of ``sh`` or ``python`` is run, with the files that titled blocks of the page hold; a block
of ``text`` behind it is what it prints, where ``...`` stands for anything. What cannot be run here (another machine, a
GPU) stands in blocks of ``console``, whose commands must parse.
"""

from __future__ import annotations

import dataclasses
import html
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from methodbench import hookspecs
from methodbench.catalog import Catalog, load_catalog, load_implementation
from methodbench.cli import COMMANDS, EXIT_CODES, cli
from methodbench.suite import parse_suite
from methodbench.variables import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in ROOT.glob("docs/**/*.md")}
#: One fenced block: its language, its title, its content.
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands() -> list[list[str]]:
    found = []
    for text in (README, CONTRIBUTING, *PAGES.values()):
        for language, _, block in BLOCK.findall(text):
            lines = block.replace("\\\n", " ").splitlines() if language in ("sh", "console") else []
            found += [shlex.split(line, comments=True) for line in lines if line.startswith("methodbench ")]
    return found


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_in_the_documentation_parses(words: list[str]) -> None:
    import click

    command: click.Command = cli
    path, arguments = (
        words[0],
        words[1 : next((at for at, word in enumerate(words) if word in (">", "|", "||")), None)],
    )
    while isinstance(command, click.Group):
        context = command.make_context(path, list(arguments), resilient_parsing=True)
        rest = [*context._protected_args, *context.args]
        if not rest:
            assert arguments == ["--version"], f"{path} {arguments} names no command"
            return
        found = command.get_command(context, rest[0])
        assert found is not None, f"no command {rest[0]}"
        command, path, arguments = found, rest[0], rest[1:]
    command.make_context(path, list(arguments))


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


def runnable() -> list[str]:
    def runs(text: str) -> bool:
        return any(language in ("sh", "python") and not title for language, title, _ in BLOCK.findall(text))

    return sorted(name for name, text in PAGES.items() if runs(text))


@pytest.mark.slow
@pytest.mark.parametrize("name", runnable())
def test_the_examples_of_a_page_run_as_written(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("torch")
    environment = example_environment(tmp_path, tmp_path_factory.getbasetemp() / "cache")
    work = tmp_path / "work"
    work.mkdir()
    printed = ""
    for language, title, block in BLOCK.findall(PAGES[name]):
        if title:
            target = work / title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block)
        elif language == "text":
            for line in block.splitlines():
                pattern = re.escape(" ".join(line.split())).replace(re.escape("..."), ".*")
                assert re.search(pattern, printed), f"{name}: {line!r} is not in\n{printed}"
        elif language in ("sh", "python"):
            command = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": ["python", "-c"]}[language]
            done = subprocess.run(
                [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:], block],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            printed = "\n".join(" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines())
            assert done.returncode == 0, f"{name}:\n{block}\n{printed}"


def example_environment(folder: Path, cache: Path) -> dict[str, str]:
    """Variables of a fresh virtual environment with the libraries of this one, and no way to the network."""
    made = folder / "environment"
    venv.create(made, with_pip=False, symlinks=True)
    (site,) = made.glob("lib/python*/site-packages")
    libraries = sysconfig.get_paths()["purelib"]
    (site / "libraries.pth").write_text(f"import site; site.addsitedir({libraries!r})\n")
    for script, module in (("methodbench", "methodbench.cli"), ("pip", "pip"), ("pytest", "pytest")):
        path = made / "bin" / script
        path.write_text(f'#!/bin/sh\nexec "{made}/bin/python" -m {module} "$@"\n')
        path.chmod(0o755)
    dropped = ("METHODBENCH", "PYTHON", "PIP", "GIT")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {
        **inherited,
        "PATH": f"{made}/bin{os.pathsep}{inherited['PATH']}",
        "HOME": str(folder),
        "METHODBENCH_CACHE": str(cache),
        "METHODBENCH_OFFLINE": "1",
        # What packages need is there already.
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }


def build_documentation(config: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", target],
        cwd=config.parent,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    target = tmp_path_factory.mktemp("documentation")
    done = build_documentation(ROOT / "mkdocs.yml", target)
    assert done.returncode == 0, done.stderr
    return target


def words_of(built: Path, page: str) -> str:
    """What a reader sees of a page of the reference."""
    text = (built / "reference" / f"{page}.html").read_text()
    article = text[text.index("<article") : text.index("</article")]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", article)).split())


def fields_of(built: Path, page: str) -> dict[str, set[str]]:
    """Names in the first column of each table of a page, by the heading above."""
    text = (built / "reference" / f"{page}.html").read_text()
    found: dict[str, set[str]] = {}
    for part in re.split(r"<h[12] ", text)[1:]:
        heading = html.unescape(re.sub(r"<[^>]+>", "", part[part.index(">") + 1 : part.index("</h")])).strip(
            "¶"
        )
        rows = []
        for row in re.findall(r"<tr>(.*?)</tr>", part, re.S):
            cells = [
                re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.S)
            ]
            assert not cells or cells[-1], f"{page}: {heading}: {cells[0]} says nothing"
            rows += cells[:1]
        found[heading] = set(rows)
    return found


def test_the_documentation_is_valid_and_asks_no_other_host_for_anything(built: Path) -> None:
    pytest.importorskip("justhtml")
    from methodbench_leaderboard.check import check_site

    # The page for what is not found is served at any depth, so its links start at the root of the host.
    assert [str(problem) for problem in check_site(built) if problem.path != "404.html"] == []


@pytest.mark.slow
def test_a_broken_link_or_a_page_that_is_missing_breaks_the_documentation(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    project = tmp_path / "project"
    shutil.copytree(ROOT / "docs", project / "docs")
    for name in ("mkdocs.yml", "registry"):
        (project / name).symlink_to(ROOT / name)
    config = project / "mkdocs.yml"
    broken = {
        "nowhere.md": ("how-to/data.md", "[nowhere](nowhere.md)"),
        "no-such-heading": ("how-to/suite.md", "[here](model.md#no-such-heading)"),
        'not included in the "nav"': ("stray.md", "# Stray"),
    }
    config.unlink()
    config.write_text((ROOT / "mkdocs.yml").read_text())
    for page, text in broken.values():
        with (project / "docs" / page).open("a") as file:
            file.write(f"\n\n{text}\n")
    done = build_documentation(config, tmp_path / "out")
    assert done.returncode != 0
    # One build tells all of them, each as a warning that alone would break it.
    warnings = [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "  - "))]
    for sign, (page, _) in broken.items():
        assert [line for line in warnings if page in line], (sign, done.stderr)
        assert sign in done.stderr, sign
    assert f"Aborted with {len(broken)} warnings in strict mode" in done.stdout + done.stderr


def test_every_hook_and_its_arguments_are_in_the_reference(built: Path) -> None:
    import inspect

    text = words_of(built, "hooks")
    for name in dir(hookspecs):
        if name.startswith("methodbench_"):
            assert name in text
            for argument in inspect.signature(getattr(hookspecs, name)).parameters:
                assert re.search(rf"{name} .*\b{argument}\b", text), f"{name}({argument})"


def test_every_kind_protocol_and_property_is_in_the_reference(built: Path) -> None:
    from methodbench import properties, protocols

    text = words_of(built, "kinds")
    for name, protocol in protocols.KINDS.items():
        assert re.search(rf"\b{name} {protocol.__name__}\b", text), name
        for method in vars(protocol):
            assert method.startswith("_") or re.search(rf"\b{method} \( ", text), (
                f"{protocol.__name__}.{method}"
            )
    assert set(properties.PROPERTIES) <= fields_of(built, "kinds")["Properties"]


def test_every_command_and_option_is_in_the_reference(built: Path) -> None:
    import click

    text = words_of(built, "command-line")

    def visit(command: click.Command, path: str) -> None:
        assert f"{path} ¶" in text, path
        section = text.split(f"{path} ¶", 1)[1]
        for option in command.params:
            if isinstance(option, click.Option):
                assert any(name in section for name in option.opts), f"{path} {option.opts}"
                assert option.help, f"{path} {option.opts}"
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child is not None
                visit(child, f"{path} {name}")

    visit(cli, "methodbench")
    assert fields_of(built, "command-line")["Exit codes"] == set(map(str, EXIT_CODES))


def test_every_field_of_suites_claims_entries_and_records_is_in_the_reference(built: Path) -> None:
    from methodbench import claims, entries, suite
    from methodbench.store import schema

    def check(page: str, models: Iterable[type], names: Mapping[type, set[str]]) -> None:
        found = fields_of(built, page)
        for model in models:
            assert found[model.__name__] == names[model], model.__name__

    files = [suite.Suite, suite.Comparison, suite.MethodUse, suite.TaskUse, suite.Pattern]
    files += [claims.Claims, claims.Reported, claims.ReportedValue, claims.Claim, claims.Side]
    check("suites", files, {model: set(model.model_fields) for model in files})
    described = [one for one in vars(entries).values() if dataclasses.is_dataclass(one)]
    check("entries", described, {one: {field.name for field in dataclasses.fields(one)} for one in described})
    tables = [one for one in vars(schema).values() if getattr(one, "__module__", "") == schema.__name__]
    check("records", tables, {one: set(one.model_fields) for one in tables})


def test_every_variable_that_the_code_reads_is_in_the_reference(built: Path) -> None:
    folders = ("registry", "plugins", "leaderboard")
    source = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert set(re.findall(r"METHODBENCH_[A-Z_]+", source)) - {hookspecs.VERSION_ATTRIBUTE} == set(VARIABLES)
    assert fields_of(built, "environment")["Environment variables"] == set(VARIABLES)


def test_everything_that_is_installed_is_in_the_reference(built: Path, catalog: Catalog) -> None:
    text = words_of(built, "installed")
    for name in (*catalog.methods, *catalog.models, *catalog.tasks, *catalog.suites):
        assert name in text, name
