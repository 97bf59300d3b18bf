"""Texts of the code as templates, to compare messages that the documentation quotes with."""

import ast
import functools

from paths import ROOT

GAP = "\0"  # a value that is filled in


@functools.cache
def templates() -> tuple[str, ...]:
    """Every string of the package but docstrings, with GAP for each value that is filled in."""
    found: set[str] = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return tuple(found)


def is_printed(message: str) -> bool:
    """Whether the code has a text with the parts of `message` between its `...`, in their order."""
    parts = [part.strip() for part in message.split("...") if part.strip()]
    return any(_has(template, parts) for template in templates())


def _has(template: str, parts: list[str]) -> bool:
    position = 0
    for part in parts:
        position = template.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True
