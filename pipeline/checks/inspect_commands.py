"""`alma inspect`: its commands, their options, and which output they look into."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import artifact
from pipeline.core.cli_arguments import Json, RecipeFile, Words, known, one, split
from pipeline.core.errors import UserError
from pipeline.core.graph import Node, nodes
from pipeline.core.recipe import load
from pipeline.core.status import examine

app = typer.Typer(no_args_is_help=True, help="Look at what stages made.")


@app.command("tokens")
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
    from pipeline.checks.inspect_tokens import show

    stages, overrides = split(words)
    show(load(recipe, overrides), one(stages), row, rows, as_json, ids, length)


@app.command("data")
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
    from pipeline.checks import inspect_data

    stages, overrides = split(words)
    graph = nodes(load(recipe, overrides))
    known(stages, graph, recipe)
    inspect_data.show(
        _published(graph, one(stages), ("clean", *inspect_data.TUNING), recipe),
        source=source,
        reason=reason,
        samples=samples,
    )


@app.command("tokenizer")
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
    from pipeline.checks.inspect_tokenizer import report, show

    folder = Path(place)
    if not folder.is_dir():
        stages, overrides = split(words)
        graph = examine(load(place, overrides))
        known(stages, graph, place)
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
