"""An Ollama Modelfile for a GGUF file: which file, how a conversation is written, where an answer ends.

Ollama writes conversations with a Go template, not with the chat template (Jinja) that the file has. So one is made
from what the chat template writes around each role's messages, and what it would write is compared with the chat
template on conversations. If they differ (templates that rewrite history, or count messages), there is none.
"""

from pipeline.core.errors import UserError
from pipeline.data.chat.rendering import Dialogue, Template, Unusable

# Private-use characters stand for what messages say; no template has them.
MARKS = {"system": chr(0x10FFF1), "user": chr(0x10FFF2), "assistant": chr(0x10FFF3)}
CONVERSATIONS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
SETTINGS = ("temperature", "top_p", "top_k", "min_p")


def modelfile(
    file_name: str, tokenizer, settings: dict, ends: list[int], adds_bos: bool = False
) -> tuple[str, list[str]]:
    """(the text of a Modelfile, remarks). settings: of generation_config.json; ends: ids at which generation ends;
    adds_bos: whether llama.cpp writes the beginning of text."""
    lines, remarks = [f"FROM ./{file_name}"], []
    pieces = go_template(tokenizer, adds_bos) if tokenizer.chat_template else None
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces}"""')
    elif tokenizer.chat_template:
        remarks.append(
            "the Modelfile has no TEMPLATE, because the chat template is not a sequence of messages that Ollama's"
            " templates can write; ollama may know the template in the GGUF file, else use llama-server --jinja"
        )
    for index in ends:
        lines.append(f'PARAMETER stop "{_escaped(tokenizer.convert_ids_to_tokens(index))}"')
    if settings.get("do_sample"):
        lines += [f"PARAMETER {name} {settings[name]}" for name in SETTINGS if settings.get(name) is not None]
    else:
        lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n", remarks


def go_template(tokenizer, adds_bos: bool = False) -> str | None:
    """Ollama's template that writes conversations as the tokenizer's chat template does; None if there is none."""
    parts = _parts(tokenizer)
    if parts is None:
        return None
    begin, around, ending = parts
    text = "" if adds_bos else _literal(begin)
    for number, (role, (before, after)) in enumerate(around.items()):
        condition = "if" if number == 0 else "else if"
        text += "{{- range .Messages }}" if number == 0 else ""
        text += f'{{{{- {condition} eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}'
    return f"{text}{{{{- end }}}}{{{{- end }}}}{_literal(ending)}"


def _parts(tokenizer) -> tuple[str, dict[str, tuple[str, str]], str] | None:
    """(text at the beginning, role -> text before and after a message, text that asks for an answer), proved on
    CONVERSATIONS."""
    try:
        template = Template(tokenizer)
        begin = tokenizer.bos_token or ""
        if not _written(template, ("user",), False).startswith(begin):
            begin = ""
        around = {role: _around(template, role, begin) for role in MARKS}
        ending = _written(template, ("user",), True).removeprefix(_written(template, ("user",), False))
        for roles in CONVERSATIONS:
            text = "".join(around[role][0] + MARKS[role] + around[role][1] for role in roles)
            if _written(template, roles, True) != begin + text + ending:
                return None
    except (Unusable, UserError, ValueError):
        return None
    return begin, around, ending


def _around(template: Template, role: str, begin: str) -> tuple[str, str]:
    """What a template writes before and after a message of a role. Raises ValueError if that is not at one place."""
    if role == "assistant":
        shorter = _written(template, ("user",), False)
        longer = _written(template, ("user", role), False)
        if not longer.startswith(shorter):
            raise ValueError("the template rewrites what came before")
        text = longer[len(shorter) :]
    elif role == "system":  # some templates refuse one alone
        longer = _written(template, (role, "user"), False)
        text = longer.removesuffix(_written(template, ("user",), False).removeprefix(begin)).removeprefix(begin)
    else:
        text = _written(template, (role,), False).removeprefix(begin)
    before, mark, after = text.partition(MARKS[role])
    if not mark:
        raise ValueError("the template drops the message")
    return before, after


def _written(template: Template, roles: tuple[str, ...], asks: bool) -> str:
    messages = [{"role": role, "content": MARKS[role]} for role in roles]
    return template.write(Dialogue(messages), generation_prompt=asks)[0]


def _literal(text: str) -> str:
    """A text in a Go template: as an action, so that its white space is neither trimmed nor read as an action."""
    return f'{{{{ "{_escaped(text)}" }}}}' if text else ""


def _escaped(text: str) -> str:
    """The inside of a Go string in double quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
