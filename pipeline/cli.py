"""The `alma` command: run a recipe's chain, look at it, verify it."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import artifact, chain
from pipeline.chain import EXIT_USER, StageFailed
from pipeline.errors import UserError
from pipeline.files import write_atomic
from pipeline.graph import Node, check, examine, nodes
from pipeline.plural import many
from pipeline.recipe import load

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Raw text to an aligned chat model, from one recipe.",
)
verify_app = typer.Typer(no_args_is_help=True, help="Prove on this machine what the documentation claims.")
recipe_app = typer.Typer(no_args_is_help=True, help="Check a recipe, or write the JSON schema for editors.")
inspect_app = typer.Typer(no_args_is_help=True, help="Look at what stages made.")
app.add_typer(verify_app, name="verify")
app.add_typer(inspect_app, name="inspect")
app.add_typer(recipe_app, name="recipe")

RecipeFile = Annotated[str, typer.Argument(help="Recipe file.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(help="Names of stages, and key=value words that change the recipe.", metavar="[STAGE|key=value]..."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")]


def _split(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Stage names and overrides stand on the same line; an override has a `=`."""
    words = words or []
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


@app.command("run")
def run_command(
    recipe: RecipeFile,
    words: Words = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Set unfinished runs aside and begin anew; with stage names, run these again even if up to date.",
        ),
    ] = False,
    fork: Annotated[
        bool, typer.Option("--fork", help="Go on from the last checkpoint of a run that another recipe made.")
    ] = False,
) -> None:
    """Run the chain: what is up to date is skipped, what was interrupted goes on."""
    if restart and fork:
        raise UserError("--restart begins anew and --fork goes on from a checkpoint: give one of the two")
    stages, overrides = _split(words)
    graph = chain.run(load(recipe, overrides), stages, restart=restart, fork=fork)
    _table(graph)


@app.command("status")
def status_command(recipe: RecipeFile, words: Words = None, as_json: Json = False) -> None:
    """A line a stage: up to date, stale and why, interrupted at which step, missing, damaged, running and where."""
    stages, overrides = _split(words)
    graph = examine(load(recipe, overrides))
    _known(stages, graph, recipe)
    chosen = {name: node for name, node in graph.items() if not stages or name in stages}
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
                    }
                    for name, node in chosen.items()
                }
            )
        )
        return
    for name, node in chosen.items():
        made = f"  {os.path.relpath(node.output.path)}" if node.output else ""
        print(f"{name:<12} {node.state:<12} {node.reason}{made}".rstrip())


@verify_app.command("artifacts")
def verify_artifacts(recipe: RecipeFile, words: Words = None) -> None:
    """Hash every file of every published output again and compare it with its manifest, and each parent with what it
    was."""
    stages, overrides = _split(words)
    graph = nodes(load(recipe, overrides))
    _known(stages, graph, recipe)
    bad = 0
    for name, node in graph.items():
        if stages and name not in stages:
            continue
        found = artifact.current(node.folder)
        if found is None:
            print(f"{name:<12} missing      nothing is published")
            bad += 1
            continue
        problem = found.damage(full=True) or _lineage(found, node.folder)
        size = sum(entry["size"] for entry in found.manifest["files"].values())
        bad += problem is not None
        whole = f"{many(len(found.manifest['files']), 'file')}, {size / 1e6:.1f} MB, digest {found.digest[:12]}"
        print(f"{name:<12} damaged      {problem}" if problem else f"{name:<12} whole        {whole}")
    if bad:
        raise UserError(
            f"{recipe}: {bad} of {many(len(stages or graph), 'output')} {'is' if bad == 1 else 'are'} missing or"
            f" damaged; alma run {recipe} makes {'it' if bad == 1 else 'them'} again"
        )


Keep = Annotated[bool, typer.Option("--keep", help="Leave the proof's working folder in place.")]
Full = Annotated[bool, typer.Option("--full", help="The model as the recipe has it, however large.")]
Width = Annotated[int, typer.Option("--width", min=8, help="Width that a model above 5 M parameters is shrunk to.")]
Layers = Annotated[int, typer.Option("--layers", min=2, help="Layers that it is shrunk to.")]


@verify_app.command("parallel")
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
    from pipeline.verify.parallel import prove

    stages, overrides = _split(words)
    if not prove(load(recipe, overrides), _one(stages), full=full, width=width, layers=layers, keep=keep):
        raise typer.Exit(1)


@verify_app.command("resume")
def verify_resume(
    recipe: RecipeFile,
    words: Words = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the moments at which runs are killed.")] = 0,
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
    from pipeline.verify.resume import prove

    stages, overrides = _split(words)
    if not prove(
        load(recipe, overrides),
        _one(stages),
        seed=seed,
        elastic=elastic,
        full=full,
        width=width,
        layers=layers,
        keep=keep,
    ):
        raise typer.Exit(1)


@verify_app.command("dedup")
def verify_dedup(
    recipe: RecipeFile,
    words: Words = None,
    pairs: Annotated[int, typer.Option("--pairs", min=50, help="Near duplicates to plant in each language.")] = 600,
    recall: Annotated[
        float | None,
        typer.Option(
            "--recall",
            help=(
                "Least recall at similarities of 0.8 and above; by default what theory expects, less three standard"
                " errors."
            ),
        ),
    ] = None,
    false_merges: Annotated[
        float, typer.Option("--false-merges", help="Largest share of pairs below 0.6 that may be merged.")
    ] = 0.08,
    seed: Annotated[int, typer.Option("--seed", help="Of the sample's edits.")] = 0,
) -> None:
    """Plant known near duplicates in a sample of the recipe's own corpus and count what is found. Exit code 1: less
    than the bar."""
    from pipeline.verify.dedup import prove

    stages, overrides = _split(words)
    if not prove(
        load(recipe, overrides), _one(stages), pairs=pairs, recall=recall, false_merges=false_merges, seed=seed
    ):
        raise typer.Exit(1)


@inspect_app.command("tokens")
def inspect_tokens(
    recipe: RecipeFile,
    words: Words = None,
    row: Annotated[
        int, typer.Option("--row", min=0, help="Number of the first row, in the order in which the run reads them.")
    ] = 0,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Token ids in place of text.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line a row: inputs, labels, positions, documents.")
    ] = False,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens of a row where a stage of kind pack is shown (512).")
    ] = None,
) -> None:
    """Packed tokens by source, and rows as the model of a pretraining stage reads them; of a recipe without one, or
    where a stage of kind pack is named, rows of --length tokens in proportion to the sources."""
    from pipeline.data.view import show

    stages, overrides = _split(words)
    show(load(recipe, overrides), _one(stages), row, rows, as_json, ids, length)


@inspect_app.command("data")
def inspect_data(
    recipe: RecipeFile,
    words: Words = None,
    source: Annotated[str | None, typer.Option("--source", help="One source alone.")] = None,
    reason: Annotated[
        str | None,
        typer.Option("--reason", help="One reason: its overlaps, what other thresholds would have done, samples."),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=0, help="So many documents of each reason, with the value that tripped the rule."
        ),
    ] = 0,
) -> None:
    """The ledger of a stage that prepares text: what was read, left out and why, and published. By default of clean;
    also of sft, reward, dpo and ppo."""
    from pipeline.inspection import data

    stages, overrides = _split(words)
    graph = nodes(load(recipe, overrides))
    _known(stages, graph, recipe)
    data.show(
        _published(graph, _one(stages), ("clean", *data.TUNING), recipe), source=source, reason=reason, samples=samples
    )


def _published(graph: dict[str, Node], name: str | None, kinds: tuple[str, ...], recipe: str) -> artifact.Artifact:
    """The published output of a stage of one of these kinds: the one named, or the first of kinds[0]."""
    able = [node for node in graph.values() if node.config.kind in kinds]
    chosen = [node for node in able if (node.name == name if name else node.config.kind == kinds[0])]
    if not chosen:
        what = f"stage {name} is of kind {graph[name].config.kind}" if name else f"there is no stage of kind {kinds[0]}"
        raise UserError(
            f"{recipe}: {what}; this looks into"
            f" {', '.join(node.name for node in able) or 'stages of kind ' + ', '.join(kinds)}"
        )
    found = artifact.current(chosen[0].folder)
    if found is None:
        raise UserError(
            f"{recipe}: {chosen[0].name} has published nothing yet ({chosen[0].folder}); alma run {recipe}"
            f" {chosen[0].name} makes it"
        )
    return found


@inspect_app.command("tokenizer")
def inspect_tokenizer(
    place: Annotated[str, typer.Argument(help="Recipe file, or the folder of a tokenizer.", metavar="RECIPE|FOLDER")],
    words: Words = None,
    compare: Annotated[
        str, typer.Option("--compare", help="Known vocabularies to compare with, out of cl100k,o200k; empty: none.")
    ] = "cl100k,o200k",
    megabytes: Annotated[
        float, typer.Option("--megabytes", min=0.001, help="At most so much text of each split is read.")
    ] = 200,
    as_json: Json = False,
) -> None:
    """Bytes and characters per token by source and language, round trip over the corpus, compression by vocabulary
    size, unused and longest tokens, how Chinese and digits split."""
    from pipeline.inspection.tokenizer import report, show

    folder = Path(place)
    if not folder.is_dir():
        stages, overrides = _split(words)
        graph = examine(load(place, overrides))
        _known(stages, graph, place)
        wanted = [
            node for name, node in graph.items() if node.config.kind == "tokenizer" and (not stages or name in stages)
        ]
        if len(wanted) != 1:
            raise UserError(
                f"{place}: has {len(wanted)} stages of kind tokenizer{' of this name' if stages else ''}; name one, or"
                " give the folder of a tokenizer"
            )
        found = wanted[0].output or artifact.current(wanted[0].folder)
        if found is None:
            raise UserError(f"{place}: stage {wanted[0].name} has published nothing yet; run it first")
        folder = found.path.resolve()
    made = artifact.read(folder)
    parent = made.manifest["parents"].get("data") if made and made.kind == "tokenizer" else None
    # the text that it was made from, also where the recipe has moved on
    source = (folder.parent / parent["path"]).resolve() if parent else None
    data = (artifact.read(source) or artifact.external("data", source)) if source and source.is_dir() else None
    if data is None:
        print(
            "no text to measure on: "
            + (
                "the output of clean that it was made from is gone"
                if parent
                else "a folder that no stage `tokenizer` published"
            )
            + "; the vocabulary alone is shown",
            file=sys.stderr,
        )
    found = report(folder, data, int(megabytes * 1e6), [name for name in compare.split(",") if name])
    print(json.dumps(found, ensure_ascii=False)) if as_json else show(found)


def _one(stages: list[str]) -> str | None:
    if len(stages) > 1:
        raise UserError(f"one stage at a time: {', '.join(stages)} were given")
    return stages[0] if stages else None


def _lineage(found: artifact.Artifact, folder: Path) -> str | None:
    """Whether the parents that an output names are still what it was made from."""
    for key, parent in found.manifest.get("parents", {}).items():
        if parent["kind"] == "external":
            continue
        path = (folder / parent["path"]).resolve()
        made_from = artifact.read(path)
        if made_from is None:
            return f"its parent {key} ({path}) is gone"
        if made_from.digest != parent["digest"]:
            return (
                f"its parent {key} ({path}) has digest {made_from.digest[:12]}, it was made from"
                f" {parent['digest'][:12]}"
            )
    return None


@recipe_app.command("check")
def recipe_check(recipe: RecipeFile, words: Words = None) -> None:
    """Read a recipe and check every key, every input, and that the layout can be had; nothing is run and no source
    is read."""
    stages, overrides = _split(words)
    parsed = load(recipe, overrides)
    graph = nodes(parsed)
    _known(stages, graph, recipe)
    for node in graph.values():
        check(node, graph)
    if parsed.model is not None:
        from pipeline.models.build import check as check_model

        check_model(parsed.model)
    for name, node in graph.items():
        parents = ", ".join(f"{key} <- {source}" for key, source in node.parents.items())
        print(f"{name:<12} {node.config.kind:<10} {parents}".rstrip())
    print(f"{recipe}: {many(len(graph), 'stage')}, every key is known (sources are not read by this check)")


@recipe_app.command("schema")
def recipe_schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output if not given.")
    ] = None,
) -> None:
    """The JSON schema of recipes, for completion and checks in an editor."""
    from pipeline.recipe_schema import schema

    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    if output:
        write_atomic(output, text)
        print(f"{output}: written")
    else:
        sys.stdout.write(text)


def _known(stages: list[str], graph: dict, recipe: str) -> None:
    for name in stages:
        if name not in graph:
            raise UserError(f"{recipe}: no stage is called {name!r}; there is {', '.join(graph)}")


def _table(graph: dict[str, Node]) -> None:
    """The story of the chain: a line a stage. What went in, what came out, its metric before and after, time."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("stage", "in", "out", "measured", "time"):
        table.add_column(title, overflow="fold", justify="right" if title == "time" else "left")
    total = 0.0
    for name, node in graph.items():
        if node.state != "up to date" or node.output is None:
            continue
        summary, seconds = node.output.metrics.get("summary", {}), node.output.manifest["seconds"]
        total += seconds
        table.add_row(
            name, summary.get("input", ""), summary.get("output", ""), summary.get("measure", ""), f"{seconds:.0f} s"
        )
    table.add_section()
    table.add_row("all", "", "", "", f"{total:.0f} s")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    code = 0

    def action() -> None:
        nonlocal code
        try:
            code = app(standalone_mode=False) or 0
        except StageFailed as failure:
            code = failure.code
            if code != EXIT_USER:
                print(
                    f"{failure.stage}: did not finish; its message stands above, and the same command goes on from"
                    " where it was",
                    file=sys.stderr,
                )
        except typer.Exit as leave:
            code = leave.exit_code
        except Exception as error:
            # usage errors of the command line
            if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
                if not error.format_message():  # `alma` alone: the help was printed
                    code = EXIT_USER
                    return
                raise UserError(error.format_message()) from None
            raise

    stopped = chain.guarded(action)
    sys.exit(stopped or code or 0)


if __name__ == "__main__":
    main()
