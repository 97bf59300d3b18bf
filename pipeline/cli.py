"""The `alma` command: run a recipe's chain, look at it, verify it."""

import json
import os
import shlex
import signal
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__
from pipeline.checks import inspect_commands as inspection
from pipeline.checks import plan_commands
from pipeline.checks import verify_commands as verify
from pipeline.cluster import queue_commands
from pipeline.cluster.job_files import folder_of
from pipeline.cluster.queue import views
from pipeline.core import chain, shipped_recipes
from pipeline.core.chain_summary import show_chain
from pipeline.core.cli_arguments import Json, RecipeFile, Words, check_stage_names, split
from pipeline.core.errors import EXIT_USER, UserError
from pipeline.core.external_inputs import must_be_fetched
from pipeline.core.files import write_atomic
from pipeline.core.graph import Node
from pipeline.core.launch import StageFailed
from pipeline.core.precheck import checked, lacking
from pipeline.core.recipe import load
from pipeline.core.stage import guarded
from pipeline.core.status import examine
from pipeline.core.terminal import keep_open, plural, show
from pipeline.manage import commands as manage_commands
from pipeline.report import commands as report_commands
from pipeline.serve import commands as serving

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Raw text to an aligned chat model, from one recipe.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(no_args_is_help=True, help="List and copy the recipes that come with alma, check a recipe.")
app.add_typer(verify.app, name="verify")
app.add_typer(inspection.app, name="inspect")
app.add_typer(recipe_app, name="recipe")


class Where(StrEnum):
    """Where a chain runs, if not here."""

    slurm = "slurm"


def _version(asked: bool) -> None:
    if asked:
        print(f"alma {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `alma` itself."""


@app.command("run")
def run_command(
    recipe: RecipeFile,
    words: Words = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Set unfinished runs aside and start again; with stage names, run these even if they are up to date.",
        ),
    ] = False,
    fork: Annotated[
        bool, typer.Option("--fork", help="Resume from the last checkpoint of a run that another recipe made.")
    ] = False,
    on: Annotated[
        Where | None, typer.Option("--on", help="Queue one job per stage on this cluster instead of running here.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only show what would run, why, and about how long; with --on slurm, print the job scripts.",
        ),
    ] = False,
) -> None:
    """Run the chain: stages that are up to date are skipped, interrupted ones resume."""
    if restart and fork:
        raise UserError("--restart starts again and --fork resumes from a checkpoint: give one of the two")
    stages, overrides = split(words)
    loaded = load(recipe, overrides)
    if shipped_recipes.located(Path(recipe)) != Path(recipe):
        show(f"{recipe}: the recipe that comes with alma; its runs are kept in {loaded.root.resolve()}")
    if on:
        from pipeline.cluster.submit import show_jobs, submit

        run_on_cluster = show_jobs if dry_run else submit
        run_on_cluster(loaded, stages, restart=restart, fork=fork)
        return
    if dry_run:
        from pipeline.manage.dry_run import dry_run as show_plan

        show_plan(loaded, stages, restart=restart, fork=fork)
        return
    graph = chain.run(loaded, stages, restart=restart, fork=fork)
    show_chain(graph)


@app.command("status")
def status_command(recipe: RecipeFile, words: Words = None, as_json: Json = False) -> None:
    """One line per stage: up to date, stale and why, interrupted at which step, missing, damaged, running and where;
    and its job, if it was queued on a cluster."""
    stages, overrides = split(words)
    loaded = load(recipe, overrides)
    graph = examine(loaded)
    check_stage_names(stages, graph, recipe)
    chosen = {name: node for name, node in graph.items() if not stages or name in stages}
    jobs = views(folder_of(loaded))
    if as_json:
        print(
            json.dumps(
                {
                    name: {
                        "kind": node.config.kind,
                        "state": node.state,
                        "reason": node.reason,
                        "path": str(node.output.path) if node.output else None,
                        "folder": str(node.folder),
                        "nodes": node.config.run.nodes,
                        "minutes": node.config.run.minutes,
                        "job": asdict(jobs[name]) if name in jobs else None,
                    }
                    for name, node in chosen.items()
                }
            )
        )
        return
    for name, node in chosen.items():
        made = f"  {os.path.relpath(node.output.path)}" if node.output else ""
        job = f"  [{jobs[name].text}]" if name in jobs else ""
        show(f"{name:<12} {node.state:<12} {node.reason}{made}{job}".rstrip())


app.command("cancel")(queue_commands.cancel)
app.command("logs")(queue_commands.logs)
app.command("plan")(plan_commands.plan)
app.command("list")(manage_commands.list_runs)
app.command("compare")(manage_commands.compare)
app.command("sweep")(manage_commands.sweep)
app.command("gc")(manage_commands.gc)
app.command("report")(report_commands.report)
app.command("chat")(serving.chat)
app.command("serve")(serving.serve)
app.command("push")(serving.push)


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes that come with alma: `alma run NAME` runs one, `alma recipe copy NAME` gives you its file."""
    names = shipped_recipes.names()
    width = max(map(len, names))
    for name in names:
        show(f"{name:<{width}}  {shipped_recipes.description(name)}")


@recipe_app.command("copy")
def recipe_copy(
    name: Annotated[str, typer.Argument(help="Name of a recipe that comes with alma.")],
    path: Annotated[Path | None, typer.Argument(help="File or folder to write to; by default this folder.")] = None,
) -> None:
    """Write a recipe that comes with alma to a file of yours, to change it."""
    file = shipped_recipes.copy(name, path or Path())
    show(f"{file}: written; run it with: alma run {shlex.quote(str(file))}")


@recipe_app.command("check")
def recipe_check(
    recipe: RecipeFile,
    words: Words = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="Read the first records of every local source, too, and chat templates.")
    ] = False,
) -> None:
    """Read a recipe and check every key, every input and every parallel layout; nothing is run. All mistakes of all
    stages are reported."""
    stages, overrides = split(words)
    _, graph = checked(recipe, overrides, sources)
    check_stage_names(stages, graph, recipe)
    for name, node in graph.items():
        parents = ", ".join(f"{key} <- {_shown(source, graph)}" for key, source in node.parents.items())
        show(f"{name:<12} {node.config.kind:<10} {parents}".rstrip())
    for name, node in graph.items():
        for warning in [*node.config.warnings(), *lacking(node)]:
            show(f"{name}: WARNING: {warning}")
    left = "" if sources else " (--sources reads the first records of local sources, too)"
    show(f"{recipe}: {plural(len(graph), 'stage')}, every key is known{left}")


def _shown(source: str, graph: dict[str, Node]) -> str:
    is_missing = source not in graph and must_be_fetched(source)
    return f"{source} (not here yet: alma run fetches it)" if is_missing else source


@recipe_app.command("schema")
def recipe_schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output if not given.")
    ] = None,
) -> None:
    """The JSON schema of recipes, for completion and checks in an editor."""
    from pipeline.core.recipe_schema import schema

    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    if output:
        write_atomic(output, text)
        print(f"{output}: written")
    else:
        sys.stdout.write(text)


def _commands(context) -> str:
    """The commands there are, for a message about a wrong command line. `context`: click's, of the command with the
    mistake."""
    if context is None:
        return ""
    group = getattr(context.command, "commands", None)
    if not group:
        return f"; {context.command_path} -h shows its arguments"
    width = max(map(len, group))
    rows = [f"  {name:<{width}}  {command.get_short_help_str(100)}" for name, command in group.items()]
    return "\n" + "\n".join([f"{context.command_path} has the commands", *rows])


def main() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # instead of the one for imports (pipeline/__init__.py)
    keep_open()
    code = 0

    def action() -> None:
        nonlocal code
        try:
            code = app(standalone_mode=False) or 0
            if code == 130:  # what typer makes of Ctrl-C, without a message
                raise KeyboardInterrupt
        except StageFailed as failure:
            code = failure.code
            if failure.text:
                show(str(failure), sys.stderr)
        except typer.Exit as leave:
            code = leave.exit_code
        except Exception as error:
            # Usage errors of the command line. typer may bring its own copy of click, so their class is not imported.
            if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
                if not error.format_message():  # `alma` alone: the help was printed
                    code = EXIT_USER
                    return
                raise UserError(f"{error.format_message().rstrip('.')}{_commands(error.ctx)}") from None
            raise

    stopped = guarded(action)
    sys.exit(stopped or code or 0)


if __name__ == "__main__":
    main()
