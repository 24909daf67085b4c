"""The command line: start-up, messages, exit codes, answers for machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from methodbench import cli as cli_package
from methodbench.catalog import Catalog
from methodbench.cli import COMMANDS, main
from methodbench.cli.output import duration, interval, number, size

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Cli:
    """Run a command against the toy plugin in a folder of its own; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("methodbench.catalog.load_catalog", lambda **options: catalog)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_every_command_has_help_and_a_summary(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for name, (_, summary) in COMMANDS.items():
        assert name in out
        assert summary.split(",")[0] in " ".join(out.split())
        assert cli(name, "--help")[0] == 0


def test_help_and_list_import_nothing_heavy() -> None:
    heavy = (
        "{'torch', 'sqlmodel', 'sqlalchemy', 'polars', 'pydantic', 'numpy', 'rich', 'transformers', 'yaml'}"
    )
    for arguments in (["--help"], ["list"], ["list", "methods", "--json"]):
        code = (
            "import sys\nfrom methodbench.cli import main\n"
            f"try:\n    main({arguments})\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
            f"heavy = {heavy} & sys.modules.keys()\nassert not heavy, heavy\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.alone
def test_list_and_help_stay_within_a_fifth_of_a_cpu_second() -> None:
    import resource

    # Where bytecode is not written, every start compiles: nobody's start-up but that of a few build machines.
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def cpu_seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "methodbench.cli", *arguments]
        subprocess.run(command, capture_output=True, check=True, env=usual)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Neighbours on shared cores make CPU seconds longer, never shorter: the least of some tries is the command's own.
    for arguments in (("--help",), ("list",)):
        tries = [cpu_seconds(*arguments)]
        while min(tries) > 0.20 and len(tries) < 40:
            tries.append(cpu_seconds(*arguments))
        assert min(tries) <= 0.20


def test_run_results_show_compare_status_and_plan_work_together(cli: Cli) -> None:
    code, out, _ = cli("plan", "toy-suite")
    assert code == 0
    assert "12 cells: 0 done, 12 to run; 2 skipped" in out
    code, out, _ = cli("run", "toy-suite")
    assert code == 0, out
    assert "12 cells run, 0 were done before." in out
    assert "[12/12] ok" in out
    code, out, _ = cli("run", "toy-suite")
    assert (code, "Nothing to do: all 12 cells are done." in out) == (0, True)
    code, out, _ = cli("status", "toy-suite", "--json")
    assert json.loads(out)["suites"]["toy-suite"] == {"ok": 12, "skipped": 2}
    code, out, _ = cli("results", "--method", "noop", "--json")
    rows = json.loads(out)
    assert {row["metric"] for row in rows} == {"value", "square"}
    code, out, _ = cli("results", "--metric", "square")
    assert out.count("square") == 8
    code, out, _ = cli("show", rows[0]["run"])
    assert "repeat with" in out
    assert rows[0]["run"] in out
    code, out, _ = cli("show", rows[0]["run"], "--json")
    assert len(json.loads(out)["metrics"][0]["scores"]) == 4
    code, out, _ = cli("compare", "noop@twice", "noop@value=3.0", "--json")
    (paired,) = json.loads(out)
    assert paired["verdict"] == "loss"
    assert paired["difference"] == pytest.approx(-1.0)
    assert paired["seeds"] == 2
    code, out, _ = cli("compare", "scale", "identity")
    assert "wins" in out


def test_options_take_the_place_of_what_a_suite_says(cli: Cli) -> None:
    own = json.loads(cli("plan", "toy-suite", "--json")[1])["cells"]
    options = ("--seed", "7", "--device", "cuda", "--dtype", "float64", "--threads", "3")
    chosen = json.loads(cli("plan", "toy-suite", *options, "--json")[1])["cells"]
    assert 0 < len(chosen) < len(own), "one seed where the suite has several"
    for field, value in {"seed": 7, "device_class": "cuda", "dtype": "float64", "threads": 3}.items():
        assert {cell["identity"][field] for cell in chosen} == {value}
        assert {cell["identity"][field] for cell in own} != {value}
    settings = {(cell["identity"]["method"], str(cell["identity"]["method_params"])) for cell in own}
    assert {
        (cell["identity"]["method"], str(cell["identity"]["method_params"])) for cell in chosen
    } == settings
    models = json.loads(cli("plan", "toy-suite", "--model", "planted-decoder", "--json")[1])["cells"]
    assert {cell["identity"]["model"] for cell in models} <= {"planted-decoder", "", None}


def test_the_command_of_a_record_runs_that_record_again(cli: Cli) -> None:
    assert (
        cli(
            "run",
            "--method",
            "noop",
            "--param",
            "value=2.5",
            "--task",
            "toy-value",
            "--task-param",
            "units=3",
        )[0]
        == 0
    )
    rows = json.loads(cli("results", "--json")[1])
    record = json.loads(cli("show", rows[0]["run"], "--json")[1])
    import shlex

    code, out, _ = cli(*shlex.split(record["command"])[1:])
    assert code == 0
    assert "Nothing to do" in out


def test_a_failed_cell_makes_exit_code_1_and_its_reason_is_shown(cli: Cli) -> None:
    code, out, _ = cli("run", "--method", "misbehave", "--task", "toy-value")
    assert code == 1
    assert "RuntimeError: the toy broke" in out
    code, out, _ = cli("results", "--failed")
    assert "RuntimeError: the toy broke" in out
    run = out.splitlines()[1].split()[0]
    assert 'raise RuntimeError("the toy broke")' in cli("show", run)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rnu",), "Did you mean run"),
        (("run", "toy-siute"), "Did you mean toy-suite"),
        (("run",), "Give a suite"),
        (("run", "toy-suite", "--method", "noop"), "not both"),
        (("run", "toy-suite", "--param", "value=1"), "--param belongs to --method and --task"),
        (("run", "toy-suite", "--device", "tpu"), "device = 'tpu'"),
        (("run", "--method", "nop", "--task", "toy-value"), "Did you mean noop"),
        (
            ("run", "--method", "noop", "--param", "value=11", "--task", "toy-value"),
            "noop: value = 11 is not valid",
        ),
        (("run", "--method", "noop", "--param", "value", "--task", "toy-value"), "does not read NAME=VALUE"),
        (("run", "--method", "noop", "--task", "toy-value", "--device", "tpu"), "device = 'tpu'"),
        (
            ("run", "--method", "noop", "--task", "toy-value", "--executor", "cloud"),
            "unknown executor 'cloud'",
        ),
        (("run", "absent.yaml"), "no suite file absent.yaml"),
        (("show", "nop"), "Did you mean noop"),
        (("results",), "no results yet"),
        (("compare", "a", "b"), "no results yet"),
        (("site", "serve"), "Build it first"),
        (("list", "nonsense"), "nonsense"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(
    cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = cli(*arguments)
    assert code == 2, out
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(cli: Cli) -> None:
    from methodbench.errors import UnknownNameError

    with pytest.raises(UnknownNameError):
        main(["--debug", "show", "nop"])


def test_show_prints_the_parameters_of_a_method_with_their_ranges(cli: Cli) -> None:
    code, out, _ = cli("show", "noop")
    assert code == 0
    assert "value" in out
    assert "≥ 0" in out
    assert "what it returns" in out
    assert json.loads(cli("show", "noop", "--json")[1])["parameters"][0]["default"] == 1.0
    assert "toybench.models:ToyLoader" in cli("show", "toy-linear")[1]
    assert "higher is better" in cli("show", "toy-value")[1]
    assert "toy-linear" in cli("show", "toy-suite")[1]


def test_doctor_names_what_is_wrong(cli: Cli, catalog: Catalog) -> None:
    from methodbench.catalog import PluginProblem

    assert cli("doctor")[0] == 0
    catalog.problems.append(PluginProblem("broken-one", "ImportError: x"))
    code, out, _ = cli("doctor")
    assert code == 1
    assert "broken-one" in out
    Path("methodbench.db").write_text("damaged " * 999)
    assert "damaged" in cli("doctor")[1]


def test_sources_fetch_says_what_it_could_not_have(cli: Cli) -> None:
    code, out, err = cli("sources", "fetch", "toy-linear", "toy-file")
    assert code == 1
    assert "toy-linear: made here when first used" in out
    assert "METHODBENCH_MODELS" in err


def test_numbers_are_written_with_the_digits_that_matter() -> None:
    assert [number(value) for value in (36.6712, 0.0, None, float("inf"), 1234567.0, 0.64, 2e-7, 99999.0)] == [
        "36.67", "0", "–", "inf", "1.235e+06", "0.6400", "2.000e-07", "99999",
    ]  # fmt: skip
    assert interval(1, 2.5) == "[1.000, 2.500]"
    assert interval(None, 1) == ""
    assert [duration(value) for value in (0.02, 12.34, 75, 3700)] == [
        "20 ms",
        "12.3 s",
        "1 min 15 s",
        "1 h 01 min",
    ]
    assert [size(value) for value in (None, 5, 2048, 5 * 2**30)] == ["–", "5 B", "2.0 KiB", "5.00 GiB"]


def test_the_exit_codes_are_documented() -> None:
    assert set(cli_package.EXIT_CODES) == {0, 1, 2, 130}
    for code, meaning in cli_package.EXIT_CODES.items():
        assert f"{code} {meaning}" in (cli_package.cli.epilog or "")


def test_a_closed_pipe_is_no_error() -> None:
    script = f"{sys.executable} -m methodbench.cli list --json | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert "Traceback" not in done.stderr


def test_claims_are_shown_with_verdicts_numbers_and_how_to_test_them(cli: Cli) -> None:
    code, out, err = cli("claims")
    assert code == 0
    assert "No results yet" in err
    assert "2 claims: 2 not attempted." in out
    code, out, _ = cli("claims", "noop")
    assert "a paper of toys, Table 1, measured by the authors" in out
    assert "try: methodbench run --method noop@twice --method noop --task toy-value" in out
    assert cli("run", "--method", "noop@twice", "--method", "noop", "--task", "toy-value")[0] == 0
    code, out, _ = cli("claims", "noop")
    assert code == 0
    assert "reproduced  Twice the value is more than once." in out
    assert "contradicted  Twice the value is less than once." in out
    assert "2 claims: 1 reproduced, 1 contradicted." in out
    code, out, _ = cli("claims", "noop", "--json")
    (found,) = json.loads(out)
    assert [claim["verdict"] for claim in found["claims"]] == ["reproduced", "contradicted"]
    assert found["claims"][0]["conditions"][0]["units"] == 4
    assert found["reported"][0]["values"][0]["value"] == 2.0
    code, _, err = cli("claims", "scale")
    assert (code, "scale has no claims" in err) == (2, True)
    code, _, err = cli("claims", "nop")
    assert (code, "Did you mean noop?" in err) == (2, True)


def test_a_chain_runs_and_is_compared_with_its_links(cli: Cli) -> None:
    where = ("--model", "toy-linear", "--task", "toy-mean")
    chain = "zero-columns@two + round@coarse"
    links = ("--method", "identity", "--method", "zero-columns@two", "--method", "round@coarse")
    assert cli("run", "--method", chain, *links, *where)[0] == 0
    code, out, _ = cli("compare", chain)
    assert code == 0
    header, row, *_ = out.splitlines()
    assert [name in header for name in ("zero-columns", "round", "sum", "together", "excess")] == [True] * 5
    assert row.startswith(("the sum", "more than the sum", "harmful"))
    code, out, _ = cli("compare", chain, "identity", "--json")
    assert json.loads(out)[0]["variant_a"] == "two + coarse"
    code, _, err = cli("compare", "noop")
    assert (code, "Give two methods, or one chain" in err) == (2, True)
    code, _, err = cli("run", "--method", "round + zero-columns", *where)
    assert (code, "zero-columns (prune) cannot follow round (quantize)" in err) == (2, True)
