"""Fields next to the messages of a record: system message, reasoning, tools, variables of the chat template, weights,
judgements, and fields that repeat the messages."""

from dataclasses import dataclass, field

from pipeline.data.chat import tool_calls
from pipeline.data.chat.fields import MEANINGFUL, PLACEHOLDER, Rejected, empty, file_fields, snake
from pipeline.data.chat.messages import checked_text, parse_messages, reasoning_of, weight_of, without_weight
from pipeline.data.sources.text_encoding import printable_name

SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
LABELS = ("label", "kto_tag")
TEMPLATE_VARIABLES = ("enable_thinking", "documents")  # variables of chat templates that a record may give by itself
# What a chat template is given anyway.
RESERVED_VARIABLES = {
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
}


@dataclass
class ParsedRecord:
    """What a record holds."""

    messages: list[dict]
    format: str
    """The format that has been recognised, as it is reported."""
    tools: list[dict] | None = None
    options: dict = field(default_factory=dict)
    """Variables of the chat template that the record gives."""


def add_other_fields(parsed: ParsedRecord, fields: dict, thoughts: bool = True) -> set[str]:
    """Add to what a record holds the fields next to its messages: system message, reasoning before its only answer,
    tools, and variables of the template. Returns these fields."""
    used = _add_system(parsed, fields) if "chat" not in fields else set()
    answers = [message for message in parsed.messages if message["role"] == "assistant"]
    if thoughts and len(answers) == 1:
        thought, names = reasoning_of(fields, "the record")
        if thought and "reasoning_content" in answers[0]:
            raise Rejected("the record has two different reasonings")
        if thought:
            answers[0]["reasoning_content"] = thought
        used |= names
    names = [name for name in fields if snake(name) in TOOLS and not empty(fields[name])]
    if len(names) > 1 or names and parsed.tools:
        raise Rejected("the record gives its tools twice")
    for name in names:
        parsed.tools = tool_calls.tools_of(fields[name], f"`{name}`")
    used |= set(names) | _add_options(parsed, fields)
    _refuse_placeholders(parsed.messages, fields)
    return used


def _refuse_placeholders(messages: list[dict], fields: dict) -> None:
    """Raise Rejected for text with a place for an image beside the name of a file, which is that image's."""
    names = file_fields(fields)
    for message in messages if names else ():
        if place := PLACEHOLDER.match(message["content"]):
            raise Rejected(
                f"the record has `{printable_name(names[0])}` and {place[1] or place[2]} in its text: content that is"
                " not text, which is not supported",
                "exclude such records with `where`",
            )


def _add_system(parsed: ParsedRecord, fields: dict) -> set[str]:
    """A record's own system message in front of its messages. Returns the fields that it is in."""
    used = {name for name in fields if snake(name) in SYSTEM}
    texts = set()
    for name in used:
        value = "" if fields[name] in ([], {}) else fields[name]
        if not isinstance(value, str) or value.strip():
            texts.add(checked_text(value, f"`{printable_name(name)}`"))
    messages = parsed.messages
    if messages and messages[0]["role"] == "system":
        texts.discard(messages[0]["content"])
        if texts:
            raise Rejected("the record has two system messages")
    if len(texts) > 1:
        raise Rejected("the record has two system messages")
    messages[:0] = [{"role": "system", "content": text} for text in texts]
    return used


def _add_options(parsed: ParsedRecord, fields: dict) -> set[str]:
    used = {name for name in TEMPLATE_VARIABLES if not empty(fields.get(name))}
    parsed.options = {name: tool_calls.checked(fields[name], f"`{name}`") for name in sorted(used)}
    more = fields.get("chat_template_kwargs")
    if not empty(more):
        more = tool_calls.from_json(more, "`chat_template_kwargs`")
        if not isinstance(more, dict) or (taken := RESERVED_VARIABLES & set(more)):
            what = f"`chat_template_kwargs.{min(taken)}`" if isinstance(more, dict) else "`chat_template_kwargs`"
            raise Rejected(f"{what} is not a variable of the chat template that a record may give")
        parsed.options |= tool_calls.checked(more, "`chat_template_kwargs`")
        used.add("chat_template_kwargs")
    if "documents" in parsed.options and not isinstance(parsed.options["documents"], list):
        raise Rejected("`documents` is not a list")
    return used


# ---- weights and judgements ------------------------------------------------------------------------------------------


def refuse_bad(fields: dict, named: set[str]) -> None:
    """Raise Rejected for a record that is marked not to be learned: `weight: 0`, or `label: false` of a KTO set."""
    for name in LABELS:
        value = fields.get(name)
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            value = value.strip().lower() == "true"
        if value is False:
            raise Rejected(f"`{name}` is false: a bad answer", f"exclude such records with `where: {{{name}: true}}`")
        if name not in named and value is not True and not empty(value):
            raise Rejected(
                f"the record has `{name}` that is neither true nor false",
                f"if it does not change what should be learned, give the source `ignore: [{name}]`",
            )
    if weight_of(fields, "the record") == 0:
        raise Rejected("the record is marked not to be trained on")


def refuse_weight(weight: float | None, where: str) -> None:
    """Raise Rejected for a pair or a judged answer with a weight, which the losses of these do not have."""
    if weight == 0:
        raise Rejected(f"{where} is marked not to be trained on")
    if weight not in (None, 1):
        raise Rejected(f"{where} has the weight {weight:g}; weights are only supported in conversations")


def multiply_weights(messages: list[dict], weight: float | None) -> None:
    """Multiply the weights of answers by that of their record."""
    for message in messages:
        if message["role"] == "assistant" and weight not in (None, 1):
            message["weight"] = message.get("weight", 1.0) * weight


def truth_of(value, what: str) -> bool:
    """true or false, as words and as numbers, too. Raises Rejected."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "-1": False}
    result = words.get(str(value).strip().lower())
    if result is None:
        raise Rejected(f"{what} is neither true nor false")
    return result


def number(value, what: str = "margin") -> float:
    """A finite number. Raises Rejected."""
    try:
        result = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = None
    if result is None or not abs(result) < float("inf"):
        raise Rejected(f"{what} is not a number")
    return result


# ---- what is written twice -------------------------------------------------------------------------------------------


def _as_messages(value) -> list[dict] | None:
    """A field as a conversation without weights and the like, None if it is not one."""
    if not isinstance(value, list):
        return None
    try:
        return [without_weight(message) for message in parse_messages(value)]
    except Rejected:
        return None


def _repeats(value, messages: list[dict]) -> bool:
    """Whether a field only writes again what the messages hold: one of them, or all of them."""
    if isinstance(value, str):
        return value.strip() in (message["content"].strip() for message in messages)
    again = _as_messages(value)
    if again is None:
        return False
    whole = [without_weight(message) for message in messages]
    without_system = [message for message in whole if message["role"] != "system"]
    return again in (whole, whole[:-1], without_system, without_system[:-1])


def repeated_fields(fields: dict, messages: list[dict]) -> set[str]:
    """Fields next to a conversation that only write it again, as many published sets have them."""
    names = MEANINGFUL["another answer, or another part of the conversation"].split()
    used = {name for name in names if name in fields and _repeats(fields[name], messages)}
    text = fields.get("text")
    if isinstance(text, str) and all(message["content"].strip() in text for message in messages):
        used.add("text")  # all of them in somebody's template
    return used


def begins_with(value, messages: list[dict]) -> bool:
    """Whether a list of raw messages is a conversation that begins with `messages`."""
    again = _as_messages(value)
    return again is not None and again[: len(messages)] == messages
