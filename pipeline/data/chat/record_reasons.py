"""Why a record that is in no known format cannot be read, and what to do: the formats, which one is nearest, and
templates for the fields that it has."""

import json

from pipeline.data.chat.fields import Rejected, snake
from pipeline.data.sources.text_encoding import printable_name

# The formats without templates, as a user writes them, and fields of other formats that mean the same as theirs.
FORMATS = {
    "conversation": (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output")),
    "pair": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "judged answer": (("prompt", "completion", "label"), ("messages", "label")),
    "answer with judged steps": (("prompt", "completions", "labels"), ("input", "label")),
    "prompt": (("prompt",), ("instruction",), ("messages",)),
}
PROMPT_NAMES = ("prompt", "instruction", "question", "query", "problem", "input", "user")
ANSWER_NAMES = ("completion", "output", "response", "answer", "answers", "target", "solution", "assistant", "reply")
LIST_FIELDS = ("messages", "conversations", "prompt", "completion", "completions", "labels", "chosen", "rejected")


def unrecognised(fields: dict, what: str) -> Rejected:
    """The reason of a record in no known format: its fields, the formats, and what is nearest."""
    names = ", ".join(printable_name(name) for name in list(fields)[:20]) or "none"
    expected = ", ".join(" + ".join(format) for format in FORMATS[what])
    asked = next((name for name in fields if snake(name) in PROMPT_NAMES), None)
    said = next((name for name in fields if snake(name) in ANSWER_NAMES), None)
    near = max(FORMATS[what], key=lambda format: (len(set(format) & set(fields)) / len(format), -len(format)))
    lacking = [name for name in near if name not in fields]
    kinds = {name: _unreadable(name, fields[name]) for name in near if name in fields}
    wrong = [f"`{name}` is {kind}" for name, kind in kinds.items() if kind]
    reason = f"no {what} among its fields ({names}): expected {expected}, or templates"
    if lacking and len(lacking) < len(near):
        reason += f"; nearest is {' + '.join(near)}, without {', '.join(lacking)}"
    elif wrong and not lacking:
        reason += f"; it has {' + '.join(near)}, but {', '.join(wrong)}"
    advice = ""
    if what == "conversation" and asked is not None and said is not None and asked != said:
        advice = (
            f"give the source templates: messages: [{{role: user, content: '{{{printable_name(asked)}}}'}},"
            f" {{role: assistant, content: '{{{printable_name(said)}}}'}}]"
        )
    return Rejected(reason, advice)


def _unreadable(name: str, value) -> str:
    """What a field holds that cannot be read there; empty for text, and for a list where one can be."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "" if name in LIST_FIELDS else "a list"
    return "" if isinstance(value, str) else "an object"


def no_prompt(fields: dict | None = None) -> Rejected:
    """The reason of a pair without a prompt, with the templates that would read the field that may be one."""
    asked = next((name for name in fields or {} if snake(name) in PROMPT_NAMES), None)
    advice = ""
    if asked is not None:
        prompt = f"'{{{printable_name(asked)}}}'"
        if "system" in fields:
            prompt = f"[{{role: system, content: '{{system}}'}}, {{role: user, content: {prompt}}}]"
        advice = f"give the source templates: prompt: {prompt}, chosen: '{{chosen}}', rejected: '{{rejected}}'"
    return Rejected(
        "no prompt: texts that begin alike do not say where the prompt ends; give templates for prompt, chosen and"
        " rejected",
        advice,
    )
