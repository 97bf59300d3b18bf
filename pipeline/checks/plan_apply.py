"""`alma plan --apply`: a layout written into the file of a recipe, with comments and everything else left as they are.

The file is changed as text: YAML's own nodes say where each value begins and ends.
"""

import difflib
import os
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from pipeline.core.errors import UserError
from pipeline.core.recipe import load

REMOVE = object()
"""In place of a value: the key goes."""


def inherits(path: Path) -> bool:
    """Whether a recipe extends another one, so that a key that it lacks may still have a value."""
    node = YAML(typ="rt", pure=True).compose(path.read_text(encoding="utf-8"))
    return isinstance(node, MappingNode) and _pair(node, "extends") is not None


def apply(path: Path, changes: dict[tuple[str, ...], object]) -> list[str]:
    """Set keys in a recipe's file. changes: where a key is -> its value; REMOVE removes it. Returns what was changed,
    as lines of a diff. The file is replaced in one step. Raises UserError."""
    before = text = path.read_text(encoding="utf-8")
    for where, value in changes.items():
        text = with_key(text, where, value)
    candidate = path.with_name(f".{path.name}.new")
    try:
        candidate.write_text(text, encoding="utf-8")
        load(candidate)  # a mistake here must not reach the user's file
        os.replace(candidate, path)
    finally:
        candidate.unlink(missing_ok=True)
    diff = difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
    return [line for line in diff if not line.startswith(("---", "+++", "@@"))]


def with_key(text: str, path: tuple[str, ...], value) -> str:
    """The text of a YAML file with the key at `path` set or inserted, or with REMOVE without it."""
    node = YAML(typ="rt", pure=True).compose(text)
    for depth, key in enumerate(path):
        if not isinstance(node, MappingNode):
            raise UserError(f"{'.'.join(path[:depth])} is not a block of keys; write the layout by hand")
        pair = _pair(node, key)
        if pair is None:
            return text if value is REMOVE else _inserted(text, node, path[depth:], value)
        parent, node = node, pair[1]
    if value is REMOVE:
        return _removed(text, parent, pair)
    if isinstance(node, MappingNode) and not node.flow_style:
        return _replaced_block(text, path, node, value)
    return text[: node.start_mark.index] + flow(value) + text[node.end_mark.index :]


def flow(value) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _pair(node: MappingNode, key: str) -> tuple[Node, Node] | None:
    for name, value in node.value:
        if isinstance(name, ScalarNode) and name.value == key:
            return name, value
    return None


def _replaced_block(text: str, path: tuple[str, ...], node: MappingNode, value) -> str:
    """A block with a line per key keeps its lines and their comments."""
    if not isinstance(value, dict) or not value:
        raise UserError(f"{'.'.join(path)} is a block of keys; write {flow(value)} by hand")
    for key, item in value.items():  # before any is removed, because a block without keys is none
        text = with_key(text, (*path, key), item)
    for name, _ in node.value:
        if name.value not in value:
            text = with_key(text, (*path, name.value), REMOVE)
    return text


def _inserted(text: str, node: MappingNode, path: tuple[str, ...], value) -> str:
    """A new key in front of the others of its block."""
    for key in reversed(path[1:]):
        value = {key: value}
    entry = f"{path[0]}: {flow(value)}"
    if node.flow_style:
        at = node.start_mark.index + 1
        return text[:at] + entry + (", " if node.value else "") + text[at:]
    first = node.value[0][0].start_mark
    at = first.index - first.column
    return text[:at] + " " * first.column + entry + "\n" + text[at:]


def _removed(text: str, parent: MappingNode, pair: tuple[Node, Node]) -> str:
    """Without a key: its lines in a block, or itself and a comma between braces."""
    name, value = pair
    names = [key.value for key, _ in parent.value]
    number = names.index(name.value)
    if not parent.flow_style:
        start = name.start_mark.index - name.start_mark.column
        end = text.find("\n", value.end_mark.index)
        if isinstance(value, MappingNode) and not value.flow_style:  # its end is where the next key begins
            end = text.rfind("\n", 0, value.end_mark.index)
        return text[:start] + ("" if end < 0 else text[end + 1 :])
    if number + 1 < len(names):
        return text[: name.start_mark.index] + text[parent.value[number + 1][0].start_mark.index :]
    if number:
        return text[: parent.value[number - 1][1].end_mark.index] + text[value.end_mark.index :]
    return text[: name.start_mark.index] + text[value.end_mark.index :]
