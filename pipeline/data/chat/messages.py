"""Messages of records, in the spellings that are in use, as one form: {role, content} and, where a message has them,
reasoning_content, tool_calls, tool_call_id, name of a tool, and weight in the loss.

Text is kept as it was written, white space included. A message that is marked not to be trained on (`train: false`,
`weight: 0`) gets `weight: 0.0`. A record with a field that changes what should be learned, and that is not supported,
is rejected (pipeline/data/chat/fields.py).
"""

import math

from pipeline.data.chat.fields import FLAGS, REASONING_TEXTS, SWITCHES, Rejected, empty, snake, unsupported
from pipeline.data.chat.tool_calls import TEXT_AFTER_CALL, calls_of, id_of, result_text
from pipeline.data.sources.text_encoding import printable_name

# Spellings of roles, in lower case.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",  # ShareGPT's own records also have the names of services
    "bing": "assistant",
    "bard": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    # An answer whose content is a tool call as JSON text.
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALL_ROLES = ("function_call", "tool_call")
CALLS = ("tool_calls", "function_call", "function_calls")
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
PART_METADATA = {"type", "id", "index", "cache_control"}
RESULT_IDS = ("tool_call_id", "tool_use_id", "call_id")


# ---- text ------------------------------------------------------------------------------------------------------------


def checked_text(value, what: str) -> str:
    """The text of a message as it was written. Raises Rejected for what is not text, or is empty."""
    if isinstance(value, list):
        value = "".join(_text_part(part, what) for part in value)
    value = whole_text(value, what)
    if not value.strip():
        raise Rejected(f"{what} is empty")
    return value


def whole_text(value, what: str) -> str:
    """A text, which may be empty. Raises Rejected for what is not text, and for half a character."""
    if not isinstance(value, str):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        raise Rejected(f"{what} is not text{' but a number' if number else ''}", "quote it" if number else "")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Rejected(f"{what} has half a character (a lone surrogate)") from None
    return value


def _text_part(part, what: str) -> str:
    """The text of one content part, `{type: text, text: ...}`."""
    if not isinstance(part, dict):
        raise Rejected(f"{what} is not text")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        raise Rejected(
            f"{what} has a part of type {printable_name(kind)}, and only text is supported",
            "exclude such records with `where`",
        )
    key = next((key for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)
    if key is None:
        raise Rejected(f"{what} has a part without text")
    _check_part(part, {key}, what)
    return part[key]


def _check_part(part: dict, used: set[str], where: str) -> None:
    """Raise Rejected for a content part with a field that would be dropped. Names that are metadata elsewhere are not
    here: the `url` of a part may be that of its image."""
    for name, value in part.items():
        if name not in used and snake(name) not in PART_METADATA and not empty(value):
            check_fields({name: value}, set(), f"a part of {where}")
            raise Rejected(
                f"a part of {where} has `{printable_name(name)}`, which is not a known field of a part",
                f"if it does not change what should be learned, give the source `ignore: [{printable_name(name)}]`",
            )


def comparison_text(text: str) -> str:
    """Normalised as in cleaning: what texts are compared by."""
    from pipeline.data.cleaning.normal_form import normalise

    return normalise(text).strip()


# ---- fields ----------------------------------------------------------------------------------------------------------


def check_fields(fields: dict, used: set[str], where: str, harmless: set[str] = frozenset()) -> None:
    """Raise Rejected if a field that changes what should be learned would be dropped."""
    dropped = unsupported(fields, used, harmless)
    if not dropped:
        return
    name, what = dropped[0]
    names = ", ".join(name for name, _ in dropped)
    if what is None:
        raise Rejected(
            f"{where} has `{name}`, which is not a known field",
            f"if it does not change what should be learned, give the source `ignore: [{names}]`",
        )
    raise Rejected(
        f"{where} has `{name}` ({what}), which is not supported",
        f"exclude such records with `where`, or give the source `ignore: [{names}]` to train without it",
    )


def _weight(value, name: str, where: str) -> float:
    """The weight in the loss that a flag or a number gives."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = -1.0
    if snake(name) in SWITCHES and weight not in (0, 1):
        raise Rejected(f"{where} has `{name}`: expected true or false, because a number may be a measurement")
    if not 0 <= weight < float("inf"):
        raise Rejected(f"{where} has `{name}`: expected true, false, or a number of at least 0")
    return weight


def weight_of(fields: dict, where: str) -> float | None:
    """The weight in the loss that the flags of a message or a record give, None if there are none."""
    weights = [
        _weight(fields[name], printable_name(name), where) for name in weight_fields(fields) if not empty(fields[name])
    ]
    if any(weights) and not all(weights):
        raise Rejected(f"{where} is marked both to be trained on and not")
    return math.prod(weights) if weights else None


def weight_fields(fields: dict) -> set[str]:
    """The fields that give a weight."""
    return {name for name in fields if snake(name) in FLAGS}


def reasoning_of(fields: dict, where: str) -> tuple[str, set[str]]:
    """(the reasoning that a message or a record gives by itself, empty for none, the fields that it is in)."""
    used = {name for name in fields if snake(name) in REASONING_TEXTS and not empty(fields[name])}
    texts = {checked_text(fields[name], f"`{printable_name(name)}` of {where}") for name in used}
    if len(texts) > 1:
        raise Rejected(f"{where} has two different reasonings")
    return next(iter(texts), ""), used


def without_nulls(value):
    """A value without the nulls in its objects, at any depth. A table gives all objects of a column the same keys, with
    null where an object does not have one: arguments of other tools, parameters of other functions."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def without_fields(record: dict, names: set[str]) -> dict:
    """A record without the fields `names`, its own and those of its messages and their parts. What is inside them,
    such as the arguments of a tool call, keeps its fields."""
    kept = {}
    for name, value in record.items():
        if name not in names:
            kept[name] = _messages_without(value, names)
    return kept


def fields_present(record: dict, names: set[str]) -> set[str]:
    """Those of `names` that `without_fields` would remove from a record."""
    present = names & record.keys()
    for value in record.values():
        for message in value if isinstance(value, list) else [value]:
            if not isinstance(message, dict) or not message.keys() & {"role", "from"}:
                continue
            present |= names & message.keys()
            content = message.get("content", message.get("value"))
            for part in content if isinstance(content, list) else ():
                present |= names & part.keys() if isinstance(part, dict) else set()
    return present


def _messages_without(value, names: set[str]):
    if isinstance(value, list):
        return [_messages_without(item, names) for item in value]
    if not isinstance(value, dict) or not value.keys() & {"role", "from"}:
        return value
    kept = {name: inner for name, inner in value.items() if name not in names}
    for name in ("content", "value"):
        if isinstance(kept.get(name), list):
            kept[name] = [_part_without(part, names) for part in kept[name]]
    return kept


def _part_without(part, names: set[str]):
    if not isinstance(part, dict):
        return part
    return {name: inner for name, inner in part.items() if name not in names}


# ---- messages --------------------------------------------------------------------------------------------------------


def parse_messages(messages: list) -> list[dict]:
    """Messages in one form. Raises Rejected."""
    return [one for message in messages for one in _message(message)]


def without_weight(message: dict) -> dict:
    """A message of a prompt, which carries no loss whatever its flags say."""
    return {key: value for key, value in message.items() if key != "weight"}


def message_text(message: dict) -> str:
    """All that a message says, as text: what rows are compared by."""
    parts = [message.get("reasoning_content", ""), message["content"]]
    for call in message.get("tool_calls", ()):
        parts += [call["name"], result_text(call["arguments"], "arguments")]
    return "\n".join(part for part in parts if part)


def role_of(message) -> str | None:
    """The role of a raw message, or None for one that is not known."""
    said = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return ROLES.get(said.strip().lower()) if isinstance(said, str) else None


def _message(message) -> list[dict]:
    """A raw message in one form; the results of tools in its parts are messages of their own."""
    keys = ("role", "content")
    if isinstance(message, dict) and "from" in message and "role" not in message:  # ShareGPT
        keys = ("from", "value")
    if not isinstance(message, dict) or keys[0] not in message:
        raise Rejected("a message has no role and content")
    role = role_of(message)
    if role is None:
        said = printable_name(message[keys[0]])
        raise Rejected(f"unknown role '{said}'; expected one of {', '.join(ROLES)}")
    where = f"a message of the {role}"
    used = {*keys, *weight_fields(message)}
    content, called = message.get(keys[1]), message[keys[0]]
    if isinstance(called, str) and called.strip().lower() in CALL_ROLES:
        check_fields(message, used, where)
        return [_weighed({"role": role, "content": "", "tool_calls": calls_of(content, where)}, message, where)]
    if role == "tool":
        return [_result(message, content, used, where)]
    read, results = {"role": role, "content": content}, []
    if isinstance(content, list):
        read, results = _parts(role, content, where)
    if role == "assistant":
        used |= _own_fields(message, read, where)
    check_fields(message, used, where)
    if keys[1] not in message and "tool_calls" not in read:
        raise Rejected("a message has no role and content")
    if "tool_calls" in read and (read["content"] is None or not str(read["content"]).strip()):
        read["content"] = ""
    elif read["content"] == "" and results:
        return results
    else:
        read["content"] = checked_text(read["content"], where)
    if "reasoning_content" in read and read["content"].lstrip().startswith("<think>"):
        raise Rejected(f"{where} gives its reasoning twice: in a field and in <think>")
    return [*results, _weighed(read, message, where)]


def _own_fields(message: dict, read: dict, where: str) -> set[str]:
    """Add what an answer's own fields say besides its content: reasoning and tool calls. Returns these fields."""
    thought, used = reasoning_of(message, where)
    if thought and "reasoning_content" in read:
        raise Rejected(f"{where} has two different reasonings")
    if thought:
        read["reasoning_content"] = thought
    for name in message:
        if snake(name) in CALLS and not empty(message[name]):
            if "tool_calls" in read:
                raise Rejected(f"{where} gives its tool calls twice")
            read["tool_calls"] = calls_of(message[name], where)
            used.add(name)
    return used


def _result(message: dict, content, used: set[str], where: str) -> dict:
    """What a tool has answered: a text, or any JSON. It may be empty."""
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        content = "".join(_text_part(part, where) for part in content)
    if content is None:
        raise Rejected(f"{where} is empty")
    read = {"role": "tool", "content": whole_text(result_text(content, where), where)}
    if (call_id := id_of(message, RESULT_IDS)) is not None:
        read["tool_call_id"] = whole_text(call_id, f"the id of the call in {where}")
    if isinstance(message.get("name"), str) and message["name"]:
        read["name"] = whole_text(message["name"], f"`name` of {where}")
    used |= {"name", *RESULT_IDS} | {name for name in message if message[name] is False and snake(name) == "is_error"}
    check_fields(message, used, where)
    return _weighed(read, message, where)


def _weighed(read: dict, message: dict, where: str) -> dict:
    """A message with its weight in the loss, where that of an answer is not 1."""
    weight = weight_of(message, where)
    if read["role"] == "assistant" and weight not in (None, 1):
        read["weight"] = weight
    if read["role"] != "assistant" and weight:
        raise Rejected(f"{where} is marked to be trained on, and only answers are")
    return read


def _parts(role: str, parts: list, where: str) -> tuple[dict, list[dict]]:
    """(a message of the texts, thoughts and tool calls among content parts, messages of the results of tools). Raises
    Rejected for an order of them that a chat template does not write."""
    texts, thoughts, calls, results = [], [], [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if role == "assistant" and kind in THOUGHT_PARTS:
            key = next((key for key in (kind, "text", "content") if isinstance(part.get(key), str)), None)
            if key is None:
                raise Rejected(f"{where} has a part without text")
            if any(texts) or calls:
                raise Rejected(f"{where} has reasoning after {'a tool call' if calls else 'text'}")
            _check_part(part, {key, "signature"}, where)
            thoughts.append(whole_text(part[key], where))
        elif role == "assistant" and kind == "tool_use":
            calls += calls_of(part, where)
        elif role == "user" and kind == "tool_result":
            if any(texts):
                raise Rejected(f"{where} has a tool's result after text")
            result = {key: value for key, value in part.items() if key != "type"}
            results.append(_result(result, part.get("content"), {"content"}, "a message of the tool"))
        else:
            texts.append(_text_part(part, where))
            if texts[-1] and calls:
                raise Rejected(TEXT_AFTER_CALL)
    read = {"role": role, "content": "".join(texts)}
    if any(thought.strip() for thought in thoughts):
        read["reasoning_content"] = "".join(thoughts)
    if calls:
        read["tool_calls"] = calls
    return read, results
