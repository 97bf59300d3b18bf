"""Templates such as `{title}\\n\\n{body}`, filled with the fields of a record."""

import functools
import json
import math
import re
from typing import Any

from pipeline.core.errors import UserError
from pipeline.data.sources.text_encoding import printable_name


class MissingField(UserError):
    """A template names a field that this record does not have."""


def render(template: str, fields: dict, place: str = "", join: str = "\n") -> str:
    """Fill a template. `{name}` and `{name.sub}` look up fields (digits: items of a list), `{{` and `}}` are braces,
    and nothing is evaluated.

    Numbers are written as in JSON; NaN, which a column of numbers has where a row has no value, is no text. A list of
    strings is written with `join` between them. Raises MissingField, or UserError for an invalid template.
    """
    texts = []
    for literal, field in parse_template(template):
        if field is None:
            texts.append(literal)
            continue
        try:
            value = look_up(fields, field)
        except KeyError:
            names = ", ".join(printable_name(name) for name in list(fields)[:20]) or "none"
            raise MissingField(
                f"{place or 'record'}: no field {field!r}, which the template {template!r} needs; the record has"
                f" {names}"
            ) from None
        texts.append(_written(value, field, place, join))
    return "".join(texts)


def _written(value: Any, field: str, place: str, join: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return join.join(value)
    if isinstance(value, float) and not math.isfinite(value):
        content = f"nothing ({value})"
    elif isinstance(value, (bool, int, float)):
        return json.dumps(value)
    else:
        content = "nothing" if value is None else type(value).__name__
    raise MissingField(f"{place or 'record'}: field {field!r} holds {content}, expected text")


@functools.lru_cache(256)
def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The template in pieces: (literal text, None), or (as written, name of a field). Raises UserError."""
    pieces = []
    for token in re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+", template):
        if token in ("{", "}", "{}"):
            raise UserError(
                f"the template {template!r} has a lone {token!r}; write fields as {{name}}, braces as {{{{ and }}}}"
            )
        if token in ("{{", "}}"):
            pieces.append((token[0], None))
        elif token[0] == "{":
            pieces.append((token, token[1:-1]))
        else:
            pieces.append((token, None))
    return pieces


def fields_of(template: str) -> set[str]:
    """The fields that a template, or the bare name of a field, looks up."""
    if "{" not in template:
        return {template}
    return {field for _, field in parse_template(template) if field is not None}


def look_up(fields: Any, dotted: str) -> Any:
    """The value of a field such as `meta.url` or `turns.0`; a field whose name has the dots wins. Raises KeyError."""
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
