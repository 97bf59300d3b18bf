"""docs/recipe-keys.md: every key of a recipe, from recipes/schema.json.

python tests/helpers/recipe_reference.py        writes it again
"""

import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "recipe-keys.md"
TRAINING = ("pretrain", "sft", "reward", "prm", "dpo", "kto", "ppo", "grpo")
HEAD = """\
# Every key of a recipe

Made from `recipes/schema.json` by `python tests/helpers/recipe_reference.py`; do not edit it by hand. How recipes work:
[recipes](recipe.md). `alma recipe check FILE` says which key is wrong, and where.

**(run)** marks an execution key: it decides how a stage is run and not what comes out, so it can be changed at any time
and makes nothing out of date. All other keys are part of the stage's identity.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page as the schema has it now."""
    schema = json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8"))
    definitions = schema["$defs"]
    stages = {name.removeprefix("stage-"): part for name, part in definitions.items() if name.startswith("stage-")}
    every = _common(stages.values())
    training = _common([stages[kind] for kind in TRAINING])
    parts = [HEAD, _section("The recipe", schema["then"]["required"], schema["properties"])]
    shared = {key: stages["clean"]["properties"][key] for key in every}
    parts.append(_section("Keys of every stage", (), shared))
    shared = {key: stages["sft"]["properties"][key] for key in training if key not in every}
    sentence = f"In addition, in {', '.join(f'`{kind}`' for kind in TRAINING)}."
    parts.append(_section("Keys of every training stage", stages["sft"]["required"], shared, sentence))
    for kind, part in stages.items():
        common = {*every, *(training if kind in TRAINING else ())}
        own = {key: entry for key, entry in part["properties"].items() if key not in common}
        parts.append(_section(f"Stage {kind}", part.get("required", ()), own, part.get("description", "")))
    for name, part in sorted(definitions.items()):
        if not name.startswith("stage-"):
            own = part.get("properties", {})
            parts.append(_section(f"Block {name}", part.get("required", ()), own, part.get("description", "")))
    return "\n".join(parts)


def _common(stages) -> list[str]:
    """Keys that all these stages have with the same type, default and description."""
    first, *others = [part["properties"] for part in stages]
    return [key for key, entry in first.items() if all(other.get(key) == entry for other in others)]


def _section(title: str, required, properties: dict, description: str = "") -> str:
    lines = [f"## {title}", ""]
    if description:
        lines += [_wrapped(_escaped(description)), ""]
    lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, entry in properties.items():
        default = "required" if key in required else _default(entry)
        mark = "**(run)** " if entry.get("execution") else ""
        meaning = mark + _cell(entry.get("description", ""))
        lines.append(f"| `{key}` | {_type(entry)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(entry: dict) -> str:
    if "default" not in entry:
        return ""
    if entry["default"] is None:
        return "none"
    if isinstance(entry["default"], dict) and entry["default"]:
        return "its own defaults"
    value = json.dumps(entry["default"], ensure_ascii=False).replace("|", "\\|")
    return f"`{value}`"


def _type(entry: dict) -> str:
    """What values a key takes, in words."""
    if "$ref" in entry:
        name = entry["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#block-{name.lower()})"
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{_cell(str(value))}`" for value in entry.get("enum", [entry.get("const")]))
    choices = entry.get("anyOf") or entry.get("oneOf")
    if choices:
        return " or ".join(_type(choice) for choice in choices if choice.get("type") != "null")
    kind = entry.get("type")
    if kind == "array":
        return f"list of {_type(entry['items'])}" if entry.get("items") else "list"
    if kind == "object":
        return _map(entry)
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return f"{words.get(kind, 'any')}{_bounds(entry)}"


def _map(entry: dict) -> str:
    values = list(entry.get("patternProperties", {}).values())
    if isinstance(entry.get("additionalProperties"), dict):
        values.append(entry["additionalProperties"])
    values = [value for value in values if _type(value) != "block"]
    return f"name: {_type(values[0])}" if values else "block"


def _bounds(entry: dict) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {entry[name]:,}" for name, word in words.items() if name in entry]
    return f", {', '.join(bounds)}" if bounds else ""


def _cell(text: str) -> str:
    return _escaped(" ".join(text.split())).replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text in which nothing outside of code is markup."""
    parts = re.split("(`[^`]*`)", text)
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(r"[*\[\]]", r"\\\g<0>", parts[place].replace("<", "&lt;"))
    return "".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
