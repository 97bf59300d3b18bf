"""What every process of cleaning does first: keep pyarrow from importing pandas, and glibc from returning memory."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None)
ROOT = Path(__file__).parents[3]  # of the program


class _NoPandas:
    """An importer that finds no pandas."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        if name == "pandas":
            raise ImportError(name)


def without_pandas() -> None:
    """Keep pyarrow from importing pandas, which it does at its first conversion if it can (0.45 CPU-s per process), and
    tries only once. For processes that belong to a stage: Table.to_pandas fails in them afterwards. Records are the
    same with and without pandas (see arrow_values.py)."""
    import pyarrow

    sys.meta_path.insert(0, _NoPandas)
    try:
        pyarrow.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)


def run_task(folder: str, function: Callable, arguments: tuple) -> Any:
    """On another machine: run a task of a stage that was started in `folder`, to which its relative paths refer."""
    without_pandas()
    os.chdir(folder)
    return function(*arguments)


def keep_freed_memory() -> None:
    """Let glibc keep freed arrays of a few megabytes for the next ones. Returning them to the system and getting them
    back page by page costs 0.2 of 6.5 CPU-s (docs/log.md, 29)."""
    if sys.platform == "linux" and hasattr(LIBC, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        LIBC.mallopt(m_mmap_threshold, 32 << 20)
        LIBC.mallopt(m_trim_threshold, 64 << 20)


def release_memory() -> None:
    """Return freed memory to the system: idle workers that kept it held most of the memory while the parent
    deduplicates (docs/log.md, 21)."""
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow:
        pyarrow.default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(LIBC, "malloc_trim"):  # glibc has it, musl does not
        LIBC.malloc_trim(0)
