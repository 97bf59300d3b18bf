"""Templates such as `{title}\\n\\n{body}`, filled with the fields of a record."""

import functools
import json
import re
from typing import Any

from pipeline.core.errors import UserError
from pipeline.data.chat.fields import shown


class MissingField(UserError):
    """A template names a field that this record does not have."""


def render(template: str, fields: dict, place: str = "", join: str = "\n") -> str:
    """Fill a template. `{name}` and `{name.sub}` look up fields (digits: items of a list), `{{` and `}}` are braces,
    and nothing is evaluated.

    Numbers are written as in JSON; a list of strings is written with `join` between them. Raises MissingField, or
    UserError for a broken template.
    """
    pieces = []
    for literal, field in pieces_of(template):
        if field is None:
            pieces.append(literal)
            continue
        try:
            value = look_up(fields, field)
        except KeyError:
            present = ", ".join(shown(name) for name in list(fields)[:20]) or "none"
            raise MissingField(
                f"{place or 'record'}: no field {field!r}, which the template {template!r} asks for; the record has"
                f" {present}"
            ) from None
        if isinstance(value, str):
            pieces.append(value)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            pieces.append(join.join(value))
        elif isinstance(value, (bool, int, float)):
            pieces.append(json.dumps(value))
        else:
            raise MissingField(
                f"{place or 'record'}: field {field!r} holds {'nothing' if value is None else type(value).__name__},"
                " expected text"
            )
    return "".join(pieces)


@functools.lru_cache(256)
def pieces_of(template: str) -> list[tuple[str, str | None]]:
    pieces = []
    for token in re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+", template):
        if token in ("{", "}", "{}"):
            raise UserError(
                f"the template {template!r} has a lone {token!r}; fields are written {{name}}, braces {{{{ and }}}}"
            )
        pieces.append(
            ({"{{": "{", "}}": "}"}.get(token, token), token[1:-1] if token[0] == "{" and token != "{{" else None)
        )
    return pieces


def fields_of(template: str) -> set[str]:
    """The fields that a template, or the bare name of a field, looks up."""
    return {field for _, field in pieces_of(template) if field is not None} if "{" in template else {template}


def look_up(fields: Any, dotted: str) -> Any:
    if isinstance(fields, dict) and dotted in fields:
        return fields[dotted]
    for key in dotted.split("."):
        if isinstance(fields, dict) and key in fields:
            fields = fields[key]
        elif isinstance(fields, list) and key.isdecimal() and int(key) < len(fields):
            fields = fields[int(key)]
        else:
            raise KeyError(dotted)
    return fields
