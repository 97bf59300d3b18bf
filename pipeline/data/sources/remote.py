"""Files behind an address (https://, s3://, hf://, gs://, any that fsspec knows), copied once into the cache so that
they are read like local ones and count by what they hold."""

import hashlib
import json
import os
import re
from pathlib import Path

from pipeline.core.errors import Absent, UserError
from pipeline.core.files import write_json


def is_address(path: str) -> bool:
    return "://" in path


def fetch_address(address: str, where: str) -> list[tuple[str, Path]]:
    """(name, local path) of the file behind an address, or of all that a pattern matches. What did not change at its
    place is not fetched again. Raises UserError."""
    if re.match("https?://", address):
        return [(_name(address), _download(address, where))]
    import fsspec

    try:
        system, _, paths = fsspec.get_fs_token_paths(address)
        if any(sign in address for sign in "*?["):
            paths = sorted(system.glob(address))
            if not paths:
                raise Absent(f"{where}: no file matches {address}")
        return [(_name(path), _fetch(system, path, where, address)) for path in paths]
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{where}: {address} needs a library that is not installed ({error}); install it, or copy the file here and"
            " give its path"
        ) from None
    except Exception as error:  # each file system raises its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Absent(f"{where}: {address} cannot be read: {reason}") from None


def _name(path: str) -> str:
    return path.split("?")[0].rstrip("/").rpartition("/")[2] or "file"


def _download(address: str, where: str) -> Path:
    """https, by the standard library (fsspec's needs aiohttp)."""
    import urllib.request

    mark = {}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=60) as answer:
            mark = {
                key: answer.headers[key] for key in ("ETag", "Last-Modified", "Content-Length") if answer.headers[key]
            }
        target = _known(address)
        if not target.exists() or not _same(target, address, mark):
            with urllib.request.urlopen(address, timeout=60) as answer:
                _copy(answer, target, answer.headers["Content-Length"], where, address, mark)
        return target
    except OSError as error:  # urllib's and the network's errors are all of this kind
        raise Absent(f"{where}: {address} cannot be read: {error}") from None


def _fetch(system, path: str, where: str, address: str) -> Path:
    about = system.info(path)
    if about.get("type") == "directory":
        raise UserError(
            f"{where}: {address} is a folder; give a file or a pattern such as {address.rstrip('/')}/*.jsonl.zst"
        )
    mark = {
        key: str(about[key])
        for key in ("size", "ETag", "etag", "mtime", "last_modified", "LastModified", "sha256", "md5Hash", "created")
        if about.get(key) is not None
    }
    path = system.unstrip_protocol(path)
    target = _known(path)
    if not target.exists() or not _same(target, path, mark):
        with system.open(path, "rb") as source:
            _copy(source, target, about.get("size"), where, path, mark)
    return target


def _known(address: str) -> Path:
    """Where an address is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alma" / "addresses"
    return root / hashlib.sha256(address.encode()).hexdigest()[:32] / _name(address)


def _same(target: Path, address: str, mark: dict) -> bool:
    try:
        return bool(mark) and json.loads((target.parent / "address.json").read_text()) == {"address": address, **mark}
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def _copy(source, target: Path, size, where: str, address: str, mark: dict) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{os.getpid()}.tmp"
    with open(scratch, "wb") as copy:
        while block := source.read(4 << 20):
            copy.write(block)
    if size is not None and scratch.stat().st_size != int(size):
        got = scratch.stat().st_size
        scratch.unlink()
        raise UserError(f"{where}: {address} gave {got} bytes, expected {size}; run the same command again")
    (target.parent / "address.json").unlink(missing_ok=True)
    os.replace(scratch, target)
    write_json(target.parent / "address.json", {"address": address, **mark})
