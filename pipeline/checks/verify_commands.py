"""`alma verify`: its commands and their options. Each proof has its own module, verify_NAME.py."""

from typing import Annotated

import typer

from pipeline.core.cli_arguments import RecipeFile, Words, check_stage_names, one, split
from pipeline.core.graph import nodes
from pipeline.core.recipe import load

app = typer.Typer(no_args_is_help=True, help="Prove on this machine what the documentation claims.")


@app.command("artifacts")
def verify_artifacts(recipe: RecipeFile, words: Words = None) -> None:
    """Hash every file of every published output again and compare it with its manifest, and each parent with its
    recorded digest."""
    from pipeline.checks.verify_artifacts import verify

    stages, overrides = split(words)
    graph = nodes(load(recipe, overrides))
    check_stage_names(stages, graph, recipe)
    verify(graph, stages, recipe)


Keep = Annotated[bool, typer.Option("--keep", help="Keep the proof's working folder.")]
Full = Annotated[bool, typer.Option("--full", help="The model as the recipe has it, whatever its size.")]
Width = Annotated[int, typer.Option("--width", min=8, help="Width to which a model above 5 M parameters is reduced.")]
Layers = Annotated[int, typer.Option("--layers", min=2, help="Layers to which it is reduced.")]


@app.command("parallel")
def verify_parallel(
    recipe: RecipeFile,
    words: Words = None,
    full: Full = False,
    width: Width = 64,
    layers: Layers = 4,
    keep: Keep = False,
) -> None:
    """Train one process, DDP, ZeRO 0-3 and pipelines from one checkpoint and compare every loss and gradient norm.
    Exit code 1: a layout differs."""
    from pipeline.checks.verify_parallel import verify

    stages, overrides = split(words)
    if not verify(load(recipe, overrides), one(stages), full=full, width=width, layers=layers, keep=keep):
        raise typer.Exit(1)


@app.command("resume")
def verify_resume(
    recipe: RecipeFile,
    words: Words = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides the moments at which runs are killed.")] = 0,
    elastic: Annotated[
        bool, typer.Option("--elastic/--same-layout", help="Also move a run from layout to layout.")
    ] = True,
    full: Full = False,
    width: Width = 64,
    layers: Layers = 4,
    keep: Keep = False,
) -> None:
    """Kill a run twice, move another from layout to layout, and compare rows, losses and weights with an undisturbed
    one. Exit code 1: they differ."""
    from pipeline.checks.verify_resume import verify

    stages, overrides = split(words)
    if not verify(
        load(recipe, overrides),
        one(stages),
        seed=seed,
        elastic=elastic,
        full=full,
        width=width,
        layers=layers,
        keep=keep,
    ):
        raise typer.Exit(1)


@app.command("dedup")
def verify_dedup(
    recipe: RecipeFile,
    words: Words = None,
    pairs: Annotated[int, typer.Option("--pairs", min=50, help="Near duplicates to plant per language.")] = 600,
    recall: Annotated[
        float | None,
        typer.Option(
            "--recall",
            help=(
                "Lowest recall allowed at similarities of 0.8 and above; by default what theory expects, less three"
                " standard errors."
            ),
        ),
    ] = None,
    false_merges: Annotated[
        float, typer.Option("--false-merges", help="Largest share of pairs below 0.6 that may be merged.")
    ] = 0.08,
    seed: Annotated[int, typer.Option("--seed", help="Decides which documents are copied, and how.")] = 0,
) -> None:
    """Plant near duplicates in a sample of the recipe's own corpus and count how many are found. Exit code 1: fewer
    than the bar."""
    from pipeline.checks.verify_dedup import verify

    stages, overrides = split(words)
    if not verify(
        load(recipe, overrides), one(stages), pairs=pairs, recall=recall, false_merges=false_merges, seed=seed
    ):
        raise typer.Exit(1)
