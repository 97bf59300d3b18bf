"""Records that hold a conversation already, in the shapes that are in use: messages, ShareGPT conversations, prompt +
completion, Alpaca's instruction + input + output, and TRL's preference formats. Each becomes a list of {role, content},
normalised as in cleaning.
"""

import copy

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


class Rejected(Exception):
    """Why a record cannot be used."""


def clean_text(text, what: str) -> str:
    """Normalised as in cleaning, without white space at the ends: it would merge with the template's own and be
    other tokens at inference."""
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
        text = "".join(str(part.get("text", part.get("value", ""))) for part in text)
    if not isinstance(text, str):
        raise Rejected(f"{what} is no text")
    text = normal(text)
    if not text:
        raise Rejected(f"{what} is empty")
    return text


def normal(text: str) -> str:
    """Normalised as in cleaning, without white space at its ends."""
    from pipeline.data.text import normalise

    return normalise(text).strip()


def normalised(messages: list) -> list[dict]:
    """Messages with known roles and normal text. Raises Rejected."""
    found = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise Rejected("a message has no role and content")
        role = ROLES.get(message["role"]) if isinstance(message["role"], str) else None
        if role is None:
            raise Rejected(f"unknown role {message['role']!r}; expected one of {', '.join(ROLES)}")
        found.append({"role": role, "content": clean_text(message["content"], f"a message of the {role}")})
    return found


def _chatml(fields: dict) -> dict:
    """ShareGPT's from/value as role/content, by TRL. It is imported only when a record needs it: 0.5 s in a stage
    that has loaded torch and transformers, 8 s alone."""
    lists = [value for value in fields.values() if isinstance(value, list)]
    if "conversations" not in fields and not any(
        isinstance(message, dict) and "from" in message for value in lists for message in value
    ):
        return fields
    from trl.data_utils import maybe_convert_to_chatml

    return maybe_convert_to_chatml(copy.deepcopy(fields))


def _alpaca(fields: dict) -> str | None:
    """Instruction and, on a line of its own, its input."""
    if not isinstance(fields.get("instruction"), str):
        return None
    return "\n".join(
        part for part in (fields["instruction"], fields.get("input")) if isinstance(part, str) and part.strip()
    )


def messages_of(fields: dict) -> list:
    """The messages of a record as it has them. Raises Rejected."""
    system = (
        [{"role": "system", "content": fields["system"]}]
        if isinstance(fields.get("system"), str) and fields["system"].strip()
        else []
    )
    if "messages" in fields or "conversations" in fields:
        messages = _chatml(fields)["messages"]
    elif "prompt" in fields and "completion" in fields:
        chat = _chatml({key: fields[key] for key in ("prompt", "completion")})
        messages = _turn(chat["prompt"], "user") + _turn(chat["completion"], "assistant")
    elif _alpaca(fields) is not None and isinstance(fields.get("output"), str):
        messages = [{"role": "user", "content": _alpaca(fields)}, {"role": "assistant", "content": fields["output"]}]
    else:
        raise Rejected(
            f"no conversation among its fields ({', '.join(map(str, fields)) or 'none'}): "
            "expected messages, conversations, prompt + completion, instruction + output, or `messages` templates"
        )
    if not isinstance(messages, list):
        raise Rejected("messages are no list")
    return system + messages


def _turn(value, role: str) -> list:
    return (
        [{"role": role, "content": value}] if isinstance(value, str) else value if isinstance(value, list) else [value]
    )


def pair_of(fields: dict) -> tuple[list, str, str]:
    """(prompt messages, chosen text, rejected text) of a record in one of TRL's preference formats."""
    if "chosen" not in fields or "rejected" not in fields:
        raise Rejected(
            f"no pair among its fields ({', '.join(map(str, fields)) or 'none'}): expected chosen and rejected, or"
            " templates for prompt, chosen and rejected"
        )
    row = _chatml(
        {
            key: [value] if isinstance(value, dict) else value
            for key, value in fields.items()
            if key in ("prompt", "chosen", "rejected", "conversations", "messages")
        }
    )
    if "prompt" not in row:
        row |= (
            {"prompt": row["messages"]} if "messages" in row else {"prompt": _alpaca(fields)} if _alpaca(fields) else {}
        )
    row.pop("messages", None)
    if not row["chosen"] or not row["rejected"]:
        raise Rejected("an empty answer")
    if "prompt" not in row and isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        from trl.data_utils import maybe_extract_prompt

        row = maybe_extract_prompt(row)
    if "prompt" not in row:
        raise Rejected(
            "no prompt: texts that begin alike do not say where the prompt ends; give templates for prompt, chosen and"
            " rejected"
        )
    answers = [_turn(row[key], "assistant") for key in ("chosen", "rejected")]
    prompt = _turn(row["prompt"], "user")
    for key, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer[: len(prompt)] == prompt:  # the answers repeat a prompt that is also given on its own
            answer = answers[key == "rejected"] = answer[len(prompt) :]
        if len(answer) != 1 or not isinstance(answer[0], dict) or ROLES.get(answer[0].get("role")) != "assistant":
            raise Rejected(f"{key} is not one message of the assistant")
    system = (
        [{"role": "system", "content": fields["system"]}]
        if isinstance(fields.get("system"), str) and fields["system"].strip()
        else []
    )
    return system + prompt, answers[0][0].get("content"), answers[1][0].get("content")


def prompt_of(fields: dict) -> list:
    """The prompt of a record as messages, as it has them. Raises Rejected."""
    if "prompt" in fields:
        return _turn(_chatml({"prompt": fields["prompt"]})["prompt"], "user")
    if _alpaca(fields) is not None:
        return [{"role": "user", "content": _alpaca(fields)}]
    if "messages" in fields or "conversations" in fields:
        return messages_of(fields)
    raise Rejected(
        f"no prompt among its fields ({', '.join(map(str, fields)) or 'none'}): expected prompt, instruction or"
        " messages, or a `prompt` template"
    )
