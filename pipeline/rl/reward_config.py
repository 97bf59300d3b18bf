"""Keys of the rewards of a recipe, and what can be checked of them without running a user's code."""

import importlib.util
import inspect
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.recipe_file import suggestion
from pipeline.rl import user_functions, verifiers
from pipeline.rl.user_functions import Parameters

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
                raise ValueError(f"arguments: {self.function} has no argument {name!r}; {expected(parameters)}")
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
        return user_functions.is_own(self.function)

    @property
    def file(self) -> Path:
        """Of a function of the user's own."""
        return user_functions.file_of(self.function)

    @property
    def name(self) -> str:
        return user_functions.name_of(self.function)


def expected(parameters: Parameters) -> str:
    names = [name for name in parameters.names if name not in GIVEN]
    return f"it has {', '.join(names) or 'none'}"


def verifier_parameters(name: str) -> Parameters:
    parameters = inspect.signature(verifiers.VERIFIERS[name]).parameters.values()
    required = [each.name for each in parameters if each.default is inspect.Parameter.empty]
    return Parameters(tuple(each.name for each in parameters), tuple(required))


def parameters_of(reward: Reward, key: str) -> Parameters:
    """What a reward's function can be called with. key: for messages. Raises UserError."""
    if reward.is_own:
        return user_functions.parameters_of(user_functions.definition(reward.function, key), key)
    return verifier_parameters(reward.function)


def check_calls(rewards: dict[str, Reward], fields: dict[str, set[str]]) -> None:
    """Check that every function gets what it needs. fields: of each source, the names that its records give. Raises
    UserError."""
    for name, reward in rewards.items():
        if reward.is_model:
            continue
        key = f"rewards.{name}"
        parameters = parameters_of(reward, key)
        unknown = [each for each in reward.arguments if each not in parameters.names and not parameters.takes_any]
        if unknown:
            raise UserError(f"{key}.arguments: {reward.name} has no parameter {unknown[0]!r}; {expected(parameters)}")
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
