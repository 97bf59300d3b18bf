"""Rewards and tools computed in processes of their own, each call with a deadline and a limit of memory.

    workers = RewardWorkers(count=2)
    outcomes = workers.run([Call("math", {"response": ..., "answer": ...}, seconds=10, memory=2, seed=1), ...])

A function may hang, raise, return what is not a number, leave processes behind or end its process: each is an outcome,
and the process is replaced where needed. What a reward computes does not depend on the number of processes.
"""

import json
import os
import queue
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pipeline.rl import process_tree

MESSAGE = 30  # seconds for an answer to arrive completely
START = 120.0  # seconds for a process to start and import a function's file, which is not part of a call's time


@dataclass(frozen=True)
class Call:
    """One call of a function."""

    function: str
    """A verifier, or FILE.py:NAME."""
    arguments: dict[str, Any]
    """By name; JSON values."""
    seconds: float
    memory: float
    """GiB."""
    seed: int
    """Of Python's `random` in the process."""
    only_import: bool = False
    """Import the function's file, and do not call it."""
    text: bool = False
    """It returns a text, or a value that is written as JSON; else a number."""


@dataclass(frozen=True)
class Outcome:
    """What came of a call."""

    value: Any
    """A number, or of a call with `text` a text. None: it failed."""
    failure: str = ""
    """timeout, memory, error (raised), value (not a finite number, or not a text), died (its process ended); of a call
    with a value, processes: it left some behind, which were ended."""
    message: str = ""


class _Worker:
    """A process, and the socket to it."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        # A message that has begun and does not end is one that a function wrote there.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", MESSAGE, 0))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.rl.reward_worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the stage, which ends its workers
                env=_environment(),
            )
        self.connection = Connection(ours.detach())
        self.loaded: set[str] = set()

    def ask(self, call: Call, *, loads: bool, seconds: float) -> Outcome:
        """Have a call made, or only its function imported. Raises TimeoutError, or OSError if the process has ended, or
        what it says cannot be read."""
        message = {"function": call.function, "arguments": call.arguments, "memory": call.memory, "seed": call.seed}
        self.connection.send_bytes(json.dumps(message | {"loads": loads, "text": call.text}).encode())
        if not self.connection.poll(seconds):
            raise TimeoutError
        try:
            answer = json.loads(self.connection.recv_bytes())
            if "failure" in answer:
                return Outcome(None, answer["failure"], answer["message"])
            value, left = answer["value"], answer["processes"]
        except (ValueError, TypeError, KeyError) as error:
            raise OSError(f"its answer cannot be read: {error}") from error
        if left:
            return Outcome(value, "processes", "left processes behind, which were ended")
        return Outcome(value)

    def end(self) -> None:
        process_tree.end_children(self.process.pid)
        self.process.kill()
        self.connection.close()
        self.process.wait()


def _environment() -> dict[str, str]:
    """So that the process imports the same modules wherever the command was started, and orders sets as every other
    one."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


class RewardWorkers:
    """Processes that compute rewards, `count` at a time. They end with this process."""

    def __init__(self, count: int):
        # Threads wait for the processes. A process ends with the thread that has started it, so they are kept.
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="rewards")
        self.idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(count):
            self.idle.put(None)  # started when it is needed

    def run(self, calls: list[Call]) -> Iterator[Outcome]:
        """The outcomes of calls, in their order, as they become known."""
        return self.threads.map(self._outcome, calls)

    def close(self) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)
        while not self.idle.empty():
            worker = self.idle.get()
            if worker is not None:
                worker.end()

    def _outcome(self, call: Call) -> Outcome:
        worker = self.idle.get()
        try:
            if worker is None:
                worker = _Worker()
            if call.function not in worker.loaded or call.only_import:
                outcome = worker.ask(call, loads=True, seconds=START)
                if outcome.value is None:
                    return outcome
                worker.loaded.add(call.function)
            if call.only_import:
                return outcome
            return worker.ask(call, loads=False, seconds=call.seconds)
        except TimeoutError:
            worker.end()
            worker = None
            return Outcome(None, "timeout", f"more than {START if call.only_import else call.seconds:g} s")
        except (OSError, EOFError):
            worker.end()
            code, worker = worker.process.returncode, None  # -9: it was still there, and unreadable
            return Outcome(None, "died", f"its process ended ({code})")
        finally:
            self.idle.put(worker)
