"""The process in which rewards and tools are computed: `python -m pipeline.rl.reward_worker DESCRIPTOR PARENT`.
Started by reward_workers.py, which sends calls and ends it when one takes too long.

Messages are JSON, because what comes out of a process that has run a user's or a model's code is not to be unpickled.
"""

import contextlib
import importlib.util
import json
import math
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from pipeline.core.processes import die_with_parent
from pipeline.rl import process_tree
from pipeline.rl.verifiers import VERIFIERS

GIB = 1 << 30
REAP_SECONDS = 10


def serve(descriptor: int, parent: int) -> None:
    """Answer the calls from the other end of the socket until it is closed."""
    die_with_parent(parent)
    process_tree.adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the stage
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection, own = Connection(descriptor), os.getpid()
    home = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    functions: dict[str, Callable] = {}
    while True:
        try:
            call = json.loads(connection.recv_bytes())
        except EOFError:
            return
        answer = _answer(call, functions)
        os.fchdir(home)  # a function may have gone elsewhere, and removed that
        if os.getpid() != own:  # a function has forked, and this is the copy
            os._exit(0)
        connection.send_bytes(json.dumps(answer).encode())


def _answer(call: dict, functions: dict[str, Callable]) -> dict:
    """{"value": number or text} or {"failure": kind, "message": text}, and "processes": the function left some
    behind."""
    own = os.getpid()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(call["memory"] * GIB)
    if most != resource.RLIM_INFINITY:  # a function may have lowered it
        limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    random.seed(call["seed"])
    try:
        function = functions.get(call["function"])
        if function is None:
            function = functions[call["function"]] = load(call["function"])
        if call["loads"]:
            return {"value": 0.0, "processes": False}
        convert = _text if call["text"] else _number
        answer = convert(function(**call["arguments"]))
    except MemoryError:
        answer = {"failure": "memory", "message": f"more than {call['memory']:g} GiB"}
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        answer = {"failure": "error", "message": f"{type(error).__name__}: {error} ({place})"[:300]}
    if os.getpid() != own:
        return answer
    answer["processes"] = bool(process_tree.children(own))
    process_tree.end_children(own)
    _reap()
    return answer


def _reap() -> None:
    """Wait for all children, which have been killed: one that is still dying would be taken for the next call's."""
    deadline = time.monotonic() + REAP_SECONDS
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.001)


def _number(value) -> dict:
    """Numbers of all kinds count, also of numpy and torch, and True and False; text that spells one does not."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor with several elements raises the last
        return {"failure": "value", "message": f"returned {value!r}, expected a number"[:300]}
    if not math.isfinite(number):
        return {"failure": "value", "message": f"returned {number}, expected a finite number"}
    return {"value": number}


def _text(value) -> dict:
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        return {"failure": "value", "message": f"returned what is neither a text nor JSON: {error}"[:300]}
    return {"value": text}


def load(name: str) -> Callable:
    """A verifier, or the function NAME of FILE.py:NAME."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    path, _, function = name.rpartition(":")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # for modules next to it
    spec = importlib.util.spec_from_file_location(f"alma_reward_{os.path.basename(path)[:-3]}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return vars(module)[function]


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
