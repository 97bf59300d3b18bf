"""`alma list`, `alma compare`, `alma gc` and `alma sweep`: their options, and what they print."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.cli_arguments import Json, RecipeFile, split
from pipeline.core.errors import UserError
from pipeline.core.terminal import byte_size, plural, show

Folder = Annotated[Path, typer.Argument(help="Folder with runs, or the folder of one run.")]
RUNS = Path("runs")


def list_runs(folder: Folder = RUNS, as_json: Json = False) -> None:
    """The runs in a folder, with stages, states, sizes and last metrics; of one run, its stages."""
    from pipeline.manage.listing import entry_of, runs_in, show_runs, show_stages
    from pipeline.report.run_folder import read_run, stage_folders

    if folder.is_dir() and stage_folders(folder):
        entry = entry_of(read_run(folder))
        if as_json:
            print(json.dumps(asdict(entry), ensure_ascii=False))
        else:
            show_stages(entry)
        return
    entries = runs_in(folder)
    if as_json:
        print(json.dumps({"runs": [asdict(entry) for entry in entries]}, ensure_ascii=False))
    else:
        show_runs(entries)


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/a.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run.")],
    everything: Annotated[bool, typer.Option("--all", help="Also the numbers that are equal.")] = False,
    as_json: Json = False,
) -> None:
    """What differs between two runs: keys of their recipes, results, numbers; `alma report A B` also draws the
    curves."""
    from pipeline.manage.comparison import compared, show_comparison
    from pipeline.report.run_folder import read_run

    result = compared(read_run(first), read_run(second))
    if as_json:
        print(json.dumps(asdict(result), ensure_ascii=False))
    else:
        show_comparison(result, everything)


def sweep(
    recipe: RecipeFile,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of stages; keys with several values, which are swept; keys with one, which all members have.",
            metavar="[STAGE|key=a,b,c|key=value]...",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--random",
            min=1,
            help="So many random members instead of the grid; keys may be log:1e-4..1e-2 or linear:0..1.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --random.")] = 0,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What members are compared by, such as pretrain.heldout_loss.")
    ] = None,
    highest: Annotated[
        bool | None,
        typer.Option("--highest/--lowest", help="Which value of the metric is best; by default the lowest of losses."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the members and what each would run.")] = False,
    on: Annotated[str | None, typer.Option("--on", hidden=True)] = None,
) -> None:
    """Run a recipe with several values of its keys, each member a run of its own, and compare what they measured. The
    same command continues a sweep that was stopped."""
    from pipeline.core.launch import StageFailed
    from pipeline.manage import sweep as sweeping
    from pipeline.manage.sweep_plan import sweep_plan

    if on is not None:
        raise UserError(
            f"alma sweep has no --on {on}: its members run one after another and share stages; submit the sweep as one"
            " job, which the same command continues (sbatch --wrap 'alma sweep ...'), or each member as a run of"
            f" its own (alma run {recipe} name=NAME key=value --on slurm)"
        )
    stages, overrides = split(words)
    plan = sweep_plan(recipe, overrides, stages, count, seed)
    if dry_run:
        sweeping.show_plan(plan)
        return
    results = sweeping.run(plan, metric, highest)
    sweeping.show_results(plan, results, metric, highest)
    failed = [result.name for result in results if result.state == "failed"]
    if failed:
        raise StageFailed("sweep", 1, f"{plural(len(failed), 'member')} failed: {', '.join(failed)}")


def gc(
    folder: Folder = RUNS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what can go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what no stage, resume or lineage needs: superseded checkpoints, old outputs that nothing refers to, runs
    that were set aside. Shows what goes and how much it frees, and asks."""
    from pipeline.manage.garbage import removable, remove
    from pipeline.manage.listing import run_paths
    from pipeline.report.run_folder import stage_folders

    if yes and dry_run:
        raise UserError("--yes removes and --dry-run does not: give one of the two")
    if as_json and not (yes or dry_run):
        raise UserError("--json does not ask: give --dry-run or --yes with it")
    runs = [folder] if folder.is_dir() and stage_folders(folder) else run_paths(folder)
    if not runs:
        raise UserError(f"{folder}: has no runs; give a folder such as runs, or the folder of one run")
    plan = removable(runs)
    if not as_json:
        _show_plan(plan)
    if plan.items and not dry_run:
        if not yes:
            _confirm(plan)
        removed = remove(plan, runs)
        if not as_json:
            _show_removed(removed)
        plan = removed
    if as_json:
        items = [{**asdict(item), "path": str(item.path)} for item in plan.items]
        for item in items:
            del item["locks"]
        print(json.dumps({"removed": not dry_run, "bytes": plan.bytes, "items": items, "left_alone": plan.left_alone}))


def _show_plan(plan) -> None:
    from pipeline.checks.tables import console, new_table

    for line in plan.left_alone:
        show(f"left alone: {line}")
    if not plan.items:
        show("nothing can be removed")
        return
    table = new_table("what", "size", "why", text=("what", "why"))
    for item in plan.items:
        table.add_row(str(item.path), byte_size(item.bytes), item.why)
    console().print(table)
    show(f"{plural(len(plan.items), 'folder')}, {byte_size(plan.bytes)}")
    show("not known here: checkpoints that branches (from_step) of recipes that have never run will start from")


def _confirm(plan) -> None:
    """Ask. Raises UserError where nobody can answer, and ends the command with code 0 on a no."""
    if not sys.stdin.isatty():
        raise UserError("nothing was removed, because there is no terminal to ask on: give --yes to remove these")
    answer = input(f"Remove {plural(len(plan.items), 'folder')} and free {byte_size(plan.bytes)}? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        show("nothing was removed")
        raise typer.Exit()


def _show_removed(removed) -> None:
    for line in removed.left_alone:
        show(f"left alone: {line}")
    show(f"{plural(len(removed.items), 'folder')} removed, {byte_size(removed.bytes)} freed")
