"""What is wrong with a block of a recipe: pydantic's errors as messages with file, line, key, what was found and what
was expected."""

import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.core.config import PATTERNS
from pipeline.core.errors import Problems
from pipeline.core.recipe_file import place_of, short_repr, suggestion


def validated(model: type[BaseModel], tree: dict, prefix: tuple, places: dict, path: str) -> Any:
    """A block as an instance of `model`. Raises UserError with everything that is wrong.

    prefix: key of the block in the recipe; places: key -> `file:line`; path: of the recipe.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
    problems = Problems()
    for item in errors:
        problems.add(_message(item, model, prefix, places, path))
    problems.refuse()


def _message(item: dict, model: type[BaseModel], prefix: tuple, places: dict, path: str) -> str:
    """One of pydantic's errors."""
    # pydantic's location also has names of union members; only what is in the file is a key
    location = list(item["loc"])
    key = (*prefix, *location)
    dotted = ".".join(str(part) for part in key)
    place = place_of(key, places, path)
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        unknown = str(location[-1])[:300]
        return f"{place}: unknown key {dotted[:300]}; {suggestion(unknown, _keys_at(model, location[:-1]))}"
    if item["type"] == "missing":
        return f"{place}: the key {dotted} is missing"
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        return f"{place}: {dotted}: {message}" if location else f"{place}: {message}"
    expected = _expected(item)
    if location[-1:] == ["[key]"]:
        return (
            f"{place}: {dotted.removesuffix(f'.{value}.[key]')} has the name {short_repr(value)}, expected {expected}"
        )
    return f"{place}: {dotted} is {short_repr(value)}, expected {expected}"


def _expected(item: dict) -> str:
    pattern = item.get("ctx", {}).get("pattern")
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    if item["type"] == "path_type":
        return "a path"
    expected = item["msg"].removeprefix("Input should be ")
    return expected.replace("a valid integer", "a whole number").replace("a valid ", "a ")


def _keys_at(model: type[BaseModel], location: list) -> list[str]:
    """Keys that the block at `location` may have."""
    for part in location:
        if part in model.model_fields:
            inner = block_class(model.model_fields[part].annotation)
            model = inner or model
    return list(model.model_fields)


def block_class(annotation: Any) -> type[BaseModel] | None:
    """The class of the blocks in a type such as `dict[str, Source]` or `Source | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        inner = block_class(argument)
        if inner is not None:
            return inner
    return None
