"""Starting one stage of a chain in its own processes, passing signals on to them, and what their exit codes mean."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import stop
from pipeline.core.checkpoint_folder import newest_step
from pipeline.core.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER, Stopped
from pipeline.core.files import read_record, write_atomic
from pipeline.core.graph import Node
from pipeline.core.processes import Ranks, cores, signals_held
from pipeline.core.recipe import Recipe, resolved


class StageFailed(Exception):
    """A stage's process failed. `text` says why, unless the stage has said it itself."""

    def __init__(self, stage: str, code: int, text: str = ""):
        super().__init__(f"{stage}: {text}")
        self.stage, self.code, self.text = stage, code, text


def launch(node: Node, recipe: Recipe, *, restart: bool, fork: bool) -> None:
    """Run one stage in one process per rank. Raises Stopped or StageFailed unless it succeeds.

    It gets the recipe as it was when the chain started: a later edit of the file only affects the next run.
    """
    script = Path(__file__).parents[1] / f"{node.config.kind}.py"
    sweep_snapshots(recipe.root)
    snapshot = recipe.root / f".chain-{socket.gethostname()}-{os.getpid()}.yaml"
    write_atomic(snapshot, resolved(recipe))
    words = [str(script), str(snapshot), "--stage", node.name]
    if restart:
        words.append("--restart")
    if fork:
        words.append("--fork")
    run_config = node.config.run
    threads = run_config.threads or max(1, cores() // run_config.processes)
    environment = os.environ | {"ALMA_CHAIN": str(os.getpid()), "OMP_NUM_THREADS": str(threads)}
    (node.folder / "requeue.json").unlink(missing_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            with signals_held():  # the ranks hold them as well, until they can act on them (core/stop.py, begin)
                ranks = Ranks(words, run_config.processes, environment)
                received = stack.enter_context(_passing_signals(ranks, node.name))
            codes = ranks.wait()
    finally:
        snapshot.unlink(missing_ok=True)
    _check_exit_codes(node, codes, received, ranks.killed)


@contextlib.contextmanager
def _passing_signals(ranks: Ranks, stage: str) -> Iterator[list[int]]:
    """Pass signals on to the ranks of a stage; a second Ctrl-C kills them. Yields the list of the signals so far."""
    received: list[int] = []

    def handle(number, frame) -> None:
        second = number == signal.SIGINT and number in received
        received.append(number)
        if second:
            ranks.kill()
            return
        if number == signal.SIGINT:
            stop.print_in_handler(f"Ctrl-C: {stage} saves what is finished and stops; Ctrl-C again ends it at once")
        ranks.send(number)

    previous = stop.set_handlers(handle)
    try:
        yield received
    finally:
        stop.restore_handlers(previous)


def _check_exit_codes(node: Node, codes: list[int], received: list[int], killed: bool) -> None:
    """Raise Stopped or StageFailed unless all ranks succeeded.

    received: signals that the chain got meanwhile; killed: the chain has killed the ranks.
    """
    if not any(codes):
        return
    if any(code == EXIT_USER for code in codes):
        raise StageFailed(node.name, EXIT_USER)
    resumes = f"the same command continues from {_resume_point(node)}"
    if killed:
        raise StageFailed(node.name, EXIT_INTERRUPTED, f"ended at once; {resumes}")
    if all(code in (0, EXIT_STOPPED) for code in codes):
        raise Stopped("")  # the stage has said what it saved
    try:
        marker = read_record(node.folder / "requeue.json", {"reason": str})
    except (OSError, ValueError):  # the stage left none
        marker = {}
    if marker.get("reason") in ("hang", "lost"):
        raise Stopped(f"{node.name}: {marker['message']}; {resumes}")
    signals = {rank: -code for rank, code in enumerate(codes) if code < 0}
    if received and set(signals.values()) <= set(received):
        raise Stopped(f"{node.name}: stopped while it was starting; {resumes}")
    if signals and (len(codes) == 1 or marker.get("reason") != "failed"):
        rank, number = next(iter(signals.items()))
        process = "its process" if len(codes) == 1 else f"rank {rank}"
        memory = " (the system does this when memory runs out)" if number == signal.SIGKILL else ""
        reason = f"{process} was killed by {signal.Signals(number).name}{memory}"
        raise StageFailed(node.name, 1, f"{reason}; work since the last save is lost, and {resumes}")
    raise StageFailed(node.name, 1, f"failed; its message is above, and {resumes}")


def _resume_point(node: Node) -> str:
    """Where the same command continues."""
    if not node.config.HAS_STEPS:
        return f"there ({node.config.KEPT})"
    step = max((newest_step(run) for run in node.folder.glob("*.partial")), default=0)
    return f"step {step}" if step else "the start of this stage, because nothing was saved yet"


def sweep_snapshots(folder: Path) -> None:
    """Remove recipes that killed chains of this host left. Those of other hosts and of the last hour are kept: their
    process numbers have no meaning here, nor in another container, and a stage that is starting reads its own."""
    for path in folder.glob(f".chain-{socket.gethostname()}-*.yaml"):
        pid = path.stem.rpartition("-")[2]
        with contextlib.suppress(FileNotFoundError):  # another chain may remove it at the same time
            old = time.time() - path.stat().st_mtime > 3600
            if old and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists():
                path.unlink()
