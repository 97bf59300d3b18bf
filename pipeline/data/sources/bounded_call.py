"""Calls of library functions on untrusted pages, with a bound on time and memory.

    text = call(extract_text, page, extract, seconds=10)      # raises OutOfBounds

Code in C cannot be interrupted from within its process, so the function runs in another process, which is kept for the
next call. Time is CPU time: how busy the machine is makes no difference.
"""

import atexit
import ctypes
import importlib
import math
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from pipeline.core.errors import UserError

MEMORY = 2 << 30  # bytes of address space


class OutOfBounds(Exception):
    """The call took too long or too much memory, or the library failed on what it was given."""


class _Helper:
    """The process that makes the calls. Only the process that started it may use it, not one forked from that."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # so that it imports the same modules, wherever the command was started
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from pipeline.data.sources.bounded_call import serve; serve({theirs.fileno()})",
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.connection = Connection(ours.detach())
        self.owner = os.getpid()

    def close(self) -> None:
        if self.owner == os.getpid():
            self.connection.close()
            self.process.kill()
            self.process.wait()


_helper: _Helper | None = None


def _close() -> None:
    global _helper
    if _helper:
        _helper.close()
    _helper = None


atexit.register(_close)


def call(function: Callable, *arguments: Any, seconds: float) -> Any:
    """The result of a module-level function. Raises UserError if the function does, and OutOfBounds with a reason. If
    the helper process was ended from outside, it is started again, once."""
    global _helper
    task = pickle.dumps((function.__module__, function.__name__, arguments, seconds))
    for attempt in range(2):
        if _helper is None or _helper.owner != os.getpid():
            _helper = _Helper()
        try:
            _helper.connection.send_bytes(task)
            kind, result = pickle.loads(_helper.connection.recv_bytes())
        except (EOFError, OSError):
            _helper.connection.close()
            code = _helper.process.wait()
            _helper = None
            if code == -signal.SIGXCPU:
                raise OutOfBounds("takes too much time") from None
            has_crashed = code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
            if attempt or has_crashed:
                raise OutOfBounds("fails") from None
            continue
        if kind == "error":
            raise result
        return result


# ---- in the helper process -------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Make the calls that the process at the other end of the socket asks for."""
    if sys.platform == "linux":  # ends with its parent, also in the middle of a call
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    connection = Connection(descriptor)
    while True:
        try:
            module, name, arguments, seconds = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # beyond it SIGXCPU ends the process, even within C code
        limit = math.ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        connection.send_bytes(pickle.dumps(_answer(module, name, arguments)))


def _answer(module: str, name: str, arguments: tuple) -> tuple[str, Any]:
    try:
        return "result", getattr(importlib.import_module(module), name)(*arguments)
    except UserError as error:
        return "error", error
    except MemoryError:
        return "error", OutOfBounds("takes too much memory")
    except Exception as error:  # whatever a library raises makes the page a bad record and does not end the stage
        return "error", OutOfBounds(f"fails ({type(error).__name__})")
