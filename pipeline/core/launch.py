"""Starting one stage of a chain in its own processes, passing signals on to them, and what their exit codes mean."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from pipeline.core.errors import EXIT_STOPPED, EXIT_USER, Stopped
from pipeline.core.files import read_record, write_atomic
from pipeline.core.graph import Node
from pipeline.core.processes import Ranks, cores, signals_held
from pipeline.core.recipe import Recipe, module_of, resolved


def launch(node: Node, recipe: Recipe, *, restart: bool, fork: bool) -> None:
    """One stage in its own process, or in several ranks. Raises Stopped or StageFailed unless it ends well.

    It gets the recipe as it was when the chain started: an edit of the file while the chain runs concerns the next run.
    """
    script = Path(__file__).parents[1] / f"{node.config.kind}.py"
    sweep_snapshots(recipe.root)
    snapshot = recipe.root / f".chain-{socket.gethostname()}-{os.getpid()}.yaml"
    write_atomic(snapshot, resolved(recipe))
    words = [
        str(script),
        str(snapshot),
        "--stage",
        node.name,
        *(["--restart"] if restart else []),
        *(["--fork"] if fork else []),
    ]
    run_config = node.config.run
    threads = run_config.threads or max(1, cores() // run_config.processes)
    environment = {**os.environ, "ALMA_CHAIN": str(os.getpid()), "OMP_NUM_THREADS": str(threads)}
    (node.folder / "requeue.json").unlink(missing_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            with signals_held():  # by the ranks too, until they are there to act on them (train/stop.py, begin)
                ranks = Ranks(words, run_config.processes, environment)
                asked = stack.enter_context(_passing_on(ranks, node.name))
            codes = ranks.wait()
    finally:
        snapshot.unlink(missing_ok=True)
    _judge(node, codes, asked, ranks.killed)


@contextlib.contextmanager
def _passing_on(ranks: Ranks, stage: str):
    """Pass signals on to the ranks of a stage; a second Ctrl-C kills them. Gives the list of the signals so far."""
    from pipeline.train import stop

    asked: list[int] = []

    def handle(number, frame) -> None:
        again = number == signal.SIGINT and number in asked
        asked.append(number)
        if again:
            ranks.kill()
            return
        if number == signal.SIGINT:
            stop.tell(f"Ctrl-C: {stage} saves what is finished and stops; Ctrl-C again ends it at once")
        ranks.send(number)

    previous = stop.listen(handle)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _judge(node: Node, codes: list[int], asked: list[int], killed: bool) -> None:
    """What the exit codes of a stage's ranks mean. Raises Stopped or StageFailed, or returns if all is well."""
    from pipeline.train.stop import newest_step

    if not any(codes):
        return
    if any(code == EXIT_USER for code in codes):
        raise StageFailed(node.name, EXIT_USER)
    saved = max((newest_step(path) for path in node.folder.glob("*.partial")), default=0)
    if not hasattr(node.config, "watch"):
        place = f"there ({module_of(node.config.kind).KEPT})"
    else:
        place = f"step {saved}" if saved else "the start of this stage, for nothing was saved yet"
    if killed:
        raise StageFailed(node.name, 130, f"ended at once; the same command continues from {place}")
    if all(code in (0, EXIT_STOPPED) for code in codes):
        raise Stopped("")  # the stage has said what it saved
    try:
        word = read_record(node.folder / "requeue.json", {"reason": str})
    except (OSError, ValueError):  # the stage left none
        word = {}
    if word.get("reason") in ("hang", "lost"):
        raise Stopped(f"{node.name}: {word['message']}; the same command continues from {place}")
    signals = {rank: -code for rank, code in enumerate(codes) if code < 0}
    if asked and set(signals.values()) <= set(asked):
        raise Stopped(f"{node.name}: stopped while it was starting; the same command continues from {place}")
    if signals and (len(codes) == 1 or word.get("reason") != "failed"):
        rank, number = next(iter(signals.items()))
        who = "its process" if len(codes) == 1 else f"rank {rank}"
        memory = " (the system does this when memory runs out)" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name
        why = f"{who} was killed by {name}{memory}; what was done since the last save is lost"
        raise StageFailed(node.name, 1, f"{why}, and the same command continues from {place}")
    why = f"did not finish; its message is above, and the same command continues from {place}"
    raise StageFailed(node.name, 1, why)


def sweep_snapshots(folder: Path) -> None:
    """Remove recipes that killed chains of this host left. Those of other hosts and of the last hour stay: their
    process numbers say nothing here, in a container neither, and a stage that is starting reads its own."""
    for left in folder.glob(f".chain-{socket.gethostname()}-*.yaml"):
        number = left.stem.rpartition("-")[2]
        with contextlib.suppress(FileNotFoundError):  # swept by another chain at the same time
            old = time.time() - left.stat().st_mtime > 3600
            if old and Path("/proc/self").exists() and not Path(f"/proc/{number}").exists():
                left.unlink()


class StageFailed(Exception):
    """A stage's process ended badly. `text` says what is known, unless the stage has said all there is."""

    def __init__(self, stage: str, code: int, text: str = ""):
        super().__init__(f"{stage}: {text}")
        self.stage, self.code, self.text = stage, code, text
