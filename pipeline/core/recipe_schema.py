"""The JSON schema of a recipe, with what the docstrings say of each key."""

import ast
import inspect
from itertools import pairwise

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema

from pipeline.core.config import Strict
from pipeline.core.recipe import KINDS, Recipe, module_of

FROM = {
    "type": "string",
    "description": "Take over the keys of this one of the recipe's `sources`; further keys here are added, or win.",
}


def schema() -> dict:
    """JSON schema of a recipe, for editors (`# yaml-language-server: $schema=...`) and for documentation."""
    base = Recipe.model_json_schema(schema_generator=_Described)
    definitions = base.setdefault("$defs", {})
    choices = {}
    for kind in KINDS:
        part = module_of(kind).Config.model_json_schema(schema_generator=_Described)
        definitions.update(part.pop("$defs", {}))
        definitions[f"stage-{kind}"] = part
        choices[kind] = {"anyOf": [{"$ref": f"#/$defs/stage-{kind}"}, {"type": "null"}]}
    base["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe, relative to this file, that this one changes.",
    }
    base["properties"]["stages"] = {
        "type": "object",
        "description": base["properties"]["stages"]["description"],
        "properties": choices,
        "additionalProperties": {
            "type": "object",
            "required": ["kind"],
            "allOf": [
                {"if": {"properties": {"kind": {"const": kind}}}, "then": {"$ref": f"#/$defs/stage-{kind}"}}
                for kind in KINDS
            ],
        },
    }
    for part in definitions.values():
        if "sample_by" in part.get("properties", {}):  # a source of records
            part["properties"] = {"from": FROM, **part["properties"]}
    # what is required may be inherited
    base["if"] = {"not": {"required": ["extends"]}}
    base["then"] = {"required": base.pop("required")}
    base["title"] = "alma recipe"
    base["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return _in_one_line(base)


def _in_one_line(node):
    """Descriptions without the line ends of the source file, which editors would show."""
    if isinstance(node, list):
        return [_in_one_line(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: " ".join(value.split()) if key == "description" and isinstance(value, str) else _in_one_line(value)
        for key, value in node.items()
    }


class _Described(GenerateJsonSchema):
    """With the docstring under a field as its description. pydantic's `use_attribute_docstrings` reads them while a
    class is made, which costs every process of every stage 0.08 CPU-s for what this file alone needs."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        texts = _docstrings(schema["cls"])
        for name, entry in made["properties"].items():
            if name in texts:
                entry.setdefault("description", texts[name])
        return made


def _docstrings(model: type[Strict]) -> dict[str, str]:
    """Field -> the docstring under it, in the class itself or in the one it has the field from."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__[: -len(Strict.__mro__)]):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for field, below in pairwise((*body, ast.Pass())):
            if isinstance(field, ast.AnnAssign):
                found.pop(field.target.id, None)
                docstring = _text_of(below)
                if docstring is not None:
                    found[field.target.id] = inspect.cleandoc(docstring)
    return found


def _text_of(statement: ast.stmt) -> str | None:
    """The text of a statement that is only a string, or None."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return None
    return statement.value.value if isinstance(statement.value.value, str) else None
