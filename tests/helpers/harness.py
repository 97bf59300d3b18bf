"""Running stages as a user does, but from a process that has imported torch already, so that a start costs tenths of a
second.

`stage("pretrain", recipe, "pretrain.steps=3")` runs the entry point of pipeline/pretrain.py in a child that is forked
from a server process and returns (exit code, stdout + stderr). The child can be killed: by a fault point
(`fault="save:2"`) or after a time.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
        "numpy",
        "pyarrow.parquet",
        "pipeline.core.stage",
    ]
)


def _child(kind: str, words: list[str], environment: dict, folder: str, log: str) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    from pipeline.core.stage import main

    main(kind, words)


def stage(
    kind: str,
    *words,
    cwd: Path | str = ".",
    fault: str | None = None,
    kill_after: float | None = None,
    env: dict | None = None,
) -> tuple[int, str]:
    """Exit code (negative: killed by that signal) and output of one stage run."""
    environment = {"OMP_NUM_THREADS": "1", **(env or {})}
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
        process.join(300)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"{kind} did not end in 300 s:\n{Path(log).read_text()}")
        with contextlib.suppress(FileNotFoundError):
            return process.exitcode, Path(log).read_text()
        return process.exitcode, ""


def succeed(kind: str, *words, **options) -> str:
    code, text = stage(kind, *words, **options)
    assert code == 0, f"pipeline/{kind}.py {' '.join(str(w) for w in words)} ended with {code}:\n{text}"
    return text


def launch(processes: int, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    """A script in so many processes, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, env=environment)


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
