"""Where the model of a reference is on this machine, and fetching one that is not: once, by the place's own library.

    model = find(reference)              # None if it has to be fetched
    model = fetch(reference, where)

Hugging Face's models are kept in its library's cache, which other programs share; ModelScope's, packages and folders
made of GGUF files in alma's (~/.cache/alma).
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import Absent, UserError
from pipeline.core.files import hashes, write_atomic
from pipeline.core.terminal import byte_size, say
from pipeline.data.sources import packages
from pipeline.models import gguf_file, model_files
from pipeline.models.references import Reference

TIMEOUT = 30  # seconds, for what a hub says of a repository


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    folder: Path
    """In the Hugging Face layout."""
    files: list[Path]
    """What identifies it: the files of a repository that belong to the model, or the GGUF file."""
    version: int | None = None
    """Of the conversion, for a folder that was made of a GGUF file."""


def find(reference: Reference) -> LocalModel | None:
    """The model of a reference, if it is on this machine and complete. Nothing is downloaded or converted."""
    path = _cached(reference)
    if path is None or not reference.is_gguf:
        return path and _repository(path)
    folder = gguf_file.folder_of(sha256_of(path))
    return LocalModel(folder, [path], gguf_file.VERSION) if folder else None


def fetch(reference: Reference, where: str) -> LocalModel:
    """The model of a reference, downloaded or converted if it is not here yet. where: the key of the recipe, for
    messages. Raises UserError in one sentence."""
    found = find(reference)
    if found:
        return found
    try:
        require_libraries(reference)
        with _one_at_a_time(reference):
            path = _cached(reference) or _download(reference)
            if not reference.is_gguf:
                model_files.check(path)
                model_files.check_tokenizer(path)
                return _repository(path)
            say(f"{where}: unpacking {reference.title} to fp32, once")
            folder = gguf_file.converted(path, sha256_of(path))
            return LocalModel(folder, [path], gguf_file.VERSION)
    except Absent as error:
        raise Absent(*(f"{where}: {line}" for line in error.lines)) from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def require_libraries(reference: Reference) -> None:
    """Raise UserError if a package that reads or fetches this model is not installed."""
    if reference.is_gguf:
        gguf_file.require_library()
    if reference.place == "modelscope" and _modelscope() is None:
        raise UserError(
            f"{reference.text} needs the package modelscope, which is not installed; run pip install 'alma[modelscope]'"
        )


def sha256_of(path: Path) -> str:
    """sha256 of a file, kept by path, size and time."""
    with hashes(packages.cache_folder() / "hashes.json") as sha256:
        return sha256(path)


def _repository(folder: Path) -> LocalModel:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in model_files.SUFFIXES and path.is_file()]
    if (folder / model_files.CONFIG).is_file():
        weights = set(model_files.weight_files(folder))
        files = [path for path in files if path.suffix != ".safetensors" or path in weights]
    return LocalModel(folder, files)


@contextlib.contextmanager
def _one_at_a_time(reference: Reference) -> Iterator[None]:
    """Of several processes that need a model, one fetches it; the others wait and find it."""
    from filelock import FileLock

    folder = packages.cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(character if character.isalnum() else "-" for character in reference.title)
    with FileLock(folder / f"{name}.lock"):
        yield


# ---- on this machine -------------------------------------------------------------------------------------------------


def _cached(reference: Reference) -> Path | None:
    """The complete folder or the GGUF file of a reference, if it is on this machine."""
    if reference.place == "path":
        path = Path(reference.name).expanduser()
        return path if path.exists() else None
    if reference.place == "package":
        return packages.cached(reference.file, reference.revision)
    if reference.place == "modelscope":
        folder = _modelscope_folder(reference)
        path = folder / reference.file if reference.file else folder
        return path if _complete_mark(reference).is_file() and path.exists() else None
    return _in_huggingface_cache(reference)


def _in_huggingface_cache(reference: Reference) -> Path | None:
    from huggingface_hub import hf_hub_download

    for name in (reference.file,) if reference.file else (model_files.CONFIG, model_files.ADAPTER_CONFIG):
        with contextlib.suppress(OSError, ValueError):  # it is not there
            path = Path(hf_hub_download(reference.name, name, revision=reference.revision, local_files_only=True))
            if reference.file:
                return path
            if _is_complete(path.parent):
                return path.parent
    return None


def _is_complete(folder: Path) -> bool:
    """Whether a folder of the cache has a whole model; other programs may have fetched single files."""
    if (folder / model_files.ADAPTER_CONFIG).is_file():
        return (folder / model_files.ADAPTER_WEIGHTS).is_file()
    has_names = all((folder / name).is_file() for name in (model_files.CONFIG, "tokenizer.json"))
    return has_names and model_files.missing_weights(folder) is None


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def _download(reference: Reference) -> Path:
    """Fetch what `_cached` did not find. Raises UserError."""
    if reference.place == "path":
        raise Absent(f"{reference.name} does not exist (in {Path.cwd()})")
    if reference.place == "package":
        return packages.fetch(reference.name, reference.file, reference.revision, where=reference.name)
    if reference.place == "modelscope":
        return _from_modelscope(reference)
    return _from_huggingface(reference)


def _from_huggingface(reference: Reference) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = reference.name, reference.revision
    page = f"{constants.ENDPOINT}/{name}"
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings}
        names = [reference.file]
        if not reference.file:
            index = None
            if model_files.INDEX in sizes:
                index = Path(hf_hub_download(name, model_files.INDEX, revision=revision))
            names = _wanted(reference, sizes, index)
        _announce(reference, sum(sizes.get(file, 0) for file in names), Path(constants.HF_HUB_CACHE))
        with _bars():
            if reference.file:
                return Path(hf_hub_download(name, reference.file, revision=revision))
            return Path(snapshot_download(name, revision=revision, allow_patterns=names))
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{name} is given only to those who accept its terms: do so at {page}, log in (hf auth login), and run the"
            " same command again"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision}; those that there are: {page}/commits/main") from None
    except RepositoryNotFoundError:
        raise UserError(f"{page} does not exist, or only for those who are logged in (hf auth login)") from None
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError: the network was lost
        raise _unreachable(reference, page, error.__cause__ or error) from None
    except EntryNotFoundError:
        raise UserError(f"{name}@{revision} has no file {reference.file}; its files: {page}/tree/{revision}") from None
    except Exception as error:
        if not is_of_the_network(error):
            raise
        raise _unreachable(reference, page, error) from None


def _wanted(reference: Reference, sizes: dict[str, int], index: Path | None) -> list[str]:
    """The files of a repository that belong to its model. Raises UserError if it has no weights that may be read."""
    names = [name for name in sizes if model_files.belongs(name)]
    weights = {name for name in (model_files.WEIGHTS, model_files.ADAPTER_WEIGHTS) if name in sizes}
    if index is not None:
        weights |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if not weights:
        gguf = [name for name in sizes if name.endswith(".gguf")]
        pickles = [name for name in sizes if name.endswith(model_files.PICKLES) and "/" not in name]
        if gguf:
            advice = f"name one of its GGUF files: {reference.name}/{gguf[0]}@{reference.revision}"
        else:
            kind = f"only a pickle ({pickles[0]}), which can run code when it is loaded" if pickles else "none at all"
            advice = f"it has {kind}; give a revision or another repository that has them"
        raise UserError(f"{reference.text} has no safetensors weights; {advice}")
    return [name for name in names if not name.endswith(".safetensors") or name in weights]


def _announce(reference: Reference, size: int, folder: Path) -> None:
    """Say what is downloaded. Raises UserError if there is no room for it."""
    existing = folder
    while not existing.is_dir():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"{reference.text} takes {byte_size(size)}, and {folder} has room for {byte_size(free)}; make room, or set"
            " HF_HOME to a folder on another disk"
        )
    say(f"downloading {reference.text}, {byte_size(size)}, to {folder}")


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Progress bars only on a terminal, and of the main process."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not sys.stderr.isatty() or int(os.environ.get("RANK", 0)) != 0
    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def is_of_the_network(error: Exception) -> bool:
    """Whether a library could not get something: its own errors, those of its client (which one that is depends on its
    version), and those of the system."""
    libraries = ("huggingface_hub", "modelscope", "httpx", "requests", "urllib3")
    return isinstance(error, OSError) or type(error).__module__.startswith(libraries)


def _unreachable(reference: Reference, page: str, error: Exception) -> Absent:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return Absent(
        f"{reference.text} is not on this machine, and {page} cannot be reached ({reason}); run the same command where"
        " there is a network, or copy the model's folder here and give its path"
    )


# ---- ModelScope ------------------------------------------------------------------------------------------------------


def _modelscope():
    """The library's function that downloads a repository; None if it is not installed."""
    try:
        from modelscope import snapshot_download
    except ImportError:
        return None
    return snapshot_download


def _modelscope_folder(reference: Reference) -> Path:
    """A folder per revision: the library's own cache has one per repository."""
    name = reference.name.replace("/", "--")
    return packages.cache_folder() / "modelscope" / name / reference.revision.replace("/", "--")


def _complete_mark(reference: Reference) -> Path:
    folder = _modelscope_folder(reference)
    name = f"{folder.name}-{reference.file}.complete" if reference.file else f"{folder.name}.complete"
    return folder.with_name(name)


def _from_modelscope(reference: Reference) -> Path:
    folder = _modelscope_folder(reference)
    patterns = [reference.file] if reference.file else [f"*{suffix}" for suffix in model_files.SUFFIXES]
    say(f"downloading {reference.text} to {folder}")
    try:
        _modelscope()(
            reference.name,
            revision=reference.revision,
            local_dir=str(folder),
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # also that the repository, revision or file does not exist
        if not is_of_the_network(error):
            raise
        page = f"https://www.modelscope.cn/models/{reference.name}"
        raise _unreachable(reference, page, error) from None
    path = folder / reference.file if reference.file else folder
    if reference.file and not path.is_file():
        raise UserError(f"{reference.name}@{reference.revision} has no file {reference.file}")
    if not reference.file:
        model_files.check(folder)
    write_atomic(_complete_mark(reference), "")
    return path
