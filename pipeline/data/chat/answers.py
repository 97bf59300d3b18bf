"""Where the assistant's answers are in the text of any chat template.

An answer is what a template writes after the prompt that waits for it: with the messages up to an answer, its text is
that of the prompt (`add_generation_prompt`) and then the answer, up to the end of its turn. So what is learned is what
inference asks for, whatever the template writes, and no generation marks are needed.

A template may write a turn differently once it is history: Qwen 3 and DeepSeek-R1 drop earlier reasoning, gpt-oss ends
the last answer with another token. A conversation is then several rows, each with the history as inference will show
it, and each answer carries loss in one of them. Where the text up to one answer is how the text up to the next begins,
both are in one row.
"""

import json
import re
from dataclasses import dataclass, replace

from pipeline.core.errors import UserError
from pipeline.data.chat.answer_probe import NEXT, Probe
from pipeline.data.chat.fields import is_metadata, snake
from pipeline.data.chat.rendering import Dialogue, Template, Unusable
from pipeline.data.chat.thoughts import END_THINK, THINK, answer_text, before_content, split, thinks_twice, with_dropped

SHAPES = 4096  # of conversations, whose check is remembered


@dataclass(frozen=True)
class Row:
    """Text of a conversation up to the end of one of its answers."""

    text: str
    spans: list[tuple[int, int, float]]
    """What carries loss: first character, character after the last, weight."""
    num_messages: int
    """How many messages of the conversation it has, from the first on."""


class Answers:
    """The answers of conversations in a template's text. Raises Unusable for a template that cannot be used, as Probe
    does, which sets its style. `added`: the tokenizer's added tokens; `eos`: its end of text."""

    def __init__(self, template: Template, added: list[str], eos: str | None):
        self.template = template
        self._dropped: dict[tuple, str | None] = {}
        probe = Probe(template, added, eos)
        self.end, self.tool_end = probe.end, probe.tool_end
        self._removes_thoughts = probe.removes_thoughts
        self._switches = sorted(name for name in template.variables if "think" in name or "reason" in name)

    @classmethod
    def of(cls, tokenizer, template: Template | None = None) -> "Answers":
        """The answers by a tokenizer's own template."""
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        return cls(template or Template(tokenizer), added, tokenizer.eos_token)

    def end_ids(self, tokenizer) -> list[int]:
        """Ids of the tokens that end a turn: first that of an answer, then that of one that calls tools."""
        ends = [self.end] if self.tool_end is None else [self.end, self.tool_end]
        return tokenizer.convert_tokens_to_ids(list(dict.fromkeys(end.token for end in ends)))

    # ---- conversations -----------------------------------------------------------------------------------------------

    def rows(self, dialogue: Dialogue) -> list[Row]:
        """The text of a conversation as rows in which each answer carries loss once. Raises Unusable."""
        rows: list[Row] = []
        for number, message in enumerate(dialogue.messages):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            row = self.row(dialogue, number)
            if rows and row.text.startswith(rows[-1].text):
                rows[-1] = replace(row, spans=rows[-1].spans + row.spans)
            else:
                rows.append(row)
        rows = [row for row in rows if row.spans]
        if not rows:
            raise Unusable("no token of it carries loss: the chat template marks none as the assistant's")
        return rows

    def row(self, dialogue: Dialogue, number: int) -> Row:
        """The text up to the end of message `number`, an answer, which alone carries loss."""
        message = dialogue.messages[number]
        answered = dialogue.until(number + 1)
        asked = self._text(dialogue.until(number), generation_prompt=True)
        text, marks = self.template.write(answered)
        if text.startswith(asked) and thinks_twice(asked, text[len(asked) :]):
            message = split(message)
            answered = replace(answered, messages=[*answered.messages[:-1], message])
            text, marks = self.template.write(answered)
        if not text.startswith(asked):
            header, said = self._after_question(answered)
            text = answer_text(asked, header, said, message, self._switches)
            marks = [(len(asked), len(text))] if marks else []
        whole = with_dropped(len(asked), text, message, self._removes_thoughts, self._switches)
        if whole != text:
            text, marks = whole, [(len(asked), len(whole))] if marks else []
        end = self._end_of(text, len(asked), message)
        text = end[0]
        self._check_written(answered, text, len(asked))
        spans = [(len(asked), len(text), message.get("weight", 1.0))]
        if self.template.has_marks:
            spans = _marked(spans[0], marks, end[1], text)
        return Row(text, spans, number + 1)

    def _after_question(self, answered: Dialogue) -> tuple[str, str]:
        """What the template writes behind the message that the last one answers: (in the prompt that waits for the
        answer, with the answer). Found by another content of that message, which no other text has."""
        *before, answer = answered.messages
        if not before or before[-1]["role"] == "assistant":
            return "", ""
        question = replace(answered, messages=[*before[:-1], {**before[-1], "content": NEXT}])
        header = self._text(question, generation_prompt=True).rpartition(NEXT)[2]
        return header, self._text(replace(question, messages=[*question.messages, answer])).rpartition(NEXT)[2]

    def prompt(self, dialogue: Dialogue) -> str:
        """The text of a conversation that waits for an answer. Raises Unusable."""
        text = self._text(dialogue, generation_prompt=True)
        self._check_written(dialogue, text, len(text))
        return text

    def _text(self, dialogue: Dialogue, generation_prompt: bool = False) -> str:
        return self.template.write(dialogue, generation_prompt)[0]

    def _end_of(self, text: str, begin: int, message: dict) -> tuple[str, int]:
        """(text up to the end of the turn of an answer that begins at `begin`, where the token that ends it begins)."""
        ends = [self.end]
        if calls := message.get("tool_calls"):
            if self.tool_end is None:
                raise Unusable("the chat template does not write tool calls")
            ends = [self.tool_end, self.end]
            begin = max(begin, text.rfind(calls[-1]["name"]))  # a text beside the calls may have an end of its own
        for end in ends:
            if end.how == "written" and (at := text.find(end.token, begin)) >= 0:
                return text[: at + len(end.token)], at
        if ends[0].how == "written":
            raise Unusable(f"the chat template does not end the answer with {ends[0].token}")
        if ends[0].how == "added":
            content = message["content"]
            at = text.rfind(content, begin)  # what follows it is white space in front of the next turn
            text = text[: at + len(content)] if content and at >= 0 else text.rstrip()
        text += ends[0].gap
        return text + ends[0].token, len(text)

    # ---- what a template drops ---------------------------------------------------------------------------------------

    def _check_written(self, dialogue: Dialogue, text: str, begin: int) -> None:
        """Raise Unusable if a template has dropped a part of a conversation. Its last message may be an answer,
        which begins at `begin` in its text."""
        reason = self._dropped_of_shape(dialogue)
        if reason is not None:
            raise Unusable(reason)
        for message in dialogue.messages:
            answer = message is dialogue.messages[-1] and begin < len(text)
            where = text[begin:] if answer else text
            what = f"the content of a message of the {message['role']}"
            content = message["content"]
            if message["role"] == "assistant" and END_THINK in content:
                thought, _, content = content.rpartition(END_THINK)
                if answer and not _is_in(thought.strip().removeprefix(THINK), where):
                    raise Unusable("the chat template drops the reasoning of an answer")
            if not _is_in(content, where):
                raise Unusable(f"the chat template does not write {what} as it is")
            reasoning = message.get("reasoning_content", "")
            if answer and not _is_in(reasoning, before_content(where, content)):
                raise Unusable("the chat template does not write the reasoning of an answer")
            if message.get("tool_calls") and self.tool_end is None:
                raise Unusable("the chat template does not write tool calls")
            for call in message.get("tool_calls", ()):
                if not (_is_in(call["name"], where) and _holds(call["arguments"], where)):
                    raise Unusable("the chat template does not write a tool call as it is")
        for function in dialogue.tools or ():
            if not _is_in(str(function.get("function", function).get("name", "")), text):
                raise Unusable("the chat template does not write the tools")
        if not all(_holds_document(document, text) for document in dialogue.options.get("documents", [])):
            raise Unusable("the chat template does not write the documents")

    def _dropped_of_shape(self, dialogue: Dialogue) -> str | None:
        """What a template drops of conversations with these roles, whatever they say; None for nothing."""
        messages = dialogue.messages
        shape = (
            bool(dialogue.tools),
            *(
                (one["role"], bool(one["content"]), bool(one.get("reasoning_content")), bool(one.get("tool_calls")))
                for one in messages
            ),
        )
        if shape not in self._dropped:
            if len(self._dropped) > SHAPES:
                self._dropped.clear()
            self._dropped[shape] = self._probe_shape(dialogue)
        return self._dropped[shape]

    def _probe_shape(self, dialogue: Dialogue) -> str | None:
        contents = [f"qz{number} content zq" for number in range(len(dialogue.messages))]
        messages = [
            {**message, "content": content if message["content"] else ""}
            for message, content in zip(dialogue.messages, contents, strict=True)
        ]
        probe = replace(dialogue, messages=messages)
        try:
            text = self._text(probe)
            if messages[-1]["role"] == "assistant":  # the prompt, which a row begins with, may have more
                text += self._text(probe.until(len(messages) - 1), generation_prompt=True)
        except Unusable:  # it reads what messages say
            return None
        for message, content in zip(messages, contents, strict=True):
            if message["content"] and content not in text:
                return f"the chat template does not write the content of a message of the {message['role']}"
        return None


def ends_of_turn(tokenizer) -> list[int]:
    """Ids of the tokens that end a turn of the assistant by a tokenizer's chat template: of an answer, and of one that
    calls tools. None without a template, and for one that answers cannot be found in."""
    try:
        answers = Answers.of(tokenizer)
    except (UserError, Unusable):
        return []
    return answers.end_ids(tokenizer)


# ---- text ------------------------------------------------------------------------------------------------------------


def row_of_steps(row: Row, steps: list[str], content: str) -> Row:
    """A row whose only answer, with the text `content`, is divided into spans: one for each of `steps`, which follow
    each other in it. What the template writes in front of the text belongs to the first step, and what it writes after
    it, the end of the turn, to the last one. Raises Unusable if the text is not written as it is."""
    begin, end = row.spans[0][0], row.spans[-1][1]
    at = row.text.find(content, begin)
    if "".join(steps) != content or at < 0:
        raise Unusable("the chat template does not write the steps as they are, white space at their ends included")
    spans = []
    for step in steps:
        at += len(step)
        spans.append((begin, at, 1.0))
        begin = at
    spans[-1] = (spans[-1][0], end, 1.0)
    return Row(row.text, spans, row.num_messages)


def _marked(
    span: tuple[int, int, float], marks: list[tuple[int, int]], end: int, text: str
) -> list[tuple[int, int, float]]:
    """What of an answer is between generation marks, and the end of its turn, which begins at `end`; nothing if
    nothing of it is marked. White space that the template has in front of the first mark is the model's to write."""
    first, last, weight = span
    inside = [(max(first, begin), min(last, stop), weight) for begin, stop in marks]
    inside = [(begin, stop, weight) for begin, stop, weight in inside if begin < stop]
    if not inside:
        return []
    if not text[first : inside[0][0]].strip():
        inside[0] = (first, *inside[0][1:])
    begin, stop, _ = inside[-1]
    if stop >= end:
        return [*inside[:-1], (begin, last, weight)]
    return [*inside, (end, last, weight)]


def _is_in(value: str, text: str) -> bool:
    """Whether a text has been written, white space at its ends aside, perhaps as JSON."""
    value = value.strip()
    if value in text:
        return True
    return any(json.dumps(value, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True))


def _holds_document(document, text: str) -> bool:
    """Whether what a document says has been written. Templates write titles and texts, and not the names of fields;
    where a document comes from may be missing."""
    if not isinstance(document, dict):
        return _holds(document, text)
    said = [value for key, value in document.items() if snake(key) == "title" or not is_metadata(snake(key))]
    return all(_holds_document(value, text) for value in said)


def _holds(value, text: str) -> bool:
    """Whether all texts and numbers at any depth of an object have been written."""
    if isinstance(value, dict):
        return all(_is_in(str(key), text) and _holds(inner, text) for key, inner in value.items())
    if isinstance(value, list):
        return all(_holds(inner, text) for inner in value)
    if isinstance(value, str):
        return _is_in(value, text)
    return value is None or isinstance(value, bool) or re.search(re.escape(str(value)), text) is not None
