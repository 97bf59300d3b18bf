"""Tools of a record and calls of them, in the forms that are in use, as one form: OpenAI's (arguments as an object or
as JSON text, also the older `functions` and `function_call`), Anthropic's (`input`), and the JSON texts of ShareGPT's
function_call turns. The transcripts of glaive-function-calling are read here, too.
"""

import json
import re

from pipeline.data.chat.fields import Rejected
from pipeline.data.sources.text_encoding import printable_name

ARGUMENTS = ("arguments", "parameters", "input", "args")


def tools_of(value, what: str = "`tools`") -> list[dict]:
    """The functions that an assistant may call, in OpenAI's form. Raises Rejected."""
    value = from_json(value, what)
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        tool = from_json(tool, what)
        if not isinstance(tool, dict):
            raise Rejected(f"{what} is not a list of objects")
        if "function" not in tool:
            tool = {"type": "function", "function": tool}
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
    key = next((key for key in ARGUMENTS if key in function), None)
    arguments = {} if key is None else function[key]
    if arguments is None or isinstance(arguments, str) and not arguments.strip():
        arguments = {}
    arguments = from_json(arguments, f"`arguments` of a tool call of {where}")
    if not isinstance(arguments, dict):
        raise Rejected(f"`arguments` of a tool call of {where} are not a JSON object")
    written = {"name": function["name"], "arguments": checked(arguments, f"`arguments` of {where}")}
    if isinstance(call.get("id"), str) and call["id"]:
        written["id"] = call["id"]
    return checked(written, f"a tool call of {where}")


def from_json(value, what: str):
    """The object that a JSON text spells; any other value as it is. Raises Rejected for text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(":")[0] if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise Rejected(f"{what} is not JSON ({reason})") from None


def checked(value, what: str):
    """The same value. Raises Rejected for one that JSON cannot hold, and for half a character in it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
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
