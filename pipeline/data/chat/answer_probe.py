"""What a chat template writes around messages, found by writing a few with it: in which form it reads them, and how an
answer ends."""

import itertools
import os
from dataclasses import dataclass, replace

from pipeline.data.chat.quoting import any_of
from pipeline.data.chat.rendering import Dialogue, Style, Template, Unusable

# Contents of messages that show what a template writes around them.
ASKED, SAID, NEXT = "qz7 asked zq7", "qz7 said zq7", "qz7 next zq7"
CALLED, GIVEN, RESULT = "qz7_called_zq7", "qz7 given zq7", "qz7 result zq7"
PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "description": "d"}}, "required": ["x"]}
TOOL = {"type": "function", "function": {"name": CALLED, "description": "d", "parameters": PARAMETERS}}


@dataclass(frozen=True)
class End:
    """How an answer ends."""

    token: str
    how: str
    """written: the template writes the token after each answer; next: it writes it where the next turn begins; added:
    it writes nothing, and the answer is followed by the tokenizer's end of text."""
    gap: str = ""
    """White space in front of the token of the next turn."""


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, calls: int = 0) -> dict:
    message = {"role": "assistant", "content": content}
    if calls:
        numbers = range(1, calls + 1)
        message["tool_calls"] = [
            {"id": f"call_{number}", "name": CALLED, "arguments": {"x": f"{GIVEN}{number}"}} for number in numbers
        ]
    return message


def tool(content: str) -> dict:
    return {"role": "tool", "content": content, "tool_call_id": "call_1", "name": CALLED}


class Probe:
    """What a template is like. Raises Unusable for one that writes no conversation of one question and one answer, and
    for one in which the end of an answer is not a token.

    Sets the style of the template. `added`: the tokenizer's added tokens; `eos`: its end of text.
    """

    def __init__(self, template: Template, added: list[str], eos: str | None):
        self.template, self._eos = template, eos
        self._added = any_of([token for token in added if token.strip()])
        template.style = self._content_style()
        self.removes_thoughts = self._removes_thoughts()
        """Whether the template removes <think>...</think> from the texts of answers, of the last one or of earlier
        ones: its model writes it."""
        self.end = self._plain_end()
        self.tool_end: End | None = None
        """The end of an answer that calls tools; None if the template cannot write one."""
        style = self._tool_style()
        if style is not None:
            template.style = style
            self.tool_end = self._tool_end()

    def _text(self, dialogue: Dialogue) -> str:
        return self.template.write(dialogue)[0]

    def _content_style(self) -> Style:
        """Whether content is a text or a list of parts."""
        reasons = []
        for style in (Style(), Style(parts=True)):
            self.template.style = style
            try:
                text = self._text(Dialogue([user(ASKED), assistant(SAID)]))
            except Unusable as error:
                reasons.append(str(error))
                continue
            if ASKED in text and SAID in text:
                return style
        raise Unusable(reasons[0] if reasons else "the chat template does not write what the messages say")

    def _removes_thoughts(self) -> bool:
        try:
            text = self._text(Dialogue([user(ASKED), assistant(f"<think>\n{GIVEN}\n</think>\n\n{SAID}"), user(NEXT)]))
        except Unusable:  # only one question
            return False
        return SAID in text and NEXT in text and GIVEN not in text

    def _tokens_at(self, text: str) -> tuple[list[str], str]:
        """(added tokens that a text begins with, white space aside, what follows them)."""
        tokens = []
        while match := self._added.match(text := text.lstrip()):
            tokens.append(match[0])
            text = text[match.end() :]
        return tokens, text

    def _plain_end(self) -> End:
        after = self._text(Dialogue([user(ASKED), assistant(SAID)])).rpartition(SAID)[2]
        tokens, rest = self._tokens_at(after)
        try:
            both = self._text(Dialogue([user(ASKED), assistant(SAID), user(NEXT)]))
        except Unusable:  # only one question
            both = ""
        between = both.partition(SAID)[2].partition(NEXT)[0]
        as_history, _ = self._tokens_at(between)
        if rest.strip():  # text between the tokens that end a turn
            shared = self._added.findall(os.path.commonprefix([after, between or after]))
            if shared:
                return End(self._eos if self._eos in shared else shared[-1], "written")
        if tokens:  # some templates end the last turn, or the whole text, with one more
            return End(self._first([token for token in tokens if token in as_history] or tokens), "written")
        if rest.strip():
            raise Unusable(
                f"the chat template ends an answer with {rest.strip()[:40]!r}, which is not a token of the tokenizer:"
                " the model would never learn to end its turn. Add the token, or give the stage a template by name"
                " (chat_template: chatml)"
            )
        if as_history:
            return End(self._first(as_history), "next", _gap(between.removeprefix(after)))
        if self._eos is None:
            raise Unusable("neither the chat template nor the tokenizer has a token that ends an answer")
        return End(self._eos, "added")

    def _first(self, tokens: list[str]) -> str:
        return self._eos if self._eos in tokens else tokens[0]

    def _tool_style(self) -> Style | None:
        """How a template reads tool calls; None if it cannot write them with their results."""
        messages = [user(ASKED), assistant("", calls=1), tool(RESULT), assistant(SAID)]
        forms = itertools.product(("as given", "nine digits", "function and number"), (False, True), (False, True))
        styles = [
            replace(self.template.style, ids=ids, arguments_as_text=as_text, none_content=none_content)
            for ids, as_text, none_content in forms
        ]
        for name_first in (True, False):
            for style in styles:
                if self._writes_calls(style, messages, name_first):
                    return style
        return None

    def _writes_calls(self, style: Style, messages: list[dict], name_first: bool) -> bool:
        """Whether a template writes a call and its result in a style. `name_first`: with the name in front of the
        arguments, and so not only among the tools or in the result, where templates whose ids say it have it too."""
        before, self.template.style = self.template.style, style
        try:
            text = self._text(Dialogue(messages, tools=[TOOL]))
        except Unusable:
            return False
        finally:
            self.template.style = before
        twice_quoted = f'\\"{GIVEN}1' in text  # JSON text that the template has quoted as JSON again
        called = text.partition(ASKED)[2]
        if name_first:
            called = called.partition(f"{GIVEN}1")[0]
        return CALLED in called and all(content in text for content in (f"{GIVEN}1", RESULT, SAID)) and not twice_quoted

    def _tool_end(self) -> End | None:
        """How an answer with tool calls ends; None if it is not ended."""
        called = Dialogue([user(ASKED), assistant("", calls=1)], tools=[TOOL])
        try:
            text = self._text(called)
            if self.end.how == "next":
                messages = [*called.messages, tool(RESULT)]
                following = self._text(replace(called, messages=messages))
                if not following.startswith(text):
                    return None
                between = following.removeprefix(text)
                tokens, _ = self._tokens_at(between)
                return End(tokens[0], "next", _gap(between)) if tokens else None
        except Unusable:
            return None
        tail = text.rpartition(f"{GIVEN}1")[2]
        if self.end.how == "added" or self.end.token in tail:
            return self.end
        token = next((token for token in self._added.findall(tail)[::-1] if tail.rstrip().endswith(token)), None)
        if token is None:
            return None
        try:
            twice = self._text(replace(called, messages=[user(ASKED), assistant("", calls=2)]))
        except Unusable:
            return End(token, "written")
        # a token that closes each call does not end the turn
        return End(token, "written") if f"{GIVEN}2" not in twice or twice.count(token) == text.count(token) else None


def _gap(text: str) -> str:
    """The white space that a text begins with."""
    return text[: len(text) - len(text.lstrip())]
