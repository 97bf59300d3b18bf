"""Keys of the rewards of a recipe, and what can be checked of them without running a user's code."""

import ast
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.recipe_file import suggestion
from pipeline.rl import verifiers

MODEL, PROCESS = "model", "process"
COMBINED = ("minimum", "product")  # how a process reward model's step scores become one
# What a function is called with, if it has a parameter of that name: the text of the response, the messages of the
# prompt, and whether the response ended by itself.
GIVEN = ("response", "prompt", "finished")


class Reward(Strict):
    """One part of the score of a response: a function, and how it counts."""

    function: str
    """`model`: the reward model (input `reward`); `process`: the process reward model (input `process`), its smallest
    score of a step, or with `arguments: {combine: product}` their product; a verifier: exact, contains, prefix, number,
    regex, json_schema, sections, length, code or math; or FILE.py:NAME, a Python function of one's own."""
    arguments: dict[str, Any] = {}
    """Further arguments of the function, by name."""
    weight: float = 1.0
    """Of its value in the score, which is the sum over all rewards."""
    seconds: float = Field(10.0, gt=0)
    """Wall-clock time that one call may take; then its process is ended."""
    memory: float = Field(2.0, gt=0)
    """GiB of address space that its process may have."""
    failed: float = 0.0
    """Value of a call that failed: took too long or too much memory, raised, returned something that is not a finite
    number, or ended its process."""

    @model_validator(mode="after")
    def known_function(self):
        if self.is_model:
            self._check_model()
            return self
        if self.is_own:
            return self
        if self.function not in verifiers.VERIFIERS:
            names = [MODEL, PROCESS, *verifiers.VERIFIERS]
            raise ValueError(
                f"function: there is no {self.function!r} (a function of your own is FILE.py:NAME);"
                f" {suggestion(self.function, names)}"
            )
        parameters = verifier_parameters(self.function)
        for name in self.arguments:
            if name not in parameters.names or name in GIVEN:
                raise ValueError(f"arguments: {self.function} has no argument {name!r}; {parameters.expected()}")
        return self

    def _check_model(self) -> None:
        name, unused = "the reward model", ("arguments", "seconds", "memory", "failed")
        if self.function == PROCESS:
            name, unused = "the process reward model", ("seconds", "memory")
        for key in unused:
            if key in self.model_fields_set:
                raise ValueError(f"{key} is for functions, and function: {self.function} is {name}; remove it")
        for argument, value in self.arguments.items():
            if argument != "combine":
                raise ValueError(f"arguments: {self.function} has no argument {argument!r}; it has combine")
            if value not in COMBINED:
                raise ValueError(f"arguments: combine: {value!r} is neither {' nor '.join(COMBINED)}")

    @property
    def is_model(self) -> bool:
        """Whether a model gives it, and not a function."""
        return self.function in (MODEL, PROCESS)

    @property
    def combine(self) -> str:
        """Of a process reward model."""
        return self.arguments.get("combine", COMBINED[0])

    @property
    def is_own(self) -> bool:
        return ".py:" in self.function

    @property
    def file(self) -> Path:
        """Of a function of the user's own."""
        return Path(self.function.rpartition(":")[0])

    @property
    def name(self) -> str:
        return self.function.rpartition(":")[2]


@dataclass(frozen=True)
class Parameters:
    """What a function can be called with."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    """Those without a default."""
    takes_any: bool = False
    """It has **keywords."""

    def expected(self) -> str:
        names = [name for name in self.names if name not in GIVEN]
        return f"it has {', '.join(names) or 'none'}"


def verifier_parameters(name: str) -> Parameters:
    parameters = inspect.signature(verifiers.VERIFIERS[name]).parameters.values()
    required = [each.name for each in parameters if each.default is inspect.Parameter.empty]
    return Parameters(tuple(each.name for each in parameters), tuple(required))


def own_parameters(reward: Reward, key: str) -> Parameters:
    """Parameters of a user's function, from the text of its file, which is not run. key: for messages. Raises
    UserError."""
    if not reward.file.is_file():
        raise UserError(f"{key}: {reward.file} does not exist; expected FILE.py:NAME, relative to this folder")
    try:
        tree = ast.parse(reward.file.read_text(encoding="utf-8"), str(reward.file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{key}: {reward.file} is not Python: {error}") from None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if reward.name not in functions:
        found = ", ".join(functions) or "none"
        raise UserError(f"{key}: {reward.file} has no function {reward.name!r} at its top level; it has {found}")
    arguments = functions[reward.name].args
    if arguments.posonlyargs or arguments.vararg:
        raise UserError(
            f"{key}: {reward.name} has arguments without names (`/` or `*args`), and is called by name; give it"
            f" parameters such as {', '.join(GIVEN)}"
        )
    positional = [argument.arg for argument in arguments.args]
    required = positional[: len(positional) - len(arguments.defaults)]
    names = list(positional)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        names.append(argument.arg)
        if default is None:
            required.append(argument.arg)
    return Parameters(tuple(names), tuple(required), arguments.kwarg is not None)


def check_calls(rewards: dict[str, Reward], fields: dict[str, set[str]]) -> None:
    """Check that every function gets what it needs. fields: of each source, the names that its records give. Raises
    UserError."""
    for name, reward in rewards.items():
        if reward.is_model:
            continue
        key = f"rewards.{name}"
        parameters = own_parameters(reward, key) if reward.is_own else verifier_parameters(reward.function)
        unknown = [each for each in reward.arguments if each not in parameters.names and not parameters.takes_any]
        if unknown:
            raise UserError(f"{key}.arguments: {reward.name} has no parameter {unknown[0]!r}; {parameters.expected()}")
        for source, given in fields.items():
            missing = [each for each in parameters.required if each not in {*GIVEN, *reward.arguments, *given}]
            if missing:
                raise UserError(
                    f"{key}: {reward.function} needs {missing[0]!r}, and source {source} does not give it; name the"
                    f" field in sources.{source}.reward_fields (an answer also by the template `answer`), or give"
                    f" {key}.arguments.{missing[0]}"
                )


def step_separator(model_config, where: str) -> str:
    """What the answers that a process reward model was trained on have between their steps, of its config.json. where:
    the model, for messages. Raises UserError for another model."""
    separator = getattr(model_config, "alma_step_separator", None)
    if not separator:
        raise UserError(
            f"{where}: is not a process reward model: its config.json has no alma_step_separator; give the output of a"
            " stage of kind prm"
        )
    return separator


def check_packages(rewards: dict[str, Reward]) -> None:
    """Check that the packages of the verifiers are installed. Raises UserError."""
    for name, reward in rewards.items():
        package = verifiers.PACKAGES.get(reward.function)
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"rewards.{name}: {reward.function} needs the package {package.replace('_', '-')}, which is not"
                " installed; pip install 'alma[rewards]'"
            )
