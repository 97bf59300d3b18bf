"""A model's own calls of tools: how a template writes them, found by writing one with it, so that they can be read from
what a model says; and what the template writes between a call and the next answer.

Templates that write a call as a JSON object with a name and arguments can be read, whatever they write around it
(Qwen, Hermes, Llama 3.1, older Mistral).
"""

import json

from pipeline.data.chat.answer_probe import ASKED, CALLED, GIVEN, SAID, TOOL, End, assistant, user
from pipeline.data.chat.answers import Answers
from pipeline.data.chat.fields import Rejected
from pipeline.data.chat.quoting import Quoting
from pipeline.data.chat.rendering import Dialogue, Unusable
from pipeline.data.chat.thoughts import END_THINK
from pipeline.data.chat.tool_calls import checked

DECODER = json.JSONDecoder()


class ToolTurns:
    """Reads calls and writes their results, as a template does. Raises Unusable for a template that cannot be read."""

    def __init__(self, answers: Answers):
        self.template = answers.template
        if answers.tool_end is None:
            raise Unusable("the chat template does not write tool calls")
        if answers.tool_end.how == "added":
            raise Unusable("the chat template does not end an answer that calls tools")
        self.ends: list[End] = [answers.tool_end, answers.end]
        written = self._written(answers)
        place, call = _first_call(written)
        self._name = next(key for key, value in call.items() if value == CALLED)
        self._arguments = next(key for key, value in call.items() if _as_object(value) == {"x": f"{GIVEN}1"})
        before = written[:place].rpartition(END_THINK)[2].rpartition(SAID)[2]
        self.marker = before.strip().removesuffix("[").strip()
        """What the template writes in front of a call; empty if an answer that is JSON is a call."""

    def _written(self, answers: Answers) -> str:
        """An answer with one call, as the template writes it."""
        for said in (SAID, ""):  # some templates write no text next to a call
            dialogue = Dialogue([user(ASKED), assistant(said, calls=1)], tools=[TOOL])
            try:
                row = answers.row(dialogue, 1)
            except Unusable:
                continue
            return row.text[row.spans[0][0] : row.spans[-1][1]]
        return answers.template.write(Dialogue([user(ASKED), assistant("", calls=1)], tools=[TOOL]))[0]

    def calls(self, text: str) -> list[dict]:
        """The calls in an answer, as {name, arguments}; none if it calls nothing. Raises ValueError for a call that
        cannot be read."""
        if not self.marker:
            try:
                return self._read(text)
            except ValueError:  # an answer that is not JSON, or other JSON
                return []
        _, *parts = text.split(self.marker)
        return [call for part in parts for call in self._read(part)]

    def _read(self, text: str) -> list[dict]:
        try:
            value, _ = DECODER.raw_decode(text.lstrip())
        except RecursionError:
            raise ValueError("JSON that is nested too deeply") from None
        calls = []
        for call in value if isinstance(value, list) else [value]:
            if not isinstance(call, dict) or not isinstance(call.get(self._name), str):
                raise ValueError(f"JSON without {self._name!r}")
            arguments = _as_object(call.get(self._arguments, {}))
            if not isinstance(arguments, dict):
                raise ValueError(f"{self._arguments!r} is not an object")
            try:
                calls.append(checked({"name": call[self._name], "arguments": arguments}, "the call"))
            except Rejected as error:
                raise ValueError(str(error)) from None
        return calls

    def following(self, names: list[str], results: list[str], quoting: Quoting) -> str:
        """What the template writes after an answer that calls functions of these names: their results, and what is in
        front of the next answer. Special tokens that are spelled in it are text. Raises Unusable."""
        calls, answers = [], []
        for number, (name, result) in enumerate(zip(names, results, strict=True)):
            calls.append({"id": f"call_{number}", "name": name, "arguments": {"x": f"{GIVEN}{number}"}})
            answers.append({"role": "tool", "content": result, "tool_call_id": f"call_{number}", "name": name})
        # With a thought, which some templates otherwise add to a last answer and not to an earlier one
        answer = {"role": "assistant", "content": "", "reasoning_content": SAID, "tool_calls": calls}
        dialogue = quoting.dialogue(Dialogue([user(ASKED), answer, *answers], tools=[TOOL]))
        text, _ = self.template.write(dialogue, generation_prompt=True)
        called = text.find(f"{GIVEN}{len(calls) - 1}")
        for end in self.ends:
            at = text.find(end.token, called)
            if called >= 0 and at >= 0:
                following = text[at + len(end.token) :]
                break
        else:
            raise Unusable("the chat template does not end an answer that calls tools")
        for message in dialogue.messages[2:]:
            result = message["content"].strip()
            if result not in following and json.dumps(result, ensure_ascii=False)[1:-1] not in following:
                raise Unusable("the chat template does not write the result of a tool as it is")
        return following


def _first_call(text: str) -> tuple[int, dict]:
    """(where the probing call begins in a text, the JSON object that it is)."""
    at = text.find("{")
    while at >= 0:
        try:
            value, _ = DECODER.raw_decode(text, at)
        except ValueError:
            value = None
        if isinstance(value, dict) and CALLED in value.values():
            if any(_as_object(inner) == {"x": f"{GIVEN}1"} for inner in value.values()):
                return at, value
        at = text.find("{", at + 1)
    raise Unusable("the chat template does not write a tool call as a JSON object with a name and arguments")


def _as_object(value):
    """The value of JSON text, as some templates write arguments; any other value, and other text, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
