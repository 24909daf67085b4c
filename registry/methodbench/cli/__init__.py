"""The command line. Commands are imported when they are called, so that ``--help`` costs next to nothing."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import click

from methodbench.errors import MethodbenchError

#: Command -> (module:attribute, what it does). A name with a space belongs to the group before the space.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "demo": ("running:demo", "Compare published methods on real models, then build the leaderboard."),
    "list": ("catalogue:list_entries", "List methods, models, tasks, suites or plugins."),
    "show": ("catalogue:show", "Show everything about a method, model, task, suite or run."),
    "plan": ("running:plan", "Show which cells a suite has, which are done, and which are skipped and why."),
    "run": ("running:run", "Run what is missing of a suite, or one cell given by options."),
    "status": ("records:status", "Count what is done, failed and missing."),
    "results": ("records:results", "Print results with their intervals."),
    "compare": ("records:compare", "Compare two methods on the cells that both share, paired."),
    "claims": ("claims:claims", "Say which claims of the papers the records reproduce."),
    "why": ("repeating:why", "Explain why a cell is a hit, a miss or stale, field by field."),
    "replay": ("repeating:replay", "Run a recorded run again and compare the two bit by bit."),
    "diff": ("repeating:diff", "Show where two runs part: setting, layer, step or unit."),
    "export": ("exchange:export", "Write records as a capsule, or as CSV, Parquet, JSON or every_eval_ever."),
    "import": ("exchange:import_records", "Check capsules and put their records into the database."),
    "merge": ("exchange:merge_databases", "Put the records of other databases into this one."),
    "new": ("authoring:new", "Write a package with a method of your own."),
    "check": ("authoring:check", "Hold methods against the contract of their kind and what they declare."),
    "site": ("site:site", "Build the leaderboard, look at it, check and publish it."),
    "sources": ("sources:sources", "Fetch weights ahead of time."),
    "doctor": ("doctor:doctor", "Check the installation, the plugins and the database."),
}


#: What the command line ends with.
EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "done, but something failed or was left out",
    2: "a mistake that the message explains",
    130: "stopped with Ctrl-C",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"methodbench.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.5)
            ctx.fail(f"no command {name!r}." + (f" Did you mean {' or '.join(near)}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option("--no-plugin", "without", multiple=True, metavar="NAME", help="Leave out a plugin; repeatable.")
@click.version_option(package_name="methodbench")
@click.pass_context
def cli(ctx: click.Context, debug: bool, without: tuple[str, ...]) -> None:
    """Reproducible comparison of published machine-learning methods.

    Start with `methodbench demo`, then open site/index.html.
    """
    ctx.obj = {"debug": debug, "without": without}


def main(argv: list[str] | None = None) -> Any:
    """Run the command line; returns only by SystemExit."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = cli.main(arguments, prog_name="methodbench", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except MethodbenchError as error:
        if "--debug" in arguments:
            raise
        click.secho(f"Error: {error.message}", fg="red", err=True)
        if error.hint:
            click.echo(error.hint, err=True)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, click.Abort):
        click.echo("Stopped. What was finished is kept; the same command goes on from there.", err=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of a pipe has left (`| head`): nothing is wrong.
        sys.stderr.close()
        raise SystemExit(0) from None
    raise SystemExit(code if isinstance(code, int) else 0)
