"""The file of a recipe: YAML 1.2, what it extends, words of the command line, and the line that each key came from."""

import difflib
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError

from pipeline.errors import UserError


def read(path: Path, places: dict, seen: tuple = ()) -> dict:
    """One file and, first, the file that it extends. `places` maps each key path to `file:line` for messages."""
    if path.resolve() in seen:
        raise UserError(
            f"{path}: `extends` goes round in a circle: {' -> '.join(str(p) for p in (*seen, path.resolve()))}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = recipes_in(path.parent)
        raise UserError(
            f"{path}: no such recipe; {'this folder has ' + ', '.join(near) if near else 'its folder has no recipes'}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 text file: {error}") from None
    try:
        loaded = YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        key = re.search(r'found duplicate key "?([^"\n]+?)"? with', str(error.problem or ""))
        raise UserError(
            f"{path}:{error.problem_mark.line + 1}: the key {key.group(1) if key else ''!r} stands here for the second"
            " time; keep one of the two"
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem or error.context}"
        ) from None
    except Exception as error:  # ruamel raises bare ReaderErrors for control characters
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}:1: a recipe is a block of `key: value` lines, found"
            f" {'an empty file' if loaded is None else 'a list' if isinstance(loaded, list) else repr(loaded)[:80]}"
        )
    _remember(loaded, (), path, places)
    tree = _plain(loaded)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise UserError(
            f"{place_of(('extends',), places, path)}: `extends` takes the path of one recipe, found {parent!r}"
        )
    inherited: dict = {}
    if not (path.parent / parent).is_file():
        near = [name for name in recipes_in((path.parent / parent).parent) if name != path.name]
        raise UserError(
            f"{place_of(('extends',), places, path)}: `extends` names {parent!r}, which is not there;"
            f" {'that folder has ' + ', '.join(near) if near else 'that folder has no recipes'}"
        )
    base = read(path.parent / parent, inherited, (*seen, path.resolve()))
    for key, place in inherited.items():
        places.setdefault(key, place)
    return _merge(base, tree)


def recipes_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.yaml")) if folder.is_dir() else []


def _remember(node: Any, key: tuple, path: Path, places: dict) -> None:
    if isinstance(node, CommentedMap):
        for name, child in node.items():
            if name in (node.lc.data or {}):  # a key that came with `<<: *anchor` has no line of its own
                places[(*key, name)] = f"{path}:{node.lc.key(name)[0] + 1}"
            _remember(child, (*key, name), path, places)
    elif isinstance(node, CommentedSeq):
        for index, child in enumerate(node):
            places[(*key, index)] = f"{path}:{node.lc.item(index)[0] + 1}"
            _remember(child, (*key, index), path, places)


def _plain(node: Any) -> Any:
    """ruamel's commented types -> dict, list and scalars, so that nothing of the parser leaks into a config."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return str(node)  # dates: a recipe has none


def _merge(base: Any, change: Any) -> Any:
    """Blocks are merged key by key; lists and scalars are replaced."""
    if isinstance(base, dict) and isinstance(change, dict):
        merged = dict(base)
        for key, value in change.items():
            merged[key] = _merge(base[key], value) if key in base else value
        return merged
    return change


def override(tree: dict, word: str, places: dict, top: list[str]) -> None:
    """Apply one `a.b.c=value` word of the command line; the value is read as YAML. `top`: the top-level keys of a
    recipe."""
    dotted, found, text = word.partition("=")
    keys = dotted.split(".")
    if not found or not all(keys):
        raise UserError(f"{word!r} is no override: expected key=value, such as pretrain.optimizer.lr=3e-4")
    if keys[0] in (tree.get("stages") or {}):
        keys = ["stages", *keys]
    elif keys[0] not in top:
        known = [*(tree.get("stages") or {}), *top]
        raise UserError(
            f"{word!r}: {keys[0]!r} is neither a stage nor a top-level key of this recipe; {nearest(keys[0], known)}"
        )
    try:
        value = _plain(YAML(typ="safe", pure=True).load(text)) if text else None
    except Exception:
        raise UserError(f"{word!r}: {text!r} is not a YAML value; quote it, as in '{dotted}=\"{text}\"'") from None
    node = tree
    for depth, key in enumerate(keys[:-1]):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(
                f"{word!r}: {'.'.join(keys[: depth + 1])} is {node!r}, not a block that could hold {keys[depth + 1]!r}"
            )
    node[keys[-1]] = value
    for depth in range(1, len(keys) + 1):
        places.setdefault(tuple(keys[:depth]), f"command line, {word}")
    places[tuple(keys)] = f"command line, {word}"


def place_of(key: tuple, places: dict, path: Any) -> str:
    """`file:line` of a key, or of the nearest block around it."""
    while key and key not in places:
        key = key[:-1]
    return places.get(key, str(path))


def nearest(word: str, known: Any) -> str:
    """What to write in place of an unknown name: the nearest known one, or all of them."""
    known = [str(name) for name in known]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
