"""Checks of chat records before the first stage runs: the first records of each source, whether the chat template can
write them, and whether the records are enough."""

import functools

from pipeline.core.errors import Problems, UserError
from pipeline.data.chat.chat_sources import ChatSource, LabelledSource, PreferenceSource, StepSource, TuningSource
from pipeline.data.chat.conversations import (
    Conversation,
    Labelled,
    Pair,
    Prompt,
    Stepped,
    first_usable,
    load_conversations,
    load_labelled,
    load_pairs,
    load_prompts,
    load_stepped,
)
from pipeline.data.chat.record_accounting import key_of
from pipeline.data.chat.template import Chat
from pipeline.data.sources.sources import files

MAX_BYTES = 1_000_000  # of sources that are read completely here


def check_chat_records(
    sources: dict[str, TuningSource],
    holdout: float,
    chat: Chat | None,
    measures_only: bool = False,
    separator: str | None = None,
) -> None:
    """Read the first usable record of every source that is on this machine, and all records if they are few. Raises
    UserError with everything that is wrong.

    chat: the template that will write the records, if it is known. measures_only: nothing is trained on. separator:
    what an answer has between its steps, for sources with judged steps.
    """
    problems = Problems()
    usable = []
    for name, source in sources.items():
        if not source.is_here():
            continue
        with problems.gather():
            encode = None if chat is None else functools.partial(_template_problem, chat, separator)
            first_usable(source, name, encode=encode)
            usable.append(name)
    if len(usable) == len(sources):
        with problems.gather():
            _check_holdout(sources, holdout, measures_only)
    problems.refuse()


def _check_holdout(sources: dict[str, TuningSource], holdout: float, measures_only: bool) -> None:
    """Raise UserError if small sources leave nothing to train on, or nothing to measure on."""
    size = 0
    for name, source in sources.items():
        key, _, name = key_of(name).partition(".")
        size += sum(path.stat().st_size for _, path in files(source, name, key))
    if not sources or size > MAX_BYTES:
        return
    first = next(iter(sources.values()))
    if isinstance(first, ChatSource):
        noun, load = "conversations", load_conversations
    elif isinstance(first, PreferenceSource):
        noun, load = "pairs", load_pairs
    elif isinstance(first, LabelledSource):
        noun, load = "judged answers", load_labelled
    elif isinstance(first, StepSource):
        noun, load = "answers with judged steps", load_stepped
    else:
        noun, load = "prompts", load_prompts
    train, heldout, _ = load(sources, holdout)
    if not heldout or not train and not measures_only:
        raise UserError(
            f"sources: holdout: {holdout} leaves {len(train)} {noun} to train on and {len(heldout)} to measure on; give"
            " more records or another holdout"
        )


def _template_problem(
    chat: Chat, separator: str | None, row: Conversation | Pair | Labelled | Stepped | Prompt
) -> str | None:
    """Why a chat template cannot write a row as its stage will, or None."""
    if isinstance(row, Prompt):
        try:
            chat.prompt(row.dialogue)
        except ValueError as error:
            return str(error)
        return None
    if isinstance(row, Conversation):
        encoded = chat.rows([row.dialogue])[0]
    elif isinstance(row, Pair):
        encoded = chat.encode([row.dialogues[0]])[0]
    elif isinstance(row, Stepped):
        encoded = chat.steps([(row.dialogue(separator), row.pieces(separator))])[0]
    else:
        encoded = chat.encode([row.dialogue])[0]
    return encoded if isinstance(encoded, str) else None
