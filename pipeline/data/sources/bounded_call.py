"""Functions of libraries that read foreign pages, with a bound on time and memory.

    text = call(text_of_html, page, extract, seconds=10)      # raises OutOfBounds

No code in C can be interrupted from within its process, so the function runs in another one, which is kept for the next
call. Time is that of the processor: how busy the machine is makes no difference.
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
    """The process that makes the calls, of this process (not of one that was forked from it)."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # so that it finds the modules that are found here, wherever the command was started
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
    """What a function of a module returns. Raises UserError if it does, and OutOfBounds with a reason. A process that
    was ended from outside is started again, once."""
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
            if attempt or code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
                raise OutOfBounds("fails") from None
            continue
        if kind == "error":
            raise result
        return result


# ---- in the other process --------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Make the calls of the process that has the other end."""
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
        # SIGXCPU, which ends the process whatever it is in
        most = math.ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        connection.send_bytes(pickle.dumps(_answer(module, name, arguments)))


def _answer(module: str, name: str, arguments: tuple) -> tuple[str, Any]:
    try:
        return "result", getattr(importlib.import_module(module), name)(*arguments)
    except UserError as error:
        return "error", error
    except MemoryError:
        return "error", OutOfBounds("takes too much memory")
    except Exception as error:  # whatever a library raises on a page is said of the page, and ends no stage
        return "error", OutOfBounds(f"fails ({type(error).__name__})")
