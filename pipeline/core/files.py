"""Files that are complete or missing, and their hashes."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.processes import cores


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file completely or not at all: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data.encode() if isinstance(data, str) else data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON. File names that are not UTF-8 have lone surrogates in Python, for which JSON has escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomic(path, text.encode(errors="backslashreplace"))


def read_record(path: Path, kinds: dict[str, type | tuple[type, ...]]) -> dict:
    """Read a file that `write_json` wrote. kinds: keys that it must have, and their types. Raises ValueError that says
    what is wrong, and OSError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged, not JSON ({error})") from None
    record = value if isinstance(value, dict) else {}
    missing = sorted(set(kinds) - set(record))
    if missing:
        raise ValueError(f"damaged, lacks {', '.join(missing)}")
    for key, kind in kinds.items():
        if not isinstance(record[key], kind):
            raise ValueError(f"damaged, {key} is {str(record[key])[:40]!r}")
    return record


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """fsync every file below `folder`, then the folders, deepest first."""
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        # a .tmp file is being written by another process, which will rename it (heartbeats of other ranks)
        if path.is_symlink() or path.name.endswith(".tmp"):
            continue
        if path.is_dir():
            folders.append(path)
        else:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    for path in reversed(folders):
        sync_folder(path)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def hashes(cache: Path):
    """A function sha256(path) that keeps its results in the file `cache`, by path, size and mtime."""
    try:
        cached = json.loads(cache.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        cached = {}
    updated = dict(cached)

    def sha256(path: Path) -> str:
        status = path.stat()
        key = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        updated[key] = cached.get(key) or sha256_file(path)
        return updated[key]

    yield sha256
    if updated != cached:
        write_json(cache, updated)


def damage_of(path: Path, entry: dict, trust_mtime: bool = False) -> str | None:
    """How a file differs from its {sha256, size} when it was written, or None. With `trust_mtime`, a file that still
    has its size and the `mtime` of `entry` is not hashed."""
    if not path.is_file():
        return f"{path} is missing"
    status = path.stat()
    if status.st_size != entry["size"]:
        return f"{path} has {status.st_size} bytes, expected {entry['size']}"
    if trust_mtime and status.st_mtime_ns == entry["mtime"]:
        return None
    sha256 = sha256_file(path)
    if sha256 != entry["sha256"]:
        return f"{path} has sha256 {sha256[:12]}…, expected {entry['sha256'][:12]}…"
    return None


def hash_files(folder: Path, paths: list[Path]) -> dict[str, dict]:
    """Path below `folder` -> {sha256, size, mtime}; several files at a time (hashlib releases the interpreter lock)."""
    with ThreadPoolExecutor(min(8, cores())) as pool:
        digests = list(pool.map(sha256_file, paths))
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": digest,
            "size": path.stat().st_size,
            "mtime": path.stat().st_mtime_ns,
        }
        for path, digest in zip(paths, digests, strict=True)
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
