"""`alma inspect tokens`: the packed tokens by source, and rows of a pretraining stage as its model reads them, or of a
stage `pack` as a pretraining stage with nothing but a length would."""

import json
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.errors import UserError
from pipeline.core.graph import nodes
from pipeline.core.recipe import Recipe
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.data.tokens.row_sampler import RowSampler
from pipeline.data.tokens.rows import Row, documents_of, positions_of
from pipeline.data.tokens.store import TokenStore

LENGTH = 512  # of the rows of a stage `pack`, unless another one is asked for
MARKS = ("⟦", "⟧")  # around text whose labels do not count, where there are no colours


def show(
    recipe: Recipe,
    stage: str | None,
    first: int,
    rows: int,
    as_json: bool = False,
    ids: bool = False,
    length: int | None = None,
) -> None:
    """Print a table of the sources and `rows` rows from number `first` on, of `length` labels where the stage is
    `pack`. Raises UserError where there are no tokens yet."""
    from pipeline.train.batches import sampler_of

    node, tokens, tokenizer_folder = _stage(recipe, stage)
    store, tokenizer = TokenStore(tokens), load_tokenizer(tokenizer_folder)
    if len(tokenizer) != store.vocab_size:
        raise UserError(
            f"{tokenizer_folder} has {len(tokenizer)} tokens, {tokens} was packed with {store.vocab_size}; give the"
            " tokenizer that packed them"
        )
    if node.config.kind == "pack":
        most = max(map(store.num_tokens, store.sources)) - 1
        if (length or 1) > most:
            raise UserError(f"--length {length}: no source of {tokens} has so many tokens; give at most {most}")
        sampler, document_mask = RowSampler(store, length or min(LENGTH, most), None, node.config.seed), False
    elif length is not None:
        raise UserError(
            f"--length is for rows of a stage of kind pack; those of {node.name} have its sequence_length, which"
            f" {node.name}.sequence_length={length} changes"
        )
    else:
        sampler, document_mask = sampler_of(node.config, store, tokenizer), node.config.document_mask
    found = [(index, sampler.row(index)) for index in range(first, first + rows)]
    if as_json:
        for index, row in found:
            print(json.dumps(as_numbers(index, row, store, document_mask), ensure_ascii=False))
        return
    _table(sampler, store, node)
    for index, row in found:
        _print(index, row, store, sampler, tokenizer, document_mask, ids)


def as_numbers(index: int, row: Row, store: TokenStore, document_mask: bool) -> dict:
    """A row in full: inputs, labels (-100 where none counts) and positions are what the model is given."""
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


def _stage(recipe: Recipe, name: str | None):
    """A stage of kind pretrain, or of kind pack where there is none or it is named, and the folders of its tokens and
    tokenizer."""
    able = [stage for kind in ("pretrain", "pack") for stage, of in recipe.stages.items() if of.kind == kind]
    if not able:
        raise UserError(
            f"recipe {recipe.name}: has no stage of kind pretrain or pack, whose rows could be shown; it has"
            f" {', '.join(recipe.stages)}"
        )
    if name is not None and name not in able:
        raise UserError(
            f"recipe {recipe.name}: {name!r} is no stage of kind pretrain or pack; these are: {', '.join(able)}"
        )
    graph = nodes(recipe)
    node = graph[name or able[0]]
    wanted = {"tokens": node.name if node.config.kind == "pack" else node.parents["tokens"]}
    wanted["tokenizer"] = node.parents["tokenizer"]
    folders = []
    for key, source in wanted.items():
        found = (
            artifact.current(recipe.root / source) if source in recipe.stages else artifact.external(key, Path(source))
        )
        if found is None:
            raise UserError(
                f"stage {source} has no output yet ({recipe.root / source}/current); run it first: alma run RECIPE"
                f" {source}"
            )
        folders.append(found.path)
    return node, *folders


def _table(sampler: RowSampler, store: TokenStore, node) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    reader = "a stage of kind pretrain" if node.config.kind == "pack" else f"stage {node.name}"
    title = f"{store.folder}, as {reader} reads it in rows of {sampler.sequence_length} ({sampler.packing})"
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for title in (
        "source",
        "documents",
        "tokens",
        "bytes a token",
        "share of rows",
        "rows an epoch",
        "padding",
        "documents cut",
    ):
        shown.add_column(title, justify="left" if title == "source" else "right")
    padding, cut = sampler.padding(), sampler.cut_documents()
    for source in store.sources:
        tokens = store.num_tokens(source)
        cells = [f"{store.num_documents(source):,}", f"{tokens:,}", f"{store.num_bytes(source) / tokens:.2f}"]
        if source in sampler.sources:
            cells += [
                f"{100 * sampler.weights.get(source, 0):.3g}%",
                f"{sampler.rows_per_epoch[source]:,}",
                f"{100 * padding[source]:.2g}%",
                f"{cut[source]:,}",
            ]
        shown.add_row(source, *cells, *["not read"] * (source not in sampler.sources))
    Console(width=160).print(shown)


def _print(
    index: int, row: Row, store: TokenStore, sampler: RowSampler, tokenizer, document_mask: bool, ids: bool
) -> None:
    from rich.console import Console
    from rich.text import Text

    console, length = Console(highlight=False, soft_wrap=True), len(row.tokens) - 1
    labels = length if row.label_mask is None else int(row.label_mask.sum())
    apart = "documents apart" if document_mask else "documents see those before them"
    place = f"{row.source}, epoch {row.epoch}, row {row.index:,} of {sampler.rows_per_epoch[row.source]:,}"
    console.print(Text(f"row {index:,}: {place}; {labels} of {length} labels count; {apart}", style="bold"))
    documents = documents_of(row, store)
    lines = [(entry["start"], entry["tokens"], f"{entry['id']} from token {entry['offset']}") for entry in documents]
    if lines[0][0] == 1:
        lines.insert(0, (0, 1, "context"))
    end = lines[-1][0] + lines[-1][1]
    if end <= length:
        lines.append((end, length + 1 - end, "padding"))
    for number, (slot, slots, name) in enumerate(lines):
        text = Text(f"{slot:>7} {name} │ ", style="dim")
        for counts, part in _stretches(row, slot, slots) if name != "padding" else ():
            said = (
                " ".join(map(str, part)) + " "
                if ids
                else tokenizer.decode(part, skip_special_tokens=False).replace("\n", "⏎")
            )
            text.append(
                said if counts or console.is_terminal else f"{MARKS[0]}{said}{MARKS[1]}",
                style=("cyan", "green")[number % 2] if counts else "dim strike",
            )
        if name == "padding":
            text.append(f"{slots} slots without labels", style="dim")
        console.print(text)


def _stretches(row: Row, slot: int, slots: int):
    """Neighbouring tokens that are labels, or are none, together: characters of several tokens can only be read so."""
    counts = [
        place > 0 and (row.label_mask is None or bool(row.label_mask[place - 1])) for place in range(slot, slot + slots)
    ]
    begin = 0
    for end in range(1, slots + 1):
        if end == slots or counts[end] != counts[begin]:
            yield counts[begin], row.tokens[slot + begin : slot + end].tolist()
            begin = end
