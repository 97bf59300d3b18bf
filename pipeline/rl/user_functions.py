"""Functions of the user's own, FILE.py:NAME: rewards and tools. What is asked here is read from the text of the file,
which is not run."""

import ast
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import Absent, UserError


@dataclass(frozen=True)
class Parameters:
    """What a function can be called with."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    """Those without a default."""
    takes_any: bool = False
    """It has **keywords."""


def is_own(function: str) -> bool:
    return ".py:" in function


def file_of(function: str) -> Path:
    return Path(function.rpartition(":")[0])


def name_of(function: str) -> str:
    return function.rpartition(":")[2]


def definition(function: str, key: str) -> ast.FunctionDef:
    """The definition of a function. key: of the recipe, for messages. Raises UserError."""
    file, name = file_of(function), name_of(function)
    if not file.is_file():
        raise UserError(f"{key}: {file} does not exist; expected FILE.py:NAME, relative to this folder")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{key}: {file} is not Python: {error}") from None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        found = ", ".join(functions) or "none"
        raise UserError(f"{key}: {file} has no function {name!r} at its top level; it has {found}")
    return functions[name]


def parameters_of(function: ast.FunctionDef, key: str) -> Parameters:
    """The parameters of a function. Raises UserError for one that cannot be called by names."""
    arguments = function.args
    if arguments.posonlyargs or arguments.vararg:
        raise UserError(
            f"{key}: {function.name} has arguments without names (`/` or `*args`), and is called by name; give each"
            " parameter a name"
        )
    positional = [argument.arg for argument in arguments.args]
    required = positional[: len(positional) - len(arguments.defaults)]
    names = list(positional)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        names.append(argument.arg)
        if default is None:
            required.append(argument.arg)
    return Parameters(tuple(names), tuple(required), arguments.kwarg is not None)


def files_of(functions: list[str], key: str) -> list[Path]:
    """The files of functions. key: of the recipe. Raises Absent if one does not exist."""
    files = sorted({file_of(function) for function in functions})
    for file in files:
        if not file.is_file():
            raise Absent(f"{key}: {file} does not exist; functions are named FILE.py:NAME")
    return files
