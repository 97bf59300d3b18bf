"""Which characters of a row are from which message: for people who look at a row. Nothing that is trained depends on
it.

Answers are where answers.py finds them. For the other messages the conversation is written once more with a mark at
both ends of each content: what is between them is from that message, as long as the text without marks is the row's.
"""

import os
from dataclasses import replace

from pipeline.data.chat.rendering import Dialogue, Unusable

TEMPLATE = "template"
"""The role of what a chat template writes around messages."""
MARK = 0x10E000  # private-use characters from here on, which no text has


def roles_of(answers, dialogue: Dialogue, row) -> list[str]:
    """The role of each character of a row of `answers` (answers.py): that of the message that it is from, or
    TEMPLATE."""
    roles = [TEMPLATE] * len(row.text)
    shown = dialogue.until(row.num_messages)
    for begin, end, role in [*_contents(answers, shown, row), *_answers(answers, shown, row)]:
        roles[begin:end] = [role] * (end - begin)
    return roles


def role_in(roles: list[str]) -> str:
    """The role of a token, given those of its characters: the white space in front of a word may be the template's."""
    return next((role for role in roles if role != TEMPLATE), TEMPLATE)


def _answers(answers, dialogue: Dialogue, row) -> list[tuple[int, int, str]]:
    """Spans of answers: those that carry loss, and those that do not but are in the row as they would be learned."""
    spans = [(begin, end, "assistant") for begin, end, _ in row.spans]
    for number, message in enumerate(dialogue.messages):
        if message["role"] != "assistant":
            continue
        try:
            alone = answers.row(dialogue, number)
        except Unusable:
            continue
        if row.text.startswith(alone.text):
            spans += [(begin, end, "assistant") for begin, end, _ in alone.spans]
    return spans


def _contents(answers, dialogue: Dialogue, row) -> list[tuple[int, int, str]]:
    """Spans of contents. A content that the template changes, or moves to another place, may be missing."""
    marked = [_marked(message, MARK + 2 * number) for number, message in enumerate(dialogue.messages)]
    is_prompt = not row.spans
    try:
        text, _ = answers.template.write(replace(dialogue, messages=marked), generation_prompt=is_prompt)
    except Unusable:
        return []
    plain, places = [], {}
    for character in text:
        if MARK <= ord(character) < MARK + 2 * len(marked):
            places[ord(character) - MARK] = len(plain)
        else:
            plain.append(character)
    same = len(os.path.commonprefix(["".join(plain), row.text]))
    spans = []
    for number, message in enumerate(dialogue.messages):
        begin, end = places.get(2 * number), places.get(2 * number + 1)
        if begin is not None and end is not None and end <= same:
            begin, end = _with_white_space(row.text, begin, end, message["content"])
            spans.append((begin, end, message["role"]))
    return spans


def _with_white_space(text: str, begin: int, end: int, content: str) -> tuple[int, int]:
    """The span of a content without white space at its ends, extended by as much of that as the template has kept."""
    before = content[: len(content) - len(content.lstrip())]
    after = content[len(content.rstrip()) :]
    kept_before = os.path.commonprefix([before[::-1], text[:begin][::-1]])
    kept_after = os.path.commonprefix([after, text[end:]])
    return begin - len(kept_before), end + len(kept_after)


def _marked(message: dict, mark: int) -> dict:
    """A message with marks at both ends of its content. White space stays outside: templates strip it."""
    content = message["content"]
    core = content.strip()
    if not core:
        return message
    before, after = content.split(core, 1)
    return {**message, "content": f"{before}{chr(mark)}{core}{chr(mark + 1)}{after}"}
