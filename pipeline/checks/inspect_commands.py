"""`alma inspect`: its commands, their options, and the outputs that they show."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.cli_arguments import Json, RecipeFile, Words, check_stage_names, one, split
from pipeline.core.errors import UserError
from pipeline.core.graph import Node, nodes
from pipeline.core.recipe import load
from pipeline.core.status import examine

app = typer.Typer(no_args_is_help=True, help="Look at what stages published.")


@app.command("tokens")
def inspect_tokens(
    recipe: RecipeFile,
    words: Words = None,
    row: Annotated[
        int, typer.Option("--row", min=0, help="Number of the first row, in the order in which the run reads them.")
    ] = 0,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Token ids instead of text.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line per row: inputs, labels, positions, documents.")
    ] = False,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens per row for a stage of kind pack (default 512).")
    ] = None,
) -> None:
    """Packed tokens by source, and rows as the model of a pretraining stage reads them. For a recipe without one, or if
    a stage of kind pack is named: rows of --length tokens, in proportion to the sources."""
    from pipeline.checks.inspect_tokens import show

    stages, overrides = split(words)
    show(load(recipe, overrides), one(stages), row, rows, as_json, ids, length)


@app.command("data")
def inspect_data(
    recipe: RecipeFile,
    words: Words = None,
    source: Annotated[str | None, typer.Option("--source", help="Only this source.")] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", help="One reason: its overlaps, the effect of other thresholds, samples.")
    ] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", min=0, help="This many documents per reason, with the value that broke the rule."),
    ] = 0,
) -> None:
    """The report of a stage that prepares text: what was read, dropped and why, and published. By default of clean;
    also of sft, reward, dpo, kto and ppo."""
    from pipeline.checks import inspect_data

    stages, overrides = split(words)
    graph = nodes(load(recipe, overrides))
    check_stage_names(stages, graph, recipe)
    output = _published(graph, one(stages), inspect_data.kinds(), recipe)
    inspect_data.show(output, source=source, reason=reason, samples=samples)


@app.command("masks")
def inspect_masks(
    recipe: Annotated[str | None, typer.Argument(help="Recipe file; or --model and --data.")] = None,
    words: Words = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Records of each source whose rows are shown.")] = 2,
    source: Annotated[str | None, typer.Option("--source", help="Only this source.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Without a recipe: folder of a model or a tokenizer.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Without a recipe: file of conversations, pairs or prompts.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="Without a recipe: a template's name, file, or model folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line per row: ids, texts, roles, loss.")] = False,
) -> None:
    """Rows of a finetuning stage (sft, reward, dpo, kto, prompts of ppo), token by token: whose words each is, and
    whether it carries loss; with what is wrong with the first records of each source."""
    from pipeline.checks import inspect_masks

    if recipe is not None and (model or data or chat_template):
        raise UserError("give a recipe, or --model and --data; the recipe says which model, data and template are used")
    if recipe is None and not (model and data):
        raise UserError("give a recipe, or --model and --data")
    if recipe is None:
        how = inspect_masks.rows_of_file(model, data, chat_template)
    else:
        stages, overrides = split(words)
        how = inspect_masks.rows_of_stage(load(recipe, overrides), one(stages))
    inspect_masks.show(how, rows, source, as_json)


@app.command("tokenizer")
def inspect_tokenizer(
    place: Annotated[str, typer.Argument(help="Recipe file, or the folder of a tokenizer.", metavar="RECIPE|FOLDER")],
    words: Words = None,
    compare: Annotated[
        str, typer.Option("--compare", help="Published vocabularies to compare with: cl100k, o200k; empty: none.")
    ] = "cl100k,o200k",
    megabytes: Annotated[
        float, typer.Option("--megabytes", min=0.001, help="Most text of each split that is read.")
    ] = 200,
    as_json: Json = False,
) -> None:
    """Bytes and characters per token by source and language, round trip over the corpus, compression by vocabulary
    size, unused and longest tokens, how Chinese and digits are split."""
    from pipeline.checks.inspect_tokenizer import report, show

    folder = Path(place)
    if not folder.is_dir():
        folder = _tokenizer_output(place, words)
    data = _data_of(folder)
    figures = report(folder, data, int(megabytes * 1e6), [name for name in compare.split(",") if name])
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
    else:
        show(figures)


def _tokenizer_output(recipe: str, words: list[str] | None) -> Path:
    """The published folder of the recipe's stage of kind tokenizer."""
    stages, overrides = split(words)
    graph = examine(load(recipe, overrides))
    check_stage_names(stages, graph, recipe)
    candidates = [node for node in graph.values() if node.config.kind == "tokenizer"]
    if stages:
        candidates = [node for node in candidates if node.name in stages]
    if len(candidates) != 1:
        raise UserError(
            f"{recipe}: has {len(candidates)} stages of kind tokenizer{' of this name' if stages else ''}; name one, or"
            " give the folder of a tokenizer"
        )
    [node] = candidates
    output = node.output or artifact.current(node.folder)
    if output is None:
        raise UserError(f"{recipe}: stage {node.name} has published nothing yet; run it first")
    return output.path.resolve()


def _data_of(folder: Path) -> Artifact | None:
    """The text that a tokenizer was made from, even if the recipe has changed since; None, with a line on standard
    error, if there is none."""
    output = artifact.read(folder)
    parent = None
    if output and output.kind == "tokenizer":
        parent = output.manifest["parents"].get("data")
    if parent:
        data = (folder.parent / parent["path"]).resolve()
        if data.is_dir():
            return artifact.read(data) or artifact.external("data", data)
        reason = "the output of clean that it was made from does not exist any more"
    else:
        reason = "no stage `tokenizer` published this folder"
    print(f"no text to measure on: {reason}; only the vocabulary is shown", file=sys.stderr)
    return None


def _published(graph: dict[str, Node], name: str | None, kinds: tuple[str, ...], recipe: str) -> Artifact:
    """The published output of a stage of one of these kinds: the named one, or the first one of kinds[0]."""
    possible = [node for node in graph.values() if node.config.kind in kinds]
    if name:
        chosen = [node for node in possible if node.name == name]
        problem = f"stage {name} is of kind {graph[name].config.kind}"
    else:
        chosen = [node for node in possible if node.config.kind == kinds[0]]
        problem = f"there is no stage of kind {kinds[0]}"
    if not chosen:
        names = ", ".join(node.name for node in possible)
        raise UserError(f"{recipe}: {problem}; expected one of {names or 'kind ' + ', '.join(kinds)}")
    node = chosen[0]
    output = artifact.current(node.folder)
    if output is None:
        raise UserError(
            f"{recipe}: {node.name} has published nothing yet ({node.folder}); run it first: alma run {recipe}"
            f" {node.name}"
        )
    return output
