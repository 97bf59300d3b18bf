"""Keys of the tools that a policy may call while it answers, what it is told of them, and what can be checked without
running a user's code."""

import ast
from collections.abc import Iterable
from typing import Any

from pydantic import Field, model_validator

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.rl import user_functions
from pipeline.rl.user_functions import Parameters

# JSON types of Python's annotations.
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}


class Tool(Strict):
    """A Python function that the policy may call."""

    function: str
    """FILE.py:NAME. It returns a text, or a JSON value, which is written as JSON."""
    description: str | None = None
    """What the policy reads of it; none: the first paragraph of the function's docstring."""
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments that the policy gives; none: from the names, annotations and defaults of the
    function's parameters, without those that `arguments` and `reward_fields` give."""
    arguments: dict[str, Any] = {}
    """Arguments that the recipe gives, by name; the policy does not see them."""
    seconds: float = Field(10.0, gt=0)
    """Wall-clock time that one call may take; then its process is ended."""
    memory: float = Field(2.0, gt=0)
    """GiB of address space that its process may have."""
    characters: int = Field(2000, ge=1)
    """Most characters of a result that the policy reads; the rest is cut off."""

    @model_validator(mode="after")
    def own_function(self):
        if not user_functions.is_own(self.function):
            raise ValueError(f"function: {self.function!r} is not FILE.py:NAME, a Python function of your own")
        return self


class Toolbox:
    """The tools of a recipe, with what their files say of their functions. Raises UserError for a function that does
    not exist, or that cannot be called by names."""

    def __init__(self, tools: dict[str, Tool]):
        self.tools = tools
        self.functions = {
            name: user_functions.definition(tool.function, f"tools.{name}") for name, tool in tools.items()
        }
        self.parameters: dict[str, Parameters] = {}
        for name, function in self.functions.items():
            self.parameters[name] = user_functions.parameters_of(function, f"tools.{name}")

    def definitions(self, fields: Iterable[str]) -> list[dict]:
        """The tools as a chat template gets them, in OpenAI's form. fields: what the record gives, by name."""
        shown = []
        for name, tool in self.tools.items():
            description = tool.description
            if description is None:
                docstring = ast.get_docstring(self.functions[name]) or ""
                description = docstring.partition("\n\n")[0].replace("\n", " ")
            about = {"name": name, "description": description, "parameters": self.schema(name, fields)}
            shown.append({"type": "function", "function": about})
        return shown

    def schema(self, name: str, fields: Iterable[str]) -> dict:
        """JSON schema of the arguments that the policy gives a tool."""
        tool, function = self.tools[name], self.functions[name]
        if tool.parameters is not None:
            return tool.parameters
        properties = {}
        for argument in [*function.args.args, *function.args.kwonlyargs]:
            if argument.arg not in {*tool.arguments, *fields}:
                annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                kind = TYPES.get(annotation.partition("[")[0])
                properties[argument.arg] = {} if kind is None else {"type": kind}
        required = [each for each in self.parameters[name].required if each in properties]
        return {"type": "object", "properties": properties, "required": required}

    def check(self, fields: dict[str, list[str]]) -> None:
        """Check that every function can get what it needs. fields: of each source, the names that its records give.
        Raises UserError."""
        for name, tool in self.tools.items():
            key, parameters = f"tools.{name}", self.parameters[name]
            if parameters.takes_any and tool.parameters is None:
                raise UserError(f"{key}: {tool.function} takes any argument; list in {key}.parameters which there are")
            for source, known in fields.items():
                asked = self.schema(name, known).get("properties", {})
                unknown = [each for each in [*tool.arguments, *asked] if each not in parameters.names]
                if unknown and not parameters.takes_any:
                    raise UserError(
                        f"{key}: {tool.function} has no parameter {unknown[0]!r}; it has {_listed(parameters.names)}"
                    )
                missing = [each for each in parameters.required if each not in {*tool.arguments, *known, *asked}]
                if missing:
                    raise UserError(
                        f"{key}: {tool.function} needs {missing[0]!r}, and for source {source} nothing gives it; name"
                        f" it in {key}.parameters, {key}.arguments or sources.{source}.reward_fields"
                    )

    def arguments(self, name: str, fields: dict, given: dict) -> dict:
        """What a tool's function is called with. fields: of the record; given: by the policy. Raises ValueError for
        arguments that the policy cannot give, or has not given."""
        tool, parameters = self.tools[name], self.parameters[name]
        asked = self.schema(name, fields).get("properties", {})
        unknown = [each for each in given if each not in asked]
        if unknown:
            raise ValueError(f"there is no argument {unknown[0]!r}; there is {_listed(asked)}")
        arguments = given | {key: value for key, value in fields.items() if key in parameters.names} | tool.arguments
        missing = [each for each in parameters.required if each not in arguments]
        if missing:
            raise ValueError(f"the argument {missing[0]!r} is missing")
        return arguments


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
