"""Rows of records for a person to look at: what each token spells, whose message it is from, and whether it carries
loss. `alma inspect masks` prints them.

    for name, tokens in tokens_of(chat, conversation):
        for token in tokens:
            token.text, token.role, token.loss
"""

from dataclasses import dataclass

from pipeline.data.chat.conversations import Conversation, Labelled, Pair, Prompt, Stepped
from pipeline.data.chat.template import Chat, Traced

PENDING = 8  # most tokens that spell one character


@dataclass(frozen=True)
class Token:
    """One token of a row."""

    id: int
    text: str
    """What it spells; empty for all but the last of several tokens that spell one character."""
    role: str
    """system, user, assistant or tool: of the message that it is from; template: what the chat template writes around
    messages."""
    loss: float
    """Its weight in the loss; 0: it carries none."""


def tokens_of(
    chat: Chat, record: Conversation | Pair | Labelled | Stepped | Prompt, separator: str = "\n"
) -> list[tuple[str, list[Token]]]:
    """(name, tokens) of each row that a record becomes: the rows of a conversation, both answers of a pair, a prompt.
    The name is empty where there is one row. separator: between the steps of an answer. Raises ValueError if the chat
    template cannot write the record."""
    if isinstance(record, Pair):
        names, rows = ["chosen", "rejected"], []
        for dialogue in record.dialogues:
            rows += chat.traced(dialogue, "last answer")
    elif isinstance(record, Conversation):
        rows = chat.traced(record.dialogue)
        names = [f"row {number} of {len(rows)}" for number in range(1, len(rows) + 1)]
    elif isinstance(record, Stepped):
        names, rows = [""], [chat.traced_steps(record.dialogue(separator), record.pieces(separator))]
    else:
        learned = "last answer" if isinstance(record, Labelled) else "nothing"
        names, rows = [""], chat.traced(record.dialogue, learned)
    if len(rows) == 1:
        names = [""]
    return [(name, _tokens(chat, row)) for name, row in zip(names, rows, strict=True)]


def _tokens(chat: Chat, row: Traced) -> list[Token]:
    texts = texts_of(chat, row.ids)
    return [Token(*values) for values in zip(row.ids, texts, row.roles, row.weights, strict=True)]


def texts_of(chat: Chat, ids: list[int]) -> list[str]:
    """What each token spells after those before it: some decoders drop a space in front of the first one, and a
    character may take several tokens."""
    texts: list[str] = []
    context, read = 0, 0  # the last piece of text begins at token `context`, and its end is token `read`
    for end in range(1, len(ids) + 1):
        text = chat.decode(ids[context:end])
        if text.endswith("\ufffd") and end < len(ids) and end - read < PENDING:
            texts.append("")  # part of a character, perhaps
            continue
        texts.append(text[len(chat.decode(ids[context:read])) :])
        context, read = read, end
    return texts
