"""`alma inspect masks`: rows as a finetuning stage reads them, token by token: which message each token is from, and
whether it carries loss. Of a stage of a recipe, or of any tokenizer with a chat template and any file of records.

Each row is made by what makes the stage's rows, and has passed the checks that these pass.
"""

import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pipeline.core.errors import Problems, UserError
from pipeline.core.graph import planned_inputs
from pipeline.core.recipe import Recipe
from pipeline.core.status import examine
from pipeline.core.terminal import plural
from pipeline.data.chat.chat_sources import (
    ChatSource,
    LabelledSource,
    PreferenceSource,
    PromptSource,
    StepSource,
    TuningSource,
)
from pipeline.data.chat.conversations import Conversation, Labelled, Pair, Prompt, Stepped, first_usable, rows_of
from pipeline.data.chat.record_accounting import Ledger
from pipeline.data.chat.template import Chat, Encoded
from pipeline.data.chat.token_view import Token, tokens_of

if TYPE_CHECKING:
    from pipeline.train.finetune_config import FinetuneConfig

KINDS = ("sft", "reward", "prm", "dpo", "kto", "ppo", "grpo")
CHECKED = 200  # records of each source
STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "template": "dim"}
MARKS = ("⟦", "⟧")  # around text that carries loss, where there are no colors
OF_PROMPTS = "carries loss (a prompt has no such tokens)"
LOSS_ON = {
    "reward": "the score is read here",
    "prm": "the score of a step is read here",
    "ppo": OF_PROMPTS,
    "grpo": OF_PROMPTS,
}


@dataclass(frozen=True)
class Rows:
    """How records become rows."""

    chat: Chat
    sources: dict[str, TuningSource]
    kind: str
    """Of the stage: one of KINDS."""
    longest: int | None = None
    """Tokens of a row, or of a prompt; None: any number."""
    too_long: str = "drop"
    """As the key of sft."""
    separator: str = "\n"
    """Between steps, as the key of prm."""


@dataclass(frozen=True)
class Shown:
    """A row and where it is from."""

    source: str
    place: str
    format: str
    title: str
    """Which row of the record it is; empty for the only one."""
    tokens: list[Token]


@dataclass
class Checked:
    """The first records of a source."""

    ledger: Ledger = field(default_factory=Ledger)
    shown: list[Shown] = field(default_factory=list)
    """Rows of the first records."""
    records: int = 0
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    """Tokens that carry loss."""


def show(rows: Rows, number: int, source: str | None, as_json: bool) -> None:
    """Print the rows of the first `number` usable records of each source, or of one source, and what the checks of the
    first CHECKED records found. Raises UserError if a source has none that can be used."""
    names = list(rows.sources)
    if source is not None and source not in names:
        raise UserError(f"--source {source}: there is no such source; expected one of {', '.join(names)}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not as_json:
        _print_legend(console, rows.kind)
    for name in names if source is None else [source]:
        checked = check(rows, name, number)
        for shown in checked.shown:
            if as_json:
                print(json.dumps(_as_numbers(shown), ensure_ascii=False))
            else:
                _print_row(console, shown)
        if not as_json:
            console.print(_summary(name, checked))
        if not checked.records:
            raise UserError(f"sources.{name}: none of its first records can be used: {checked.ledger.why(name)}")


# ---- which rows ------------------------------------------------------------------------------------------------------


def rows_of_stage(recipe: Recipe, stage: str | None) -> Rows:
    """How a finetuning stage makes its rows: the named one, or the first one of the recipe. Raises UserError if the
    tokenizer of its model is not there yet."""
    from pipeline.train import planned_model

    possible = [name for kind in KINDS for name, config in recipe.stages.items() if config.kind == kind]
    if not possible or (stage is not None and stage not in possible):
        named = "" if stage is None else f" called {stage!r}"
        expected = f"; these are: {', '.join(possible)}" if possible else ""
        raise UserError(f"recipe {recipe.name}: has no stage of kind {' or '.join(KINDS)}{named}{expected}")
    graph = examine(recipe)
    node = graph[stage or possible[0]]
    config, inputs = node.config, planned_inputs(node, graph)
    problems = Problems()
    model = config.initial_model(inputs)
    chat = planned_model.chat_of([model] if model else [], config, problems)
    problems.refuse()
    if chat is None:
        raise UserError(
            f"stage {node.name}: the tokenizer of its model is not there yet; run the stage that makes it first"
            f" ({', '.join(node.parents.values())})"
        )
    return rows_with(chat, config)


def rows_with(chat: Chat, config: "FinetuneConfig") -> Rows:
    """How a finetuning stage makes its rows with the chat template of its model."""
    longest = config.sequence_length
    if config.kind in ("ppo", "grpo"):
        longest -= config.rollout.max_new_tokens
    too_long = config.too_long if config.kind == "sft" else "drop"
    separator = config.separator if config.kind == "prm" else "\n"
    return Rows(chat, config.records(), config.kind, longest, too_long, separator)


def rows_of_file(model: Path, data: Path, chat_template: str | None) -> Rows:
    """The records of a file with the tokenizer of a model's folder. Raises UserError if it has no pairs, judged
    answers, answers with judged steps, conversations or prompts."""
    from pipeline.data.chat.named_templates import with_template
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    folder = model / "model" if (model / "model").is_dir() else model
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--model {model}: contains no tokenizer.json; expected the folder of a model or a tokenizer")
    tokenizer, _ = with_template(load_tokenizer(folder), chat_template, {})
    chat = Chat(tokenizer)
    name = data.name
    reasons = {}
    classes = {
        "dpo": PreferenceSource,
        "prm": StepSource,
        "kto": LabelledSource,
        "sft": ChatSource,
        "ppo": PromptSource,
    }
    for kind, source_class in classes.items():
        source = source_class(path=str(data))
        try:
            first_usable(source, name)
        except UserError as error:
            reasons[kind] = str(error)
        else:
            return Rows(chat, {name: source}, kind)
    raise UserError(reasons["sft"])


def check(rows: Rows, name: str, number: int) -> Checked:
    """Check the first records of a source, and keep the rows of the first `number` that can be used."""
    checked = Checked()
    for record in rows_of(rows.sources[name], name, checked.ledger, CHECKED):
        try:
            made = _fitting(rows, record, tokens_of(rows.chat, record, rows.separator))
        except ValueError as error:
            made = str(error)
        if isinstance(made, str):
            checked.ledger.reject(name, record.place, made)
            continue
        checked.records += 1
        checked.rows += len(made)
        for title, tokens in made:
            checked.tokens += len(tokens)
            checked.trained += sum(token.loss > 0 for token in tokens)
            if checked.records <= number:
                checked.shown.append(Shown(name, record.place, record.format, title, tokens))
    return checked


NamedRows = list[tuple[str, list[Token]]]


def _fitting(rows: Rows, record: Conversation | Pair | Labelled | Stepped | Prompt, made: NamedRows) -> NamedRows | str:
    """The rows of a record as the stage reads them, or the reason why it drops the record."""
    from pipeline.train.conversation_data import fitting_rows
    from pipeline.train.preference_data import pair_problem

    encoded = [Encoded([token.id for token in tokens], [token.loss > 0 for token in tokens]) for _, tokens in made]
    longest = rows.longest or max(len(row.ids) for row in encoded)
    if isinstance(record, Conversation):
        fitting = fitting_rows(encoded, longest, rows.too_long)
        if isinstance(fitting, str):
            return fitting
        cut = [(title, tokens[:longest]) for title, tokens in made]
        return [(title, tokens) for title, tokens in cut if any(token.loss for token in tokens)]
    if isinstance(record, Pair):
        problem = pair_problem(record, *encoded, longest, margins=rows.kind == "reward")
        if problem is not None:
            return problem
    elif any(len(row.ids) > longest for row in encoded):
        return f"longer than {longest} tokens"
    return [(title, _scored(tokens)) for title, tokens in made] if rows.kind == "reward" else made


def _scored(tokens: list[Token]) -> list[Token]:
    """A row of a reward model, whose loss is on the score that is read at the last token."""
    *before, last = tokens
    return [*(replace(token, loss=0.0) for token in before), replace(last, loss=1.0)]


# ---- as people and programs read them --------------------------------------------------------------------------------


def _as_numbers(shown: Shown) -> dict:
    return {
        "source": shown.source,
        "place": shown.place,
        "format": shown.format,
        "row": shown.title,
        "ids": [token.id for token in shown.tokens],
        "texts": [token.text for token in shown.tokens],
        "roles": [token.role for token in shown.tokens],
        "loss": [token.loss for token in shown.tokens],
    }


def _print_legend(console: Console, kind: str) -> None:
    meaning = LOSS_ON.get(kind, "carries loss")
    if not console.is_terminal:
        console.print(f"{MARKS[0]}{MARKS[1]}: {meaning}")
        return
    line = Text()
    for role, style in STYLES.items():
        line.append(role, style=style)
        line.append("  ")
    line.append(f"bold and underlined: {meaning}")
    console.print(line)


def _print_row(console: Console, shown: Shown) -> None:
    trained = sum(token.loss > 0 for token in shown.tokens)
    title = f", {shown.title}" if shown.title else ""
    count = f"{plural(len(shown.tokens), 'token')}, {trained} of them with loss"
    console.print(Text(f"\n{shown.source}, {shown.place}{title} ({shown.format}): {count}", style="bold"))
    for role, tokens in itertools.groupby(shown.tokens, key=lambda token: token.role):
        line = Text(f"{role:>9} │ ", style="dim")
        for loss, run in itertools.groupby(tokens, key=lambda token: token.loss):
            text = "".join(token.text for token in run).replace("\n", "⏎")
            style = STYLES[role]
            if loss:
                style += " bold underline"
                text = text if console.is_terminal else f"{MARKS[0]}{text}{MARKS[1]}"
            line.append(text, style=style)
            if loss not in (0, 1):
                line.append(f" x {loss:g} ", style="dim")
        console.print(line)


def _summary(name: str, checked: Checked) -> Text:
    entry = checked.ledger.sources.get(name, {"records": 0})
    share = f"; {checked.trained / checked.tokens:.1%} of their tokens carry loss" if checked.trained else ""
    number = plural(checked.rows, "row")
    text = f"\n{name}: the first {plural(entry['records'], 'record')}: {checked.records} give {number}{share}"
    why = checked.ledger.why(name) if checked.records < entry["records"] else ""
    return Text(text + (f"; not used: {why}" if why else ""), style="bold")
