"""Files at an address (https://, s3://, hf://, gs://, anything that fsspec supports), copied once into the cache, so
that they are read like local ones and identified by their content."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.errors import Absent, UserError
from pipeline.core.files import write_json
from pipeline.data.sources.packages import cache_folder

HEADERS = ("ETag", "Last-Modified", "Content-Length")  # that change when a file does
DETAILS = ("size", "ETag", "etag", "mtime", "last_modified", "LastModified", "sha256", "md5Hash", "created")
TIMEOUT = 60  # seconds


def is_address(path: str) -> bool:
    return "://" in path


def fetch_address(address: str, where: str) -> list[tuple[str, Path]]:
    """(name, local path) of the file at an address, or of all files that a pattern matches. A file that has not changed
    there is not fetched again. Raises UserError."""
    if re.match("https?://", address):
        return [(_name(address), _fetch_https(address, where))]
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


def _fetch_https(address: str, where: str) -> Path:
    """By the standard library, because fsspec's https needs aiohttp."""
    import urllib.request

    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            version = {key: response.headers[key] for key in HEADERS if response.headers[key]}
        cached = _cached_path(address)
        if not _is_current(cached, address, version):
            with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
                _copy(response, cached, response.headers["Content-Length"], where, address, version)
        return cached
    except OSError as error:  # urllib's and the network's errors derive from it
        raise Absent(f"{where}: {address} cannot be read: {error}") from None


def _fetch(system: Any, path: str, where: str, address: str) -> Path:
    details = system.info(path)
    if details.get("type") == "directory":
        raise UserError(
            f"{where}: {address} is a folder; give a file or a pattern such as {address.rstrip('/')}/*.jsonl.zst"
        )
    version = {key: str(details[key]) for key in DETAILS if details.get(key) is not None}
    path = system.unstrip_protocol(path)
    cached = _cached_path(path)
    if not _is_current(cached, path, version):
        with system.open(path, "rb") as source:
            _copy(source, cached, details.get("size"), where, path, version)
    return cached


def _cached_path(address: str) -> Path:
    return cache_folder() / "addresses" / hashlib.sha256(address.encode()).hexdigest()[:32] / _name(address)


def _is_current(cached: Path, address: str, version: dict) -> bool:
    """Whether the cache has this version of a file; not if the server gives no version."""
    if not version or not cached.exists():
        return False
    try:
        recorded = json.loads((cached.parent / "address.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return recorded == {"address": address, **version}


def _copy(source: BinaryIO, cached: Path, size: int | str | None, where: str, address: str, version: dict) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    scratch = cached.parent / f".{cached.name}.{os.getpid()}.tmp"
    with open(scratch, "wb") as copy:
        while block := source.read(4 << 20):
            copy.write(block)
    received = scratch.stat().st_size
    if size is not None and received != int(size):
        scratch.unlink()
        raise UserError(f"{where}: {address} gave {received} bytes, expected {size}; run the same command again")
    (cached.parent / "address.json").unlink(missing_ok=True)
    os.replace(scratch, cached)
    write_json(cached.parent / "address.json", {"address": address, **version})
