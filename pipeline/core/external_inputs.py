"""Inputs that are no stage of the recipe: folders made elsewhere, and models by name (pipeline/models/references.py).

artifact = read("model", "Qwen/Qwen3-0.6B@c1899de", kinds, cache)     # Absent if it is not on this machine
fetch("model", "Qwen/Qwen3-0.6B@c1899de")                             # downloads it
"""

import hashlib
import os
from pathlib import Path

from pipeline.core.artifact import Artifact, digest_of, external
from pipeline.core.errors import Absent, UserError
from pipeline.core.recipe_file import short_repr
from pipeline.models import downloads
from pipeline.models.downloads import LocalModel
from pipeline.models.references import Reference, parse


def problem(source: str) -> str | None:
    """What the text of an input and this machine's libraries show to be wrong, or None. Nothing is downloaded."""
    try:
        reference = parse(source)
        if _is_folder(reference):
            if not os.path.isdir(source) or not os.listdir(source):
                return f"{short_repr(source)} is not a folder with files in it"
            return None
        if reference.place == "path" and not Path(source).is_file():
            return f"{short_repr(source)} does not exist (in {Path.cwd()})"
        downloads.require_libraries(reference)
    except UserError as error:
        return str(error)
    return None


def folder_of(source: str) -> Path | None:
    """The folder of an input, if it is on this machine."""
    reference = parse(source)
    if _is_folder(reference):
        return Path(source)
    model = downloads.find(reference)
    return model and model.folder


def must_be_fetched(source: str) -> bool:
    """Whether an input is to be downloaded or unpacked before it can be read."""
    reference = parse(source)
    return not _is_folder(reference) and downloads.find(reference) is None


def fetch(key: str, source: str) -> None:
    """Download or unpack an input. Raises UserError."""
    downloads.fetch(parse(source), f"inputs.{key}")


def read(key: str, source: str, kinds: tuple[str, ...] = ()) -> Artifact:
    """An input as an artifact, which counts by its content. Raises Absent if it is not on this machine, and UserError
    if it cannot be used. kinds: of stages whose output it may be."""
    reference = parse(source)
    if _is_folder(reference):
        return external(key, Path(source), kinds)
    model = downloads.find(reference)
    if model is None:
        raise Absent(f"inputs.{key}: {source} is not on this machine yet; alma run fetches it")
    return _artifact(reference, model)


def _is_folder(reference: Reference) -> bool:
    return reference.place == "path" and (not reference.is_gguf or os.path.isdir(reference.name))


def _artifact(reference: Reference, model: LocalModel) -> Artifact:
    files = {}
    for path in model.files:
        status = path.stat()
        files[path.name] = {"sha256": downloads.sha256_of(path), "size": status.st_size, "mtime": status.st_mtime_ns}
    digest = digest_of(files)
    if model.version is not None:
        digest = hashlib.sha256(f"{digest}, unpacked by version {model.version}".encode()).hexdigest()
    origin = {"place": reference.place, "name": reference.name, "file": reference.file, "revision": reference.revision}
    if reference.place == "path":
        origin["name"] = reference.title
    manifest = {
        "stage": reference.title,
        "kind": "external",
        "fingerprint": digest,
        "digest": digest,
        "files": files,
        "metrics": {},
        "origin": {key: value for key, value in origin.items() if value},
    }
    return Artifact(model.folder.resolve(), manifest)
