"""What can be refused before the first stage runs: keys, inputs, layouts and models of a recipe, the first records of
its local sources, and chat templates, all mistakes at once.

`alma recipe check` and `alma run` call it, so that nothing that a recipe says is found wrong after hours.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.core.errors import Problems, UserError
from pipeline.core.graph import Node, check, nodes
from pipeline.core.recipe import Recipe, load
from pipeline.core.status import source_identity

TUNING = ("sft", "reward", "dpo", "ppo", "assess")
SMALL = 1_000_000  # bytes of sources that are read whole here, to see whether anything can be held out


def checked(path: str | Path, words: list[str] = (), sources: bool = False) -> tuple[Recipe, dict[str, Node]]:
    """A recipe and its graph; with `sources`, its local sources are looked into. Raises UserError with every mistake of
    every stage, file and line before each."""
    problems = Problems()
    recipe = load(path, words, problems)
    graph = nodes(recipe, problems)
    for node in graph.values():
        with problems.gather(lambda message, name=node.name: recipe.located(name, message)):
            check(node, graph)
    if recipe.model is not None:
        from pipeline.models.model_block import check as check_model

        with problems.gather(lambda message: recipe.located("", message)):
            check_model(recipe.model)
    if sources:
        for node in graph.values():
            with problems.gather(lambda message, name=node.name: recipe.located(name, message)):
                source_identity(node)
        check_sources(recipe, graph, graph.values(), problems)
    problems.refuse()
    return recipe, graph


def check_sources(recipe: Recipe, graph: dict[str, Node], stages: Iterable[Node], problems: Problems) -> None:
    """Read the first records of every local source of `stages`, and their chat template if it is there already. What
    is wrong is added to `problems`; a file that is missing is not told again (source_identity does)."""
    for node in stages:
        gather = _Gather(recipe, node.name, problems)
        if node.config.kind == "clean":
            _check_documents(node, gather)
        elif node.config.kind == "tokenizer" and node.config.adopt:
            with gather():
                _adopted(node)
        elif node.config.kind == "pack":
            _check_shards(node, gather)
        elif node.config.kind in TUNING:
            _check_tuning(node, graph, gather)


class _Gather:
    """Collects mistakes of one stage."""

    def __init__(self, recipe: Recipe, stage: str, problems: Problems):
        self.recipe, self.stage, self.problems = recipe, stage, problems

    def __call__(self):
        return self.problems.gather(lambda message: self.recipe.located(self.stage, message))


def _is_here(source: Any) -> bool:
    """Whether a source is files of this machine that are there, all of them."""
    from pipeline.data.sources.remote import is_address
    from pipeline.data.sources.sources import files

    paths = [source.path] if isinstance(source.path, str) else source.path
    if paths is None or any(is_address(path) for path in paths):
        return False
    try:
        files(source, "")
        return True
    except UserError:
        return False


# ---- clean, tokenizer, pack ------------------------------------------------------------------------------------------


def _check_documents(node: Node, gather: _Gather) -> None:
    from pipeline.data.sources.source_checks import first_record
    from pipeline.data.sources.sources import needed_fields

    config = node.config
    blocks = {"sources": config.sources, "examples": config.examples}
    if config.decontaminate:
        blocks["decontaminate.sets"] = config.decontaminate.sets
    for key, block in blocks.items():
        for name, source in block.items():
            if _is_here(source):
                with gather():
                    first_record(source, name, needed_fields(source), key)


def _check_shards(node: Node, gather: _Gather) -> None:
    from pipeline.data.tokens import import_shards

    for name, source in node.config.shards.items():
        with gather():
            for path in import_shards.files(source, name)[:1]:
                import_shards.open_shard(path, source)


def _adopted(node: Node) -> Any:
    """The tokenizer that a stage takes over, as it will publish it, or None if its files are not here."""
    from pipeline.data.tokens.store import load_tokenizer
    from pipeline.tokenizer import adopt

    if not Path(node.config.adopt).expanduser().exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        adopt(node.config, Path(folder))
        found = load_tokenizer(Path(folder))
    found.name_or_path = node.config.adopt
    return found


# ---- stages that read chat records -----------------------------------------------------------------------------------


def _check_tuning(node: Node, graph: dict[str, Node], gather: _Gather) -> None:
    from pipeline.data.chat.conversations import first_usable

    chat = None
    for key in ("model", "policy", "reward"):
        if key in node.parents and node.config.kind != "assess":
            with gather():
                found = _chat(node, node.parents[key], graph)
                chat = chat or found
    here = {name: source for name, source in node.config.sources.items() if _is_here(source)}
    usable = set()
    for name, source in here.items():
        with gather():
            first_usable(source, name, encode=None if chat is None else lambda row: _unwritable(chat, row))
            usable.add(name)
    if usable == node.config.sources.keys():
        with gather():
            _check_holdout(node)


def _check_holdout(node: Node) -> None:
    """Raise UserError if small sources leave nothing to train on or to measure on."""
    from pipeline.data.chat import conversations
    from pipeline.data.sources.sources import files

    config = node.config
    if sum(path.stat().st_size for name, source in config.sources.items() for _, path in files(source, name)) > SMALL:
        return
    kind = {"sft": "conversations", "reward": "pairs", "dpo": "pairs"}.get(config.kind, "prompts")
    read = {
        "conversations": conversations.load_conversations,
        "pairs": conversations.load_pairs,
        "prompts": conversations.load_prompts,
    }
    train, heldout, _ = read[kind](config.sources, config.holdout)
    if not heldout or not train and config.kind != "assess":
        raise UserError(
            f"sources: holdout: {config.holdout} leaves {len(train)} {kind} to train on and {len(heldout)} to measure"
            " on; give more records or another holdout"
        )


def _chat(node: Node, source: str, graph: dict[str, Node]) -> Any:
    """The chat template of an input of a stage, if its tokenizer is there already; else None. Raises UserError for one
    that cannot be used."""
    from pipeline.data.chat.template import Chat

    tokenizer = _tokenizer(source, graph)
    return None if tokenizer is None else Chat(tokenizer, date=node.config.date)


def _tokenizer(source: str, graph: dict[str, Node]) -> Any:
    """The tokenizer of a stage's model, or of the folder of one, as far as it is there before the stage has run."""
    from pipeline.data.tokens.store import load_tokenizer

    node = graph.get(source)
    folder = Path(source) if node is None else node.output and node.output.path
    if folder and (node is None or node.state == "up to date"):
        folder = folder / "model" if (folder / "model").is_dir() else folder
        return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    if node is None:
        return None
    if node.config.kind == "tokenizer":
        return _adopted(node) if node.config.adopt else None
    earlier = next((node.parents[key] for key in ("model", "policy", "tokenizer") if key in node.parents), None)
    return _tokenizer(earlier, graph) if earlier else None


def _unwritable(chat: Any, row: Any) -> str | None:
    """Why a chat template cannot write a row, or None."""
    from pipeline.data.chat.conversations import Conversation, Pair

    if isinstance(row, Conversation):
        written = chat.rows([row.messages])[0]
    elif isinstance(row, Pair):
        written = chat.encode([[*row.prompt, {"role": "assistant", "content": row.chosen}]])[0]
    else:
        try:
            written = chat.prompt(row.messages)
        except ValueError as error:
            written = str(error)
    return written if isinstance(written, str) else None
