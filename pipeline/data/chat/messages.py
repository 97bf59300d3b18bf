"""Records that hold a conversation already, in the shapes that are in use: messages, ShareGPT conversations, prompt +
completion, Alpaca's instruction + input + output, and pairs of answers. Each becomes a list of {role, content}.

Text is kept as it was written, white space included. A message that is marked not to be trained on (`train: false`,
`weight: 0`) gets `weight: 0.0`. A record with a field that changes what should be learned, and that is not supported,
is rejected (pipeline/data/chat/fields.py).
"""

import math

from pipeline.data.chat.fields import (
    ANSWERS,
    FLAGS,
    JUDGEMENTS,
    MEANINGFUL,
    REASONING,
    REFERENCES,
    empty,
    shown,
    snake,
    unsupported,
)

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
SYSTEM = ("system", "system_prompt")
# What a pair says of its two answers, chosen first: numbers that must not contradict the order.
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_reward", "rejected_reward"),
)


class Rejected(Exception):
    """Why a record cannot be used, and what the user can do about it."""

    def __init__(self, reason: str, advice: str = ""):
        super().__init__(reason)
        self.advice = advice


# ---- text ------------------------------------------------------------------------------------------------------------


def checked_text(value, what: str) -> str:
    """The text of a message as it was written. Raises Rejected for what is no text, or none."""
    if isinstance(value, list):
        value = "".join(_part(part, what) for part in value)
    if not isinstance(value, str):
        raise Rejected(f"{what} is no text")
    if not value.strip():
        raise Rejected(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Rejected(f"{what} has half a character (a lone surrogate)") from None
    return value


def _part(part, what: str) -> str:
    """The text of one content part, `{type: text, text: ...}`."""
    if not isinstance(part, dict):
        raise Rejected(f"{what} is no text")
    kind = part.get("type", "text")
    if kind != "text":
        raise Rejected(
            f"{what} has a part of type {shown(kind)}, and only text is supported",
            "leave such records out with `where`",
        )
    key = next((key for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)
    if key is None:
        raise Rejected(f"{what} has a part without text")
    _complete(part, {"type", key}, f"a part of {what}")
    return part[key]


def normal(text: str) -> str:
    """Normalised as in cleaning: what texts are compared by."""
    from pipeline.data.cleaning.normal_form import normalise

    return normalise(text).strip()


# ---- fields ----------------------------------------------------------------------------------------------------------


def _complete(fields: dict, used: set[str], where: str, harmless: set[str] = frozenset()) -> None:
    """Raise Rejected if a field that changes what should be learned would be left out."""
    found = unsupported(fields, used, harmless)
    if not found:
        return
    name, what = found[0]
    names = ", ".join(name for name, _ in found)
    if what is None:
        raise Rejected(
            f"{where} has `{name}`, and nobody knows what it means here",
            f"if it says nothing about what should be learned, give the source `ignore: [{names}]`",
        )
    raise Rejected(
        f"{where} has `{name}` ({what}), which is not supported",
        f"leave such records out with `where`, or give the source `ignore: [{names}]` to train without it",
    )


def _weight(value, name: str, where: str) -> float:
    """The weight in the loss that a flag or a number gives."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise Rejected(f"{where} has `{name}`: expected true, false, or a number of at least 0")
    return weight


def _trained(fields: dict, where: str) -> float | None:
    """The weight in the loss that the flags of a message or a record give, None if there are none."""
    weights = [
        _weight(value, shown(name), where)
        for name, value in fields.items()
        if snake(name) in FLAGS and not empty(value)
    ]
    if any(weights) and not all(weights):
        raise Rejected(f"{where} is marked both to be trained on and not")
    return math.prod(weights) if weights else None


def _flags(fields: dict) -> set[str]:
    return {name for name in fields if snake(name) in FLAGS}


# ---- messages --------------------------------------------------------------------------------------------------------


def normalised(messages: list) -> list[dict]:
    """Messages as {role, content}, with `weight` where that of an answer in the loss is not 1. Raises Rejected."""
    return [_message(message) for message in messages]


def _message(message) -> dict:
    keys = ("role", "content")
    if isinstance(message, dict) and "from" in message and "role" not in message:  # ShareGPT
        keys = ("from", "value")
    if not isinstance(message, dict) or keys[0] not in message:
        raise Rejected("a message has no role and content")
    said = message[keys[0]]
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise Rejected(f"unknown role '{shown(said)}'; expected one of {', '.join(ROLES)}")
    where = f"a message of the {role}"
    _complete(message, {*keys, *_flags(message)}, where)
    if keys[1] not in message:
        raise Rejected("a message has no role and content")
    found = {"role": role, "content": checked_text(message[keys[1]], where)}
    weight = _trained(message, where)
    if role == "assistant" and weight not in (None, 1):
        found["weight"] = weight
    if role != "assistant" and weight:
        raise Rejected(f"{where} is marked to be trained on, and only answers are")
    return found


def _list(value, role: str, what: str) -> list:
    """Raw messages of a field that holds a text, a message, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    raise Rejected(f"{what} is no text")


def _with_system(fields: dict, messages: list[dict]) -> tuple[list[dict], set[str]]:
    """Messages with a record's own system message in front, and the fields that it is in."""
    used = {name for name in fields if snake(name) in SYSTEM}
    values = {name: "" if fields[name] in ([], {}) else fields[name] for name in used}
    texts = {
        checked_text(value, f"`{shown(name)}`")
        for name, value in values.items()
        if not (isinstance(value, str) and not value.strip())
    }
    if messages and messages[0]["role"] == "system":
        texts.discard(messages[0]["content"])
        if texts:
            raise Rejected("the record has two system messages")
        return messages, used
    if len(texts) > 1:
        raise Rejected("the record has two system messages")
    return [{"role": "system", "content": text} for text in texts] + messages, used


def _alpaca(fields: dict) -> tuple[list[dict], set[str]] | None:
    """Alpaca's prompt: the turns of `history`, then the instruction with, on a line of its own, its input."""
    if not isinstance(fields.get("instruction"), str):
        return None
    more = fields.get("input")
    if not (more is None or isinstance(more, str)):
        raise Rejected("`input` is no text")
    messages = []
    history = fields.get("history") or []
    for turn in history if isinstance(history, (list, tuple)) else [history]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Rejected("`history` is no list of [question, answer]")
        messages += normalised([{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}])
    asked = fields["instruction"]
    if more and more.strip():
        asked = f"{asked}\n{more}" if asked.strip() else more
    messages += normalised([{"role": "user", "content": asked}])
    return messages, {"instruction", "input", "history"}


def _read_again(value) -> list[dict] | None:
    """A field as a conversation without weights and the like, None if it is none."""
    if not isinstance(value, list):
        return None
    try:
        return [_plain(message) for message in normalised(value)]
    except Rejected:
        return None


def _repeats(value, messages: list[dict]) -> bool:
    """Whether a field only writes again what the messages hold: one of them, or all of them."""
    if isinstance(value, str):
        return value.strip() in (message["content"].strip() for message in messages)
    again = _read_again(value)
    if again is None:
        return False
    whole = [_plain(message) for message in messages]
    spoken = [message for message in whole if message["role"] != "system"]
    return again in (whole, whole[:-1], spoken, spoken[:-1])


def _repeated(fields: dict, messages: list[dict]) -> set[str]:
    """Fields beside a conversation that only write it again, as many published sets have them."""
    names = MEANINGFUL["another answer, or another part of the conversation"].split()
    used = {name for name in names if name in fields and _repeats(fields[name], messages)}
    text = fields.get("text")
    if isinstance(text, str) and all(message["content"].strip() in text for message in messages):
        used.add("text")  # all of them in somebody's template
    return used


# ---- records ---------------------------------------------------------------------------------------------------------


def _given(fields: dict) -> dict:
    """Without fields that hold nothing, as columns of parquet do where another row has a value."""
    return {name: value for name, value in fields.items() if value is not None}


def _none(fields: dict, what: str, expected: str) -> Rejected:
    names = ", ".join(shown(name) for name in list(fields)[:20]) or "none"
    return Rejected(f"no {what} among its fields ({names}): expected {expected}")


def conversation_of(record: dict, named: set[str] = frozenset()) -> list[dict]:
    """The messages of a record. `named` are fields that the source itself gives a meaning. Raises Rejected."""
    fields = _given(record)
    name = next((name for name in ("messages", "conversations") if name in fields), None)
    if name is not None:
        if not isinstance(fields[name], list):
            raise Rejected("messages are no list")
        messages, used = normalised(fields[name]), {name}
    elif "prompt" in fields and "completion" in fields:
        turns = [
            *_list(fields["prompt"], "user", "`prompt`"),
            *_list(fields["completion"], "assistant", "`completion`"),
        ]
        messages, used = normalised(turns), {"prompt", "completion"}
    elif (prompt := _alpaca(fields)) is not None and isinstance(fields.get("output"), str):
        messages, used = prompt
        messages += normalised([{"role": "assistant", "content": fields["output"]}])
        used = used | {"output"}
    elif "messages" in record:
        raise Rejected("messages are no list")
    else:
        raise _none(
            record,
            "conversation",
            "messages, conversations, prompt + completion, instruction + output, or `messages` templates",
        )
    messages, system = _with_system(fields, messages)
    _good(fields, named)
    _weigh(messages, _trained(fields, "the record"))
    # The rejected answer of a pair, and scores of both, say nothing about the conversation that stands beside them.
    pair = {"rejected", *(name for names in PAIR_SCORES for name in names)} if "chosen" in fields else set()
    used = used | named | system | _flags(fields) | {"label", "kto_tag"} | _repeated(fields, messages)
    _complete(fields, used, "the record", {"name"} | pair)
    return messages


def _weigh(messages: list[dict], weight: float | None) -> None:
    """Multiply the weights of answers by that of their record."""
    for message in messages:
        if message["role"] == "assistant" and weight not in (None, 1):
            message["weight"] = message.get("weight", 1.0) * weight


def _good(fields: dict, named: set[str]) -> None:
    """Raise Rejected for a record that is marked not to be learned: `weight: 0`, or `label: false` of a KTO set."""
    for name in ("label", "kto_tag"):
        value = fields.get(name)
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            value = value.strip().lower() == "true"
        if value is False:
            raise Rejected(f"`{name}` is false: a bad answer", f"leave such records out with `where: {{{name}: true}}`")
        if name not in named and value is not True and not empty(value):
            raise Rejected(
                f"the record has `{name}` that is neither true nor false",
                f"if it says nothing about what should be learned, give the source `ignore: [{name}]`",
            )
    if _trained(fields, "the record") == 0:
        raise Rejected("the record is marked not to be trained on")


def pair_of(record: dict, named: set[str] = frozenset()) -> tuple[list[dict], str, str, float | None]:
    """(prompt messages, chosen text, rejected text, `margin` if it has one) of a record that holds a pair of answers.
    Raises Rejected."""
    fields = _given(record)
    if "chosen" not in fields or "rejected" not in fields:
        raise _none(record, "pair", "chosen and rejected, or templates for prompt, chosen and rejected")
    if any(isinstance(fields[key], (str, list, dict)) and not fields[key] for key in ("chosen", "rejected")):
        raise Rejected("an empty answer")
    prompt, used = _prompt_of_pair(fields)
    answers = {}
    for key in ("chosen", "rejected"):
        answers[key] = normalised(_list(fields[key], "assistant", f"`{key}`"))
    if prompt is None:
        if not (isinstance(fields["chosen"], list) and isinstance(fields["rejected"], list)):
            raise Rejected(
                "no prompt: texts that begin alike do not say where the prompt ends; give templates for prompt, chosen"
                " and rejected"
            )
        prompt = answers["chosen"][: _alike(answers["chosen"], answers["rejected"])]
    for key, answer in answers.items():
        if prompt and answer[: len(prompt)] == prompt:  # the answers repeat the prompt
            answer = answers[key] = answer[len(prompt) :]
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise Rejected(f"{key} is not one message of the assistant")
        if answer[0].get("weight") == 0:
            raise Rejected(f"{key} is marked not to be trained on")
    prompt, system = _with_system(fields, [_plain(message) for message in prompt])
    if _trained(fields, "the record") == 0:
        raise Rejected("the record is marked not to be trained on")
    whole = [*prompt, *answers["chosen"]]
    used = used | named | system | _flags(fields) | {"chosen", "rejected", "margin"} | _ordered(fields)
    _complete(fields, used | _repeated(fields, whole), "the record", {"name"} | REFERENCES)
    margin = None if "margin" not in fields else number(fields["margin"])
    return prompt, answers["chosen"][0]["content"], answers["rejected"][0]["content"], margin


def _prompt_of_pair(fields: dict) -> tuple[list[dict] | None, set[str]]:
    """The prompt that a pair gives by itself, and the fields that it is in."""
    for name in ("prompt", "messages", "conversations"):
        if name in fields:
            return normalised(_list(fields[name], "user", f"`{name}`")), {name}
    return _alpaca(fields) or (None, set())


def _alike(one: list[dict], other: list[dict]) -> int:
    """How many messages two conversations have in common at their beginning, but for the last of each."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    return count


def _ordered(fields: dict) -> set[str]:
    """Scores of both answers. Raises Rejected if they say that the rejected one is better."""
    plain = {snake(name): name for name in fields}
    used = set()
    for better, worse in PAIR_SCORES:
        if better in plain and worse in plain:
            if number(fields[plain[better]], better) < number(fields[plain[worse]], worse):
                raise Rejected(f"{better} is below {worse}")
            used |= {plain[better], plain[worse]}
    return used


def number(value, what: str = "margin") -> float:
    """A finite number. Raises Rejected."""
    try:
        found = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or not abs(found) < float("inf"):
        raise Rejected(f"{what} is no number")
    return found


def prompt_of(record: dict, named: set[str] = frozenset()) -> list[dict]:
    """The prompt of a record as messages: of a conversation, all up to where the assistant gives the last answer.
    Raises Rejected."""
    fields = _given(record)
    name = next((name for name in ("prompt", "messages", "conversations") if name in fields), None)
    if name is not None:
        raw = list(_list(fields[name], "user", f"`{name}`"))
        while name != "prompt" and raw and isinstance(raw[-1], dict) and ROLES.get(_role(raw[-1])) == "assistant":
            raw.pop()
        messages, used = normalised(raw), {name}
    elif (alpaca := _alpaca(fields)) is not None:
        messages, used = alpaca
    else:
        raise _none(record, "prompt", "prompt, instruction or messages, or a `prompt` template")
    messages, system = _with_system(fields, [_plain(message) for message in messages])
    if all(message["role"] != "user" for message in messages) or messages[-1]["role"] == "assistant":
        raise Rejected("the prompt does not end with the user")
    used = used | named | system | _repeated(fields, messages)
    # Beside a prompt, another shape of the same record holds its answer too.
    used |= {other for other in ("messages", "conversations") if _begins_with(fields.get(other), messages)}
    scores = {name for names in PAIR_SCORES for name in names}
    _complete(fields, used, "the record", {"name", "ability"} | ANSWERS | JUDGEMENTS | REASONING | scores)
    return messages


def _begins_with(value, messages: list[dict]) -> bool:
    """Whether a list of raw messages is a conversation that begins with `messages`."""
    again = _read_again(value)
    if again is None:
        return False
    return again[: len(messages)] == messages


def _role(message: dict) -> str:
    said = message.get("role", message.get("from"))
    return said if isinstance(said, str) else ""


def _plain(message: dict) -> dict:
    """A message of a prompt, which carries no loss whatever its flags say."""
    return {"role": message["role"], "content": message["content"]}
