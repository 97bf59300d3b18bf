"""A tokenizer's chat template as text: compiled in transformers' sandbox, given messages in the form that the template
reads, and its errors as sentences that name the line of the template.

    template = Template(tokenizer)
    text, marks = template.write(Dialogue([{"role": "user", "content": "2+2?"}]), generation_prompt=True)
"""

import contextlib
import copy
import datetime
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.core.errors import UserError

# The date that a template gets where it asks for today's. Llama 3.2's template itself falls back on this day.
DATE = "2024-07-26"
SOURCE = "<template>"  # the file name that jinja gives a template in tracebacks


class Unusable(Exception):
    """Why a conversation cannot be written with a chat template."""


@dataclass(frozen=True)
class Dialogue:
    """What a template writes: messages, and what stands next to them in a record."""

    messages: list[dict]
    """role and content (text); of an answer also reasoning_content (text), tool_calls (list of {id, name, arguments})
    and weight (of its loss, by default 1); of a tool's message also tool_call_id and name."""
    tools: list[dict] | None = None
    """Functions that the assistant may call, in OpenAI's form."""
    options: dict = field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""

    def until(self, number: int) -> "Dialogue":
        """The first `number` messages."""
        return replace(self, messages=self.messages[:number])


@dataclass(frozen=True)
class Style:
    """The form in which a template reads messages."""

    parts: bool = False
    """content is a list of parts; else a text."""
    arguments_as_text: bool = False
    """arguments of a tool call are JSON text; else an object."""
    none_content: bool = False
    """content of a tool call without text is none; else an empty text."""
    ids: Literal["as given", "nine digits", "function and number"] = "as given"
    """What ids of tool calls are: nine digits (Mistral), or functions.NAME:NUMBER (Kimi)."""


class CallIds:
    """Ids of the calls of one conversation and of their results, in a template's style."""

    def __init__(self, style: Style):
        self._style, self._count = style, 0
        self._by_given: dict[str, str] = {}
        self._unanswered: list[str] = []

    def of_call(self, call: dict) -> str | None:
        given = call.get("id")
        if self._style.ids == "as given":
            return given
        name = f"functions.{call['name']}:{self._count}"
        written = f"{self._count:09d}" if self._style.ids == "nine digits" else name
        self._count += 1
        self._unanswered.append(written)
        if given is not None:
            self._by_given[given] = written
        return written

    def of_result(self, given: str | None) -> str | None:
        """A result that names no call answers the first one that has no result."""
        if self._style.ids == "as given":
            return given
        written = self._by_given.get(given) if given is not None else None
        if written is None and given is None and self._unanswered:
            written = self._unanswered[0]
        if written in self._unanswered:
            self._unanswered.remove(written)
        return given if written is None else written


class Template:
    """The chat template of a tokenizer. Raises UserError for one that is missing, cannot be parsed, or draws at
    random."""

    def __init__(self, tokenizer, date: str | None = None):
        """`date` is what a template is given that asks for today's date: YYYY-MM-DD, by default DATE."""
        self.date = datetime.date.fromisoformat(date or DATE)
        self.writes_date = False
        """Whether the template has asked for the date."""
        self.name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        self.style = Style()
        self._tokens = dict(tokenizer.special_tokens_map)
        self._compiled = self._compile(tokenizer)

    def write(self, dialogue: Dialogue, generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """(text, its character spans between generation marks). Raises Unusable."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        for name in dialogue.options:
            if name not in self.variables:
                raise Unusable(f"the chat template does not know `{name}`")
        values = {
            "messages": self._messages(dialogue.messages),
            "tools": copy.deepcopy(dialogue.tools) or None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **self._tokens,
            **dialogue.options,
        }
        try:
            if self.has_marks:
                return _render_with_assistant_indices(self._compiled, **values)
            return self._compiled.render(**values), []
        except TemplateError as error:
            raise Unusable(f"the chat template refuses it: {error}{_line(error)}") from None
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"  # what a template computes may fail
            raise Unusable(f"the chat template fails on it: {reason}{_line(error)}") from None

    def _messages(self, messages: list[dict]) -> list[dict]:
        """Messages as transformers hands them to a template, in the template's style."""
        ids = CallIds(self.style)
        return [self._message(message, ids) for message in messages]

    def _message(self, message: dict, ids: "CallIds") -> dict:
        written = {"role": message["role"], "content": message["content"]}
        if reasoning := message.get("reasoning_content"):
            written["reasoning_content"] = written["thinking"] = reasoning  # the names that transformers fills
        if calls := message.get("tool_calls"):
            written["tool_calls"] = [self._call(call, ids) for call in calls]
            if self.style.none_content and not message["content"]:
                written["content"] = None
        if message["role"] == "tool":
            result_id = ids.of_result(message.get("tool_call_id"))
            if result_id is not None:
                written["tool_call_id"] = result_id
        if "name" in message:
            written["name"] = message["name"]
        if self.style.parts and written["content"] is not None:
            written["content"] = [{"type": "text", "text": written["content"]}]
        return written

    def _call(self, call: dict, ids: "CallIds") -> dict:
        arguments = copy.deepcopy(call["arguments"])
        if self.style.arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        written = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        call_id = ids.of_call(call)
        if call_id is not None:
            written["id"] = call_id
        return written

    def _compile(self, tokenizer):
        """The tokenizer's template as transformers compiles it, but with a fixed date."""
        from jinja2 import TemplateSyntaxError, meta, nodes
        from transformers.utils.chat_template_utils import _compile_jinja_template

        def strftime_now(form: str) -> str:
            self.writes_date = True
            return self.date.strftime(form)

        if not tokenizer.chat_template:
            raise UserError(
                f"{self.name}: has no chat template; give the stage one by name (chat_template: chatml), or add"
                " chat_template.jinja to the folder"
            )
        try:
            source = tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                f"{self.name}: has several chat templates ({', '.join(sorted(tokenizer.chat_template))}) and none of"
                " them is called default; leave the one to train with in chat_template.jinja"
            ) from None
        try:
            environment = _compile_jinja_template(source).environment
            tree = environment.parse(source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{self.name}: its chat template is not valid Jinja: {error.message} (line {error.lineno} of the"
                " template)"
            ) from None
        for node in tree.find_all(nodes.Filter):
            if node.name == "random":
                raise UserError(
                    f"{self.name}: its chat template draws at random (line {node.lineno}), so that rows would differ"
                    " from run to run"
                )
        self.has_marks = any(node.name == "_generation_support" for node in tree.find_all(nodes.ExtensionAttribute))
        """Whether the template has generation marks."""
        self.variables = meta.find_undeclared_variables(tree)
        """What the template may be given."""
        return environment.from_string(source, globals={"strftime_now": strftime_now})


@contextlib.contextmanager
def fixed_date(tokenizer, date: str | None) -> Iterator[None]:
    """Inside, `tokenizer.apply_chat_template` gives a template that asks for today's date this one: YYYY-MM-DD, by
    default DATE. transformers takes no function as a variable of a template."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names = _compile_jinja_template(tokenizer.get_chat_template()).globals  # of the template that transformers keeps
    today = names["strftime_now"]
    names["strftime_now"] = datetime.date.fromisoformat(date or DATE).strftime
    try:
        yield
    finally:
        names["strftime_now"] = today


def _line(error: Exception) -> str:
    """Where in the template an error was raised, for the end of a sentence."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == SOURCE]
    return f" (line {lines[-1]} of the template)" if lines else ""
