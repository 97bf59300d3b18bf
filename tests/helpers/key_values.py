"""Every key of every stage, and for each a value that is not its default."""

from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic_core import PydanticUndefined

from pipeline.core.config import Strict
from pipeline.core.recipe import module_of


def blocks(annotation: Any) -> list[type[Strict]]:
    """Config classes inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [found for part in get_args(annotation) for found in blocks(part)]


def keys(kind: str) -> dict[tuple[str, ...], tuple[type[Strict], Any]]:
    """Key path below a stage -> (class, field) of each key that holds no block of its own. Blocks with names (sources)
    and lists of blocks are left to `VALUES` of the tests."""
    found = {}

    def walk(model: type[Strict], path: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            inner = blocks(field.annotation)
            if inner and get_origin(field.annotation) not in (dict, list):
                walk(inner[0], (*path, name))
            elif not inner:
                found[(*path, name)] = (model, field)

    walk(module_of(kind).Config, ())
    return found


def other(field) -> Any:
    """A value that a field may have and that is not its default."""
    default = None if field.default is PydanticUndefined else field.default
    return _other(field.annotation, default, list(field.metadata))


def _other(annotation: Any, default: Any, limits: list) -> Any:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _other(parts[0], default, [*limits, *parts[1:]])
    if origin is Literal:
        return next((value for value in parts if value != default), None)
    if annotation is bool:
        return not default
    if annotation in (int, float):
        step = 1 if annotation is int else 0.25
        candidates = [step * number for number in range(1, 40)] + [(default or 0) + step, 0]
        if default:
            candidates.insert(0, default * 2 if annotation is int else default / 2)
        return next(value for value in candidates if value != default and all(_fits(value, limit) for limit in limits))
    if annotation is str:
        return "other"
    if origin in (list, tuple):
        return ["a"] if parts and parts[0] is str else [1]
    if origin is dict:
        return {"a": 1}
    for part in parts:
        if part is not type(None) and (value := _other(part, default, limits)) is not None:
            return value
    return "other" if not parts else None


def _fits(value: float, limit: Any) -> bool:
    for kind, test in (
        (Ge, lambda: value >= limit.ge),
        (Gt, lambda: value > limit.gt),
        (Le, lambda: value <= limit.le),
        (Lt, lambda: value < limit.lt),
    ):
        if isinstance(limit, kind):
            return test()
    return all(_fits(value, part) for part in limit.metadata) if hasattr(limit, "metadata") else True
