"""The files that a path or a pattern of a recipe means: each once, and an error for those that cannot be read."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import Absent, UserError

KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def find(pattern: str, where: str, example: str = "*.jsonl") -> list[tuple[str, Path]]:
    """(name, path) of the file at a path, or of those that match a pattern (`**` for any folders), sorted by name. A
    file with several links to it is listed once, and a link back to a folder above is not followed. Raises UserError,
    which begins with `where`, for anything that is missing or cannot be read, even one of many matches."""
    path = Path(pattern).expanduser()
    mode = _mode(str(path), where)
    if mode is None and glob.has_magic(str(path)):
        return _matches(pattern, path, where)
    if mode is None:
        raise Absent(f"{where}: {pattern} does not exist (in {path.parent if path.is_absolute() else Path.cwd()})")
    if stat.S_ISDIR(mode):
        advice = f"give a file or a pattern such as {pattern.rstrip('/')}/**/{example}"
        raise UserError(f"{where}: {pattern} is a folder; {advice}")
    _check(str(path), mode, where)
    return [(path.name, path)]


def _matches(pattern: str, path: Path, where: str) -> list[tuple[str, Path]]:
    plain = 0
    while not glob.has_magic(path.parts[plain]):
        plain += 1
    root, parts = Path(*path.parts[:plain]), path.parts[plain:]
    files, folders = {}, []
    for match in _walk(str(root), parts, (_identity(str(root)),), where):
        mode = _mode(match, where)
        if mode is not None and stat.S_ISDIR(mode):
            folders.append(match)
        elif mode is not None:
            _check(match, mode, where)
            files[Path(match).relative_to(root).as_posix()] = match
    for folder in folders:
        # `*` always matches folders, but one named x.parquet is meant to hold data
        if parts[-1].strip("*") and not any(match.startswith(folder + os.sep) for match in files.values()):
            raise UserError(
                f"{where}: {pattern} matches {folder}, which is a folder, so none of its files would be read; give"
                f" {folder}/* too, or a pattern that does not match it"
            )
    if not files:
        raise Absent(f"{where}: no file matches {pattern} (in {'/' if path.is_absolute() else Path.cwd()})")
    real_paths = {name: os.path.realpath(match) for name, match in files.items()}
    links = {name for name, match in files.items() if real_paths[name] != os.path.abspath(match)}
    names: dict[str, str] = {}  # by real path; a file's own name is preferred to that of a link
    for name in [*sorted(files.keys() - links), *sorted(links)]:
        names.setdefault(real_paths[name], name)
    return [(name, root / name) for name in sorted(names.values())]


def _walk(folder: str, parts: tuple[str, ...], above: tuple, where: str) -> Iterator[str]:
    """The matches in a folder, as of glob.glob(recursive=True), but without following links in circles. `above`: the
    folder and those that it is in."""
    head, rest = parts[0], parts[1:]
    if not glob.has_magic(head):
        child = os.path.join(folder, head)
        if not rest and os.path.lexists(child):
            yield child
        elif rest and os.path.isdir(child):
            yield from _walk(child, rest, (*above, _identity(child)), where)
        return
    if head == "**" and rest:
        yield from _walk(folder, rest, above, where)
    for name in _names(folder, where):
        if name.startswith(".") and not head.startswith("."):
            continue
        child = os.path.join(folder, name)
        if head != "**" and not fnmatch.fnmatchcase(name, head):
            continue
        if not rest:
            yield child
        following = parts if head == "**" else rest
        if not following:
            continue
        if os.path.islink(child) and not os.path.exists(child) and not Path(name).suffix:
            raise _dangling(child, where)  # perhaps to a folder of data, on a disk that is not mounted
        if os.path.isdir(child) and (identity := _identity(child)) not in above:
            yield from _walk(child, following, (*above, identity), where)


def _names(folder: str, where: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{where}: the folder {folder} cannot be listed: {error.strerror}") from None


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        status = os.stat(folder or ".")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _mode(path: str, where: str) -> int | None:
    """st_mode of what is at a path; None: nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise _dangling(path, where) from None
        return None
    except ValueError as error:
        raise UserError(f"{where}: {path!r} is not a path: {error}") from None
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read: {error.strerror}") from None


def _dangling(path: str, where: str) -> Absent:
    return Absent(
        f"{where}: {path} is a link to {os.readlink(path)}, which does not exist; restore the target or remove the link"
    )


def _check(path: str, mode: int, where: str) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise UserError(f"{where}: {path} is {kind}; a source is read several times, so give a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{where}: {path} cannot be read: permission denied")
