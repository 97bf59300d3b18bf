"""Running stages as a user does, but from a process that has imported torch already, so that a start costs tenths of a
second.

`stage("pretrain", recipe, "pretrain.steps=3")` runs the entry point of pipeline/pretrain.py in a child that is forked
from a server process and returns (exit code, stdout + stderr). The child can be killed: by a fault point
(`fault="save:2"`) or after a time.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 900  # for a stage; one that compiles on a loaded machine takes minutes
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.preload"])


def _enter(environment: dict, folder: str, log: str) -> None:
    """Make this forked process look like one that a shell started in `folder`, with its output in `log`."""
    os.chdir(folder)
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)


def _child(kind: str, words: list[str], environment: dict, folder: str, log: str) -> None:
    _enter(environment, folder, log)
    from pipeline.core.stage import main

    main(kind, words)


def _rank(script: str, words: list[str], environment: dict, folder: str, log: str) -> None:
    _enter(environment, folder, log)
    if script == "-m":
        sys.argv = words
        sys.path.insert(0, str(Path(__file__).parent))  # for the workers that tests have of their own
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *words]
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")


def stage(
    kind: str,
    *words,
    cwd: Path | str = ".",
    fault: str | None = None,
    kill_after: float | None = None,
    env: dict | None = None,
) -> tuple[int, str]:
    """Exit code (negative: killed by that signal) and output of one stage run."""
    environment = dict(env or {})
    if fault:
        environment["ALMA_FAULT"] = fault
    with tempfile.TemporaryDirectory() as scratch:
        log = f"{scratch}/log"
        process = _context.Process(target=_child, args=(kind, [str(w) for w in words], environment, str(cwd), log))
        process.start()
        if kill_after is not None:
            deadline = time.time() + kill_after
            while time.time() < deadline and process.is_alive():
                time.sleep(0.01)
            process.kill()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"{kind} did not end in {SECONDS} s:\n{Path(log).read_text()}")
        with contextlib.suppress(FileNotFoundError):
            return process.exitcode, Path(log).read_text()
        return process.exitcode, ""


def succeed(kind: str, *words, **options) -> str:
    code, text = stage(kind, *words, **options)
    assert code == 0, f"pipeline/{kind}.py {' '.join(str(w) for w in words)} ended with {code}:\n{text}"
    return text


class Rank:
    """One process of a launch, with the methods of subprocess.Popen."""

    def __init__(self, script: Path | str, words: list[str], environment: dict, folder: Path | str, log: Path):
        self.process = _context.Process(target=_rank, args=(str(script), words, environment, str(folder), str(log)))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """Exit code. Raises TimeoutError."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise TimeoutError(f"process {self.pid} did not end in {seconds} s")
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def start_ranks(
    script: Path | str, words: list[list], cwd: Path | str, logs: list[Path], env: dict | None = None
) -> list[Rank]:
    """A script (or `-m`, with a module as first word) in len(words) processes, with the environment that torchrun gives
    them; `words` and `logs` are those of each rank. As under srun, nobody ends the others when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for rank, own in enumerate(words):
        environment = {
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(len(words)),
            "LOCAL_WORLD_SIZE": str(len(words)),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            **(env or {}),
        }
        logs[rank].touch()
        found.append(Rank(script, [str(word) for word in own], environment, cwd, logs[rank]))
    return found


def _codes(ranks: list[Rank], seconds: float) -> list[int]:
    """Exit codes of all. Like torchrun, end the others when one fails; also after so many seconds."""
    deadline = time.time() + seconds
    while any(rank.poll() is None for rank in ranks):
        if time.time() > deadline or any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return [rank.poll() for rank in ranks]


def launch(processes: int, script: Path | str, *words, cwd: Path | str, seconds: float = 300) -> str:
    """Run a script in so many processes and return what they wrote. Raises AssertionError with it when one fails."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        codes = _codes(start_ranks(script, [list(words)] * processes, cwd, [log] * processes), seconds)
        assert not any(codes), f"{script} ended with {codes}:\n{log.read_text()[-8000:]}"
        return log.read_text()


def launch_of_a_proof(
    program: list[str], processes: int, *, on_gpu: bool, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """pipeline.checks.launch.run, by forks."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        script, *words = program
        ranks = start_ranks(script, [words] * processes, os.getcwd(), [log] * processes, environment)
        failed = [code for code in _codes(ranks, SECONDS) if code]
        return failed[0] if failed else 0, log.read_text()


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of a published output: what two equal runs must share byte for byte."""
    from pipeline.core.artifact import content_files

    folder = folder.resolve()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in content_files(folder)}


def byte_level(texts: list[str], size: int):
    """A byte-level tokenizer of at most `size` tokens, trained as the stage does."""
    from pipeline.data.tokenizer import byte_bpe, pretokenize
    from pipeline.data.tokenizer.special_tokens import SPECIAL

    learned, pairs = byte_bpe.train(texts, size - len(SPECIAL), True, True, sum(len(text.encode()) for text in texts))
    return byte_bpe.build(
        {token: index for index, token in enumerate(learned)}, pairs, pretokenize.pattern(True), SPECIAL
    )
