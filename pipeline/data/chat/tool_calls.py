"""Tools of a record and calls of them, in the forms that are in use, as one form: OpenAI's (arguments as an object or
as JSON text, also the older `functions` and `function_call`), Anthropic's (`input`), and the JSON texts of ShareGPT's
function_call turns. The transcripts of glaive-function-calling are read here, too.
"""

import json
import re

from pipeline.data.chat.fields import Rejected, empty, snake
from pipeline.data.sources.text_encoding import printable_name

# Spellings of the fields of a call, in snake case.
ARGUMENTS = (
    "arguments parameters input args kwargs params arguments_json function_args function_arguments tool_input tool_args"
).split()
CALL_TYPES = ("function", "tool_use", "tool_call", "function_call")
# What a result refers to: the OpenAI API that has call_id gives a call an id of its own as well.
CALL_IDS = ("call_id", "tool_call_id", "tool_use_id", "id")
TEXT_AFTER_CALL = "a message of the assistant has text after a tool call"
NOT_LEARNED = {"type", "index", "cache_control", *CALL_IDS}


def tools_of(value, what: str = "`tools`") -> list[dict]:
    """The functions that an assistant may call, in OpenAI's form. Raises Rejected."""
    value = from_json(value, what)
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        tool = from_json(tool, what)
        if not isinstance(tool, dict):
            raise Rejected(f"{what} is not a list of objects")
        if "function" not in tool:  # OpenAI's newer form has the type next to the name
            function = {key: inner for key, inner in tool.items() if (key, inner) != ("type", "function")}
            tool = {"type": "function", "function": function}
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Rejected(f"{what} has a function without a name")
        if "input_schema" in function:  # Anthropic's
            function = {"parameters" if key == "input_schema" else key: inner for key, inner in function.items()}
            tool = {**tool, "function": function}
        tools.append(tool)
    return checked(tools, what)


def calls_of(value, where: str) -> list[dict]:
    """Tool calls as {name, arguments (an object), id (where it has one)}. Raises Rejected."""
    value = from_json(value, f"the tool call of {where}")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise Rejected(f"{where} has an empty list of tool calls")
    return [_call(from_json(call, f"the tool call of {where}"), where) for call in calls]


def _call(call, where: str) -> dict:
    if not isinstance(call, dict):
        raise Rejected(f"{where} has a tool call that is not an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Rejected(f"{where} has a tool call without the name of a function")
    parts = [call] if function is call else [call, function]
    _check_call(parts, function["name"], where)
    arguments = from_json(_arguments(parts, where), f"`arguments` of a tool call of {where}")
    if not isinstance(arguments, dict):
        raise Rejected(f"`arguments` of a tool call of {where} are not a JSON object")
    written = {"name": function["name"], "arguments": checked(arguments, f"`arguments` of {where}")}
    if (call_id := id_of(call, CALL_IDS)) is not None:
        written["id"] = call_id
    return checked(written, f"a tool call of {where}")


def _check_call(parts: list[dict], name: str, where: str) -> None:
    """Raise Rejected for a call with a field that would be dropped. Names that are metadata elsewhere are not here:
    `url` may be an argument that is beside the others."""
    for part in parts:
        for field, value in part.items():
            plain = snake(field)
            known = (
                plain in NOT_LEARNED
                or plain in ARGUMENTS
                or plain == "name"
                or (field == "function" and part is parts[0])
            )
            if not known and not empty(value):
                raise Rejected(
                    f"{where} has a tool call with `{printable_name(field)}`, which is not a known field of a call"
                )
    kind = parts[0].get("type")
    if kind not in (None, *CALL_TYPES):
        raise Rejected(f"{where} has a tool call of type {printable_name(kind)}")
    if parts[0].get("name") not in (None, "", name):
        raise Rejected(f"{where} has a tool call with two names")


def _arguments(parts: list[dict], where: str):
    """What a call gives as arguments, under any of their names: an object, or its JSON text. Without arguments, an
    empty object."""
    given = []
    for part in parts:
        given += [value for field, value in part.items() if snake(field) in ARGUMENTS]
    filled = [value for value in given if not _no_arguments(value)]
    if len(filled) > 1:
        raise Rejected(f"{where} has a tool call that gives its arguments twice")
    return filled[0] if filled else {}


def _no_arguments(value) -> bool:
    return value is None or value == {} or isinstance(value, str) and value.strip() in ("", "{}", "null")


def id_of(fields: dict, names: tuple[str, ...]) -> str | None:
    """The first id among the fields `names`, as text: some sets number their calls. None without one."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) or isinstance(value, str) and value:
            return str(value)
    return None


def from_json(value, what: str):
    """The object that a JSON text spells; any other value as it is. Raises Rejected for text that is not JSON, and for
    a key that an object has twice."""
    if not isinstance(value, str):
        return value

    def unique(pairs: list[tuple]) -> dict:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise Rejected(f"{what} has the key `{printable_name(twice)}` twice")
        return fields

    try:
        return json.loads(value, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(":")[0] if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise Rejected(f"{what} is not JSON ({reason})") from None


def checked(value, what: str):
    """The same value. Raises Rejected for one that JSON cannot hold, such as NaN, and for half a character in it."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise Rejected(f"{what} has half a character (a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError):
        raise Rejected(f"{what} is not JSON") from None
    return value


def result_text(value, where: str) -> str:
    """What a tool has answered, as text: a text as it is, any other value as JSON. Raises Rejected."""
    if isinstance(value, str):
        return value
    return json.dumps(checked(value, where), ensure_ascii=False)


# ---- glaive-function-calling ----------------------------------------------------------------------------------------

# At the beginning of a line, because what is said may name a speaker, too.
SPEAKER = re.compile(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ?")
ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*", re.DOTALL)
QUOTED_ARGUMENTS = re.compile(r"""("arguments":\s*)'(.*)'(\s*\})$""", re.DOTALL)


def glaive(system: str, chat: str) -> tuple[list[dict], list[dict]]:
    """(messages, tools) of a record of glaive-function-calling: `system` names the functions as JSON after a sentence,
    `chat` is a transcript. Raises Rejected."""
    head, *rest = SPEAKER.split(chat)
    if head.strip() or not rest:
        raise Rejected("`chat` is not a transcript that begins with USER: or ASSISTANT:")
    text, tools = _glaive_tools(system.strip().removeprefix("SYSTEM:").strip())
    messages = [{"role": "system", "content": text}] if text else []
    for speaker, said in zip(rest[::2], rest[1::2], strict=True):
        messages.append(_glaive_message(ROLES[speaker], said.replace("<|endoftext|>", "").strip()))
    return messages, tools


def _glaive_message(role: str, said: str) -> dict:
    match = CALL.search(said) if role == "assistant" else None
    if match is None:
        return {"role": role, "content": said}
    if said[match.end() :].strip():
        raise Rejected(f"{TEXT_AFTER_CALL}: a chat template writes text in front of calls")
    spelled = QUOTED_ARGUMENTS.sub(lambda quoted: quoted[1] + quoted[2] + quoted[3], match[1].strip())
    return {"role": role, "content": said[: match.start()].strip(), "tool_calls": [spelled]}


def _glaive_tools(system: str) -> tuple[str, list[dict]]:
    """The system message without the functions that it names, and these."""
    decoder, tools, place = json.JSONDecoder(), [], system.find("{")
    text = system if place < 0 else system[:place].rstrip("- \n")
    while place >= 0:
        try:
            tool, end = decoder.raw_decode(system, place)
        except ValueError:
            raise Rejected(
                f"`system` names a function that is not JSON ({printable_name(system[place : place + 40])})"
            ) from None
        tools.append(tool)
        place = system.find("{", end)
    return text, tools_of(tools, "`system`") if tools else []
