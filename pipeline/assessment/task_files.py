"""The tasks of stage assess: by name of lm-eval or of alma, or from a file in lm-eval's format.

A task counts by the content of its file and of everything that the file names on this machine: files that it includes,
its functions, its data. A task of lm-eval counts by its name; its version and data set are lm-eval's.
"""

import difflib
import glob
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.error import YAMLError

from pipeline.core import optional_packages
from pipeline.core.config import EXECUTION, Strict
from pipeline.core.errors import Absent, Problems, UserError

FOLDER = Path(__file__).parent / "tasks"
LOCAL = ("json", "csv", "parquet", "text")  # loaders of the library datasets that read files


class Task(Strict):
    """A task of lm-eval, and how it is asked."""

    task: str | None = None
    """Name in lm-eval, or of a task that comes with alma; none: the key."""
    file: Annotated[Path | None, EXECUTION] = None
    """A task file in lm-eval's format instead of a name. It counts by its content, and that of the files it names."""
    few_shot: int | None = Field(None, ge=0)
    """Examples before each question; none: as the task has it."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many questions."""
    chat_template: bool = False
    """Ask in the model's chat template, with examples as earlier turns; without it as plain text."""
    run_code: bool = False
    """Programs that a model has written may be run, in the verifier `code` of grpo: it protects from mistakes, not from
    attacks. Needed by, and only for, humaneval_local."""
    system: str | None = None
    """System message, or without a chat template the text before everything else."""

    @model_validator(mode="after")
    def _one_place(self):
        if self.task and self.file:
            raise ValueError("give task or file, not both: a name, or a file that defines the task")
        return self

    def name(self, key: str) -> str:
        return self.task or key


def names() -> list[str]:
    """The tasks that come with alma."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def file_of(key: str, task: Task) -> Path | None:
    """The file of a task; None for one of lm-eval."""
    if task.file:
        return task.file
    name = task.name(key)
    return FOLDER / f"{name}.yaml" if name in names() else None


def all_files(tasks: dict[str, Task]) -> list[Path]:
    """The files that decide the results of these tasks, each task's together. Raises UserError and Absent."""
    paths: list[Path] = []
    missing: list[str] = []
    for key, task in tasks.items():
        file = file_of(key, task)
        if file is None:
            continue
        for path in _files(file, f"tasks.{key}"):
            if not path.is_file():
                missing.append(f"tasks.{key}: {path} does not exist (in {Path.cwd()}); {file} names it")
            paths.append(path)
    if missing:
        raise Absent(*missing)
    return paths


def _files(file: Path, where: str) -> Iterator[Path]:
    """A task file and the files that it names."""
    yield file
    if not file.is_file():
        return
    content = _content(file, where)
    included = content.get("include", [])
    for name in included if isinstance(included, list) else [included]:
        yield from _files(file.parent / str(name), where)
    for module in sorted(_functions(content)):
        path = file.parent / f"{module.replace('.', '/')}.py"
        if path.is_file():  # otherwise it is a function of an installed package
            yield path
    if content.get("dataset_path") in LOCAL:
        for pattern in _strings((content.get("dataset_kwargs") or {}).get("data_files")):
            found = sorted(glob.glob(pattern, recursive=True))
            yield from map(Path, found or [pattern])


def _functions(value: Any) -> set[str]:
    """The modules of the functions (`!function MODULE.NAME`) in a task file."""
    if isinstance(value, dict):
        return {module for item in value.values() for module in _functions(item)}
    if isinstance(value, list):
        return {module for item in value for module in _functions(item)}
    if isinstance(value, TaggedScalar) and value.tag.value == "!function":
        return {str(value.value).rpartition(".")[0]}
    return set()


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [] if value is None else [str(value)]


def read(file: Path, where: str) -> dict:
    """A task file, without running its functions. Raises UserError."""
    content = _content(file, where)
    if not isinstance(content.get("task"), str) and not {"include", "group"} & set(content):
        raise UserError(f"{where}: {file} is not a task of lm-eval: it has no key `task` with a name")
    return content


def _content(file: Path, where: str) -> dict:
    try:
        content = YAML(typ="rt", pure=True).load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {file} is not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: {file} is not a task of lm-eval: it has no keys")
    return content


def check(tasks: dict[str, Task]) -> None:
    """Check that each task can be found. Raises UserError with all that cannot."""
    problems = Problems()
    for key, task in tasks.items():
        file = file_of(key, task)
        with problems.gather():
            if file is not None and not file.is_file():
                raise UserError(f"tasks.{key}: {file} does not exist (in {Path.cwd()}); give a task file of lm-eval")
            runs_code = False
            if file is not None:
                metadata = read(file, f"tasks.{key}").get("metadata")
                runs_code = isinstance(metadata, dict) and bool(metadata.get("runs_code"))
            _check_code(key, task, runs_code)
            if file is not None:
                continue
            if task.name(key) not in manager().all_tasks:
                close = difflib.get_close_matches(task.name(key), [*names(), *manager().all_tasks], n=3)
                nearest = (
                    f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists those of lm-eval"
                )
                raise UserError(
                    f"tasks.{key}: no task is called {task.name(key)!r}; {nearest} Those of alma: {', '.join(names())}"
                )
    problems.refuse()


def _check_code(key: str, task: Task, runs_code: bool) -> None:
    """Raise UserError for a task that runs what a model has written, unless the recipe says so."""
    if runs_code and not task.run_code:
        raise UserError(
            f"tasks.{key}: runs programs that the model has written; give run_code: true to let it. They run in an"
            " interpreter of their own with little memory and time, and can read files and the network: use a container"
            " for a model that you do not trust"
        )
    if task.run_code and not runs_code:
        raise UserError(f"tasks.{key}: run_code has no effect, because this task runs no programs; remove it")


@cache
def manager():
    """lm-eval's tasks by name. Reading them takes seconds, so it happens only for tasks of lm-eval."""
    optional_packages.require("lm_eval", "assess.tasks")
    from lm_eval.tasks import TaskManager

    return TaskManager()
