"""The process of a vLLM server on this machine, in an environment of its own: start, health, end.

server = ServerProcess(options, folder, words, log)
server.start()            # until it is healthy
call(server.port, ...)    # server_client.py
server.end()
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.rl.config import Server
from pipeline.rl.server_client import ServerError, call

LINES = 12  # of the server's log in a message
SECONDS_TO_END = 20
# What a launcher tells the ranks of the stage. The server would take itself for one of them.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
PREFIXES_OF_RANKS = ("TORCHELASTIC_", "ACCELERATE_", "ALMA_", "FSDP_", "PMI_")
OF_OUR_PYTHON = ("PYTHONHOME", "VIRTUAL_ENV")


def require(options: Server, stage: str) -> None:
    """Raise UserError if there is no such program on this machine."""
    if shutil.which(options.command) is None:
        raise UserError(
            f"stage {stage}: rollout.server.command: there is no program {options.command!r} here; install vLLM in an"
            " environment of its own (python -m venv /opt/vllm; /opt/vllm/bin/pip install vllm) and name its program,"
            " such as /opt/vllm/bin/vllm"
        )


class ServerProcess:
    """One server at a time; `port` and `process` are those of the newest."""

    def __init__(self, options: Server, folder: Path, words: list[str], log: Path):
        """folder: of the model that it serves. words: further ones of its command."""
        self.options, self.folder, self.words, self.log = options, folder, words, log
        self.process: subprocess.Popen | None = None
        self.port = 0

    def start(self) -> None:
        """Start it, and wait until it is healthy. Raises ServerError."""
        self.end()
        self.port = _free_port()
        command = [self.options.command, "serve", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.rl.server_guard", *command, *self.words, *self.options.arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(self.options),
            )
        self.process = process
        deadline = time.monotonic() + self.options.start
        while not self.is_healthy():
            if process.poll() is not None:
                raise ServerError(f"it ended while it was starting{self.last_lines()}")
            if time.monotonic() > deadline:
                self.end()
                raise ServerError(f"it was not healthy {self.options.start:g} s after its start{self.last_lines()}")
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        """Whether it runs and says that it is well."""
        process = self.process
        if process is None or process.poll() is not None:
            return False
        try:
            call(self.port, "/health", None, min(5.0, self.options.answer))
        except (ServerError, UserError):
            return False
        return True

    def last_lines(self) -> str:
        """The end of its log, for a message."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
        except OSError:
            lines = []
        return f"; {self.log} ends with:\n" + "\n".join(f"    {line}" for line in lines)

    def end(self) -> None:
        """End it and all that it has started."""
        process, self.process = self.process, None
        if process is None:
            return
        process.stdin.close()  # its guard ends it
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _environment(options: Server) -> dict[str, str]:
    """Of the guard, and without PYTHONPATH of the server."""
    environment = {}
    for name, value in os.environ.items():
        if name not in (*OF_RANKS, *OF_OUR_PYTHON) and not name.startswith(PREFIXES_OF_RANKS):
            environment[name] = value
    environment |= {
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "VLLM_SERVER_DEV_MODE": "1",  # for the calls that give it new weights
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if options.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = options.gpus
    return environment
