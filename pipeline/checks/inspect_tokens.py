"""`alma inspect tokens`: the packed tokens by source, and rows as the model of a pretraining stage reads them, or for a
stage `pack` as a pretraining stage with no other keys would."""

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.checks import tables
from pipeline.core import artifact, external_inputs
from pipeline.core.errors import UserError
from pipeline.core.graph import Node, nodes
from pipeline.core.recipe import Recipe
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.data.tokens.row_sampler import RowSampler
from pipeline.data.tokens.rows import Row, documents_of, positions_of
from pipeline.data.tokens.store import TokenStore

LENGTH = 512  # of the rows of a stage `pack`, by default
MARKS = ("⟦", "⟧")  # around text whose labels do not count, where there are no colors


def show(
    recipe: Recipe,
    stage: str | None,
    first: int,
    rows: int,
    as_json: bool = False,
    ids: bool = False,
    length: int | None = None,
) -> None:
    """Print a table of the sources and `rows` rows, beginning with number `first`; for a stage `pack` rows of `length`
    labels. Raises UserError if there are no tokens yet."""
    node, tokens, tokenizer_folder = _stage(recipe, stage)
    store, tokenizer = TokenStore(tokens), load_tokenizer(tokenizer_folder)
    if len(tokenizer) != store.vocab_size:
        raise UserError(
            f"{tokenizer_folder} has {len(tokenizer)} tokens, {tokens} was packed with {store.vocab_size}; give the"
            " tokenizer that packed them"
        )
    sampler = _sampler(node, store, tokenizer, length)
    document_mask = node.config.kind != "pack" and node.config.document_mask
    if as_json:
        for index in range(first, first + rows):
            print(json.dumps(as_numbers(index, sampler.row(index), store, document_mask), ensure_ascii=False))
        return
    _print_sources(sampler, store, node)
    for index in range(first, first + rows):
        _print_row(index, sampler, store, tokenizer, document_mask, ids)


def _sampler(node: Node, store: TokenStore, tokenizer, length: int | None) -> RowSampler:
    from pipeline.train.batches import sampler_of

    if node.config.kind == "pack":
        most = max(map(store.num_tokens, store.sources)) - 1
        if (length or 1) > most:
            raise UserError(f"--length {length}: no source of {store.folder} has so many tokens; give at most {most}")
        return RowSampler(store, length or min(LENGTH, most), None, node.config.seed)
    if length is not None:
        raise UserError(
            f"--length is for stages of kind pack; the rows of {node.name} have its sequence_length, which"
            f" {node.name}.sequence_length={length} changes"
        )
    return sampler_of(node.config, store, tokenizer)


def as_numbers(index: int, row: Row, store: TokenStore, document_mask: bool) -> dict:
    """A row in full: inputs, labels (-100 where they do not count) and positions are what the model gets."""
    labels = row.tokens[1:].copy()
    if row.label_mask is not None:
        labels[~row.label_mask] = -100
    positions = positions_of(row).tolist() if document_mask else list(range(len(labels)))
    return {
        "row": index,
        "source": row.source,
        "epoch": row.epoch,
        "window": row.index,
        "documents": documents_of(row, store),
        "inputs": row.tokens[:-1].tolist(),
        "labels": labels.tolist(),
        "positions": positions,
    }


def _stage(recipe: Recipe, name: str | None) -> tuple[Node, Path, Path]:
    """A stage of kind pretrain, or of kind pack if there is none or if it is named, and the folders of its tokens and
    its tokenizer."""
    possible = []
    for kind in ("pretrain", "pack"):
        possible += [stage for stage, config in recipe.stages.items() if config.kind == kind]
    if not possible:
        raise UserError(
            f"recipe {recipe.name}: has no stage of kind pretrain or pack, whose rows could be shown; it has"
            f" {', '.join(recipe.stages)}"
        )
    if name is not None and name not in possible:
        raise UserError(
            f"recipe {recipe.name}: {name!r} is not a stage of kind pretrain or pack; these are: {', '.join(possible)}"
        )
    node = nodes(recipe)[name or possible[0]]
    tokens = node.name if node.config.kind == "pack" else node.parents["tokens"]
    tokenizer = node.parents["tokenizer"]
    return node, _output(recipe, "tokens", tokens), _output(recipe, "tokenizer", tokenizer)


def _output(recipe: Recipe, key: str, source: str) -> Path:
    """The folder of an input: `source` is a stage of the recipe, or a path."""
    if source not in recipe.stages:
        return external_inputs.read(key, source).path
    output = artifact.current(recipe.root / source)
    if output is None:
        raise UserError(
            f"stage {source} has no output yet ({recipe.root / source}/current); run it first: alma run RECIPE {source}"
        )
    return output.path


def _print_sources(sampler: RowSampler, store: TokenStore, node: Node) -> None:
    reader = "a stage of kind pretrain" if node.config.kind == "pack" else f"stage {node.name}"
    title = f"{store.folder}, as {reader} reads it in rows of {sampler.sequence_length} ({sampler.packing})"
    columns = ("source", "documents", "tokens", "bytes per token", "share of rows", "rows per epoch", "padding")
    table = tables.new_table(*columns, "documents cut", text=("source",), title=title)
    padding, num_cut = sampler.padding(), sampler.cut_documents()
    for source in store.sources:
        num_tokens = store.num_tokens(source)
        cells = [f"{store.num_documents(source):,}", f"{num_tokens:,}", f"{store.num_bytes(source) / num_tokens:.2f}"]
        if source in sampler.sources:
            cells.append(f"{100 * sampler.weights.get(source, 0):.3g}%")
            cells.append(f"{sampler.rows_per_epoch[source]:,}")
            cells.append(f"{100 * padding[source]:.2g}%")
            cells.append(f"{num_cut[source]:,}")
        else:
            cells.append("not read")
        table.add_row(source, *cells)
    tables.console().print(table)


def _print_row(index: int, sampler: RowSampler, store: TokenStore, tokenizer, document_mask: bool, ids: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    row = sampler.row(index)
    console, length = Console(highlight=False, soft_wrap=True), len(row.tokens) - 1
    num_labels = length if row.label_mask is None else int(row.label_mask.sum())
    visibility = "documents apart" if document_mask else "documents see those before them"
    place = f"{row.source}, epoch {row.epoch}, row {row.index:,} of {sampler.rows_per_epoch[row.source]:,}"
    heading = f"row {index:,}: {place}; {num_labels} of {length} labels count; {visibility}"
    console.print(Text(heading, style="bold"))
    for number, (slot, slots, name) in enumerate(_sections(row, store)):
        line = Text(f"{slot:>7} {name} │ ", style="dim")
        if name == "padding":
            line.append(f"{slots} slots without labels", style="dim")
            console.print(line)
            continue
        for counts, tokens in _runs(row, slot, slots):
            if ids:
                text = " ".join(map(str, tokens)) + " "
            else:
                text = tokenizer.decode(tokens, skip_special_tokens=False).replace("\n", "⏎")
            if counts:
                line.append(text, style=("cyan", "green")[number % 2])
            else:
                marked = text if console.is_terminal else f"{MARKS[0]}{text}{MARKS[1]}"
                line.append(marked, style="dim strike")
        console.print(line)


def _sections(row: Row, store: TokenStore) -> list[tuple[int, int, str]]:
    """(first slot, slots, name) of the row's documents, and of the context before them and the padding after them."""
    sections = []
    for document in documents_of(row, store):
        name = f"{document['id']} from token {document['offset']}"
        sections.append((document["start"], document["tokens"], name))
    if sections[0][0] == 1:
        sections.insert(0, (0, 1, "context"))
    end = sections[-1][0] + sections[-1][1]
    if end < len(row.tokens):
        sections.append((end, len(row.tokens) - end, "padding"))
    return sections


def _runs(row: Row, slot: int, slots: int) -> Iterator[tuple[bool, list[int]]]:
    """(do they count, tokens) of neighbouring tokens that are labels or are not, because only several tokens together
    may spell a character."""
    counts = [_counts(row, place) for place in range(slot, slot + slots)]
    begin = 0
    for end in range(1, slots + 1):
        if end == slots or counts[end] != counts[begin]:
            yield counts[begin], row.tokens[slot + begin : slot + end].tolist()
            begin = end


def _counts(row: Row, slot: int) -> bool:
    """Is the token at `slot` a label that counts?"""
    return slot > 0 and (row.label_mask is None or bool(row.label_mask[slot - 1]))
