"""The file of a recipe: YAML 1.2, `extends`, overrides of the command line, and the line that each key came from."""

import difflib
import os
import re
from datetime import date
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedOrderedMap, CommentedSeq, CommentedSet
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError

from pipeline.core import shipped_recipes
from pipeline.core.errors import UserError

MAX_BYTES = 256_000
"""Of a recipe's file, which the YAML parser reads in about 10 s. The shipped recipes have 1 to 12 kB."""
MAX_VALUES = 100_000
"""Keys and values with every alias written out: quickstart.yaml has 1,100."""
MAX_DEPTH = 50
"""Nested blocks and lists: the shipped recipes have at most 7."""

MAX_BRACKETS = 1000
MAX_NUMBER = 2**63 - 1  # of a whole number
PLAIN_TAGS = (None, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def read(path: Path, places: dict, seen: tuple = ()) -> dict:
    """The blocks of a file, merged into those of the file that it extends. `places` gets `file:line` of each key, for
    messages."""
    try:
        here = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, links in a circle, a NUL
        raise UserError(f"{short_repr(path)}: cannot be read: {_reason(error)}") from None
    if here in seen:
        raise UserError(f"{path}: `extends` is cyclic: {' -> '.join(str(p) for p in (*seen, here))}")
    loaded = _parsed(_text(path), path)
    if not isinstance(loaded, dict):
        found = {type(None): "an empty file", CommentedSeq: "a list"}.get(type(loaded)) or short_repr(loaded)
        raise UserError(f"{path}:1: a recipe is a block of `key: value` lines, found {found}")
    tree = _Expansion(str(path), places).plain(loaded, (), 0)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    where = place_of(("extends",), places, path)
    if not isinstance(parent, str):
        raise UserError(f"{where}: `extends` expects the path of one recipe, found {short_repr(parent)}")
    inherited: dict = {}
    file: Path | None = path.parent / parent
    if not os.path.isfile(file):
        file = shipped_recipes.extended(parent)
    if file is None:
        near = [name for name in recipes_in((path.parent / parent).parent) if name != path.name]
        raise UserError(
            f"{where}: `extends` names {short_repr(parent)}, which does not exist;"
            f" {'that folder has ' + ', '.join(near) if near else 'that folder has no recipes'}"
        )
    base = read(file, inherited, (*seen, here))
    for key, place in inherited.items():
        places.setdefault(key, place)
    return _merge(base, tree)


def _text(path: Path) -> str:
    """The text of a recipe's file. It may be a pipe, so its size is not known before it is read."""
    try:
        with open(path, "rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = recipes_in(path.parent)
        hint = "; `alma recipe list` shows those that come with alma"
        if shipped_recipes.named(Path(path.stem)):
            hint = f"; without a folder and .yaml, {path.stem} is the recipe of this name that comes with alma"
        raise UserError(
            f"{path}: no such recipe; {'this folder has ' + ', '.join(near) if near else 'its folder has no recipes'}"
            f"{hint}"
        ) from None
    except OSError as error:
        raise UserError(f"{short_repr(path)}: cannot be read as a UTF-8 text file: {_reason(error)}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: has more than {MAX_BYTES:,} bytes, so it is not a recipe; name many files by a glob")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 text file: {error}") from None


def _open_brackets(text: str) -> int:
    """Largest number of brackets that are open at the same time, counted without regard to quotes and comments. The
    parser's time grows with its square."""
    depth = deepest = 0
    for letter in re.findall(r"[\[\]{}]", text):
        depth += 1 if letter in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _parsed(text: str, path: Path) -> Any:
    if _open_brackets(text) > MAX_BRACKETS:
        raise UserError(f"{path}: not valid as a recipe: more than {MAX_DEPTH} nested blocks")
    directive = re.match(r"\ufeff?(?:[ \t]*(?:#[^\r\n]*)?[\r\n])*(%.*)", text)
    if directive:  # by YAML 1.1, 010 is 8 and `no` is false
        raise UserError(
            f"{path}: begins with the directive {short_repr(directive[1].strip(), 40)}, which can change what values"
            " mean; recipes are YAML 1.2, so remove it and the line ---"
        )
    try:
        return YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        key = re.search(r'found duplicate key "?([^"\n]+?)"? with', str(error.problem or ""))
        name = key.group(1) if key else "<<"
        raise UserError(
            f"{path}:{error.problem_mark.line + 1}: the key {name!r} is given twice in this block; keep one of the two"
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem or error.context}"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: not valid as a recipe: more than {MAX_DEPTH} nested blocks") from None
    except AttributeError:  # ruamel's, for `x: &x {<<: *x}`
        raise UserError(f"{path}: not valid YAML: a block is merged into itself (`<<` with its own anchor)") from None
    except Exception as error:  # ruamel raises bare exceptions of several kinds for what it cannot read
        raise UserError(f"{path}: not valid YAML: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error)
    text = text or str(error) or type(error).__name__
    return text.splitlines()[0][:200]


def recipes_in(folder: Path) -> list[str]:
    """Names for a message: at most twenty."""
    return sorted(path.name for path in folder.glob("*.yaml"))[:20] if os.path.isdir(folder) else []


class _Expansion:
    """ruamel's commented types -> dict, list and scalars, with every alias written out, so that no type of the
    parser reaches a config. Bounded, because a few nested aliases can expand to any number of values."""

    def __init__(self, origin: str, places: dict | None = None):
        self.origin, self.places, self.values = origin, places, 0

    def plain(self, node: Any, key: tuple, line: int) -> Any:
        """`key`: of the node in the recipe; `line`: of the nearest key around it that has one."""
        self.values += 1
        if self.values > MAX_VALUES:
            self._refuse(line, f"its aliases expand to more than {MAX_VALUES:,} values; write out what is meant")
        if len(key) > MAX_DEPTH:
            self._refuse(line, f"more than {MAX_DEPTH} nested blocks; an alias may contain itself")
        tagged = isinstance(node, CommentedMap | CommentedSeq) and node.tag.value not in PLAIN_TAGS
        if tagged or isinstance(node, CommentedSet | CommentedOrderedMap | bytes):
            self._refuse(line, f"{'.'.join(map(str, key)) or 'a value'} has a YAML type that recipes do not support")
        if isinstance(node, dict):
            return self._block(node, key, line)
        if isinstance(node, list):
            return self._list(node, key, line)
        if isinstance(node, bool) or node is None:
            return node
        if isinstance(node, int):
            if abs(node) > MAX_NUMBER:
                self._refuse(
                    line, f"{'.'.join(map(str, key)) or 'the value'} is beyond {MAX_NUMBER:,}: {short_repr(node, 40)}"
                )
            return int(node)
        if isinstance(node, float):
            return float(node)
        if not isinstance(node, str | date):  # dates are text here, because they are compared with those of records
            self._refuse(line, f"{'.'.join(map(str, key)) or 'a value'} has a YAML tag, which recipes do not support")
        return self._word(str(node), line)

    def _block(self, node: dict, key: tuple, line: int) -> dict:
        block: dict = {}
        # a key from `<<: *anchor` has no line of its own, and neither has anything from the safe loader
        lines = (node.lc.data or {}) if isinstance(node, CommentedMap) else {}
        for name, child in node.items():
            word = self._word(str(name), line)
            at = line
            if name in lines:
                at = lines[name][0] + 1
            if name is None or isinstance(name, bool | float):
                self._refuse(at, f"a key is {short_repr(name)}, which YAML reads as no name; put it in quotes")
            if name in lines:
                self._remember((*key, word), at)
            if word in block:
                self._refuse(at, f"the key {short_repr(word)} is given twice in this block; keep one of the two")
            block[word] = self.plain(child, (*key, word), at)
        return block

    def _list(self, node: list, key: tuple, line: int) -> list:
        items = []
        for index, child in enumerate(node):
            at = line
            if isinstance(node, CommentedSeq) and index in (node.lc.data or {}):
                at = node.lc.item(index)[0] + 1
                self._remember((*key, index), at)
            items.append(self.plain(child, (*key, index), at))
        return items

    def _word(self, text: str, line: int) -> str:
        if "\0" in text or not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            self._refuse(
                line, f"{short_repr(text)} has a character that is not text (NUL, or half of a surrogate pair)"
            )
        return text

    def _remember(self, key: tuple, line: int) -> None:
        if self.places is not None:
            self.places[key] = f"{self.origin}:{line}"

    def _refuse(self, line: int, message: str) -> None:
        raise UserError(f"{self.origin}{f':{line}' if line else ''}: {message}")


def _merge(base: Any, change: Any) -> Any:
    """Blocks are merged key by key; lists and scalars are replaced."""
    if isinstance(base, dict) and isinstance(change, dict):
        merged = dict(base)
        for key, value in change.items():
            merged[key] = _merge(base[key], value) if key in base else value
        return merged
    return change


def override(tree: dict, word: str, places: dict, top: list[str]) -> tuple[str, ...]:
    """Apply one `a.b.c=value` word of the command line; the value is read as YAML. `top`: the top-level keys of a
    recipe. Returns the key."""
    dotted, found, text = word.partition("=")
    keys = dotted.split(".")
    if not found or not all(keys):
        raise UserError(
            f"{short_repr(word)} is not an override: expected key=value, such as pretrain.optimizer.lr=3e-4"
        )
    stages = tree.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    if keys[0] in stages:
        keys = ["stages", *keys]
    elif keys[0] not in top:
        raise UserError(
            f"{short_repr(word)}: {short_repr(keys[0])} is neither a stage nor a top-level key of this recipe;"
            f" {suggestion(keys[0], [*stages, *top])}"
        )
    value = _value(word, dotted, text)
    node = tree
    for depth, key in enumerate(keys[:-1]):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(
                f"{short_repr(word)}: {'.'.join(keys[: depth + 1])} is {short_repr(node)}, not a block that could hold"
                f" {short_repr(keys[depth + 1])}"
            )
    node[keys[-1]] = value
    place = f"command line, {word[:200]}"
    for depth in range(1, len(keys) + 1):
        places.setdefault(tuple(keys[:depth]), place)
    places[tuple(keys)] = place
    return tuple(keys)


def _value(word: str, dotted: str, text: str) -> Any:
    """The right side of a `key=value` word, read as YAML."""
    if not text:
        return None
    if len(text) > MAX_BYTES or _open_brackets(text) > MAX_BRACKETS:
        raise UserError(
            f"{short_repr(word)}: the value has {len(text):,} characters, too many to be one; use a recipe's file"
        )
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except Exception:
        raise UserError(
            f"{short_repr(word)}: {short_repr(text)} is not a YAML value; quote it, as in '{dotted}=\"{text[:50]}\"'"
        ) from None
    return _Expansion(f"command line, {short_repr(word)}").plain(value, (), 0)


def place_of(key: tuple, places: dict, path: Any) -> str:
    """`file:line` of a key, or of the nearest block around it."""
    while key and key not in places:
        key = key[:-1]
    return places.get(key, str(path))


def suggestion(word: str, known: Any) -> str:
    """What to write in place of an unknown name: the nearest known one, or all of them."""
    known = [str(name) for name in known]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"


def short_repr(value: Any, most: int = 120) -> str:
    """A value as a message shows it: its repr, shortened. Values are bounded (MAX_VALUES), so this is quick."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
