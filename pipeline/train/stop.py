"""Stopping when asked (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP), at any moment, and the word that is left for the job script.

    begin()                                # first thing in a stage's process: nothing is done yet, a signal ends it
    with outside(output, kept):            # around the whole stage: all there is to save is saved, a signal ends it
        with StopSignal() as signals:      # around the steps: a signal is noted, and all processes stop at one step
            number = int(distributed.all_reduce_max([signals.number])[0])
            if number:
                save(...); stop(output, step, number)

A second Ctrl-C ends the process at once. Signals after the first change nothing otherwise: terminals, torchrun and
Slurm send some of them twice.

`requeue.json` in the stage's folder says why the run ended: stage, reason (signal, hang, lost, failed), step (where it
was), saved (the step that it continues from), progress (a number that grows when a try was not in vain), from (the same
for people), and what else is known. Exit codes do not survive launchers, so the job script reads this
(launch/slurm/again.py). A mistake of the user and a spike leave no such word, and an exception on one of several ranks
leaves `failed`: to start again would not help.
"""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

from pipeline.core.errors import Stopped
from pipeline.core.files import read_record, write_json
from pipeline.core.output import Output
from pipeline.core.partial_runs import finished_files

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# torchrun passes a terminal's Ctrl-C on to ranks that have had it from the terminal
TWICE = 1.0
EXIT_INTERRUPTED = 130  # what a shell gives for SIGINT

_asked: float | None = None  # when this process was first asked to stop
_output: Output | None = None  # of the stage that runs here
_kept: str | None = None  # what a stage without steps keeps


# ---- words -----------------------------------------------------------------------------------------------------------


def leave_word(output: Output, reason: str, step: int, **more) -> None:
    """Write requeue.json. Any process may. The first reason that is none of a signal stays: launchers send signals to
    the ranks that are left, and these then fail too."""
    path = output.folder / "requeue.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        if read_record(path, {"reason": str})["reason"] != "signal":
            return
    saved, files = saved_step(output), finished_files(output.path)
    write_json(
        path,
        {
            "stage": output.stage,
            "reason": reason,
            "step": step,
            "saved": saved,
            "progress": saved if _kept is None else files,
            "from": f"step {saved}" if _kept is None else f"{files} finished files",
            "job": os.environ.get("SLURM_JOB_ID"),
            **more,
        },
    )


def saved_step(output: Output) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    return newest_step(output.path)


def newest_step(path: Path) -> int:
    """The same for the folder of an unfinished output."""
    found = [
        re.fullmatch(r"step-(\d+)", marker.parent.name) for marker in path.glob("checkpoints/step-*/complete.json")
    ]
    return max((int(match[1]) for match in found if match), default=0)


def place(output: Output) -> str:
    """Where the same command continues, for people."""
    if _kept is not None:
        return f"there ({_kept})"
    saved = saved_step(output)
    return f"step {saved}" if saved else "the start: nothing was saved yet"


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def failed_rank() -> dict | None:
    """What the job script noted about a rank that ended badly (launch/slurm/rank.py): rank, host, process, code and
    `text`. It is there before Slurm sends SIGTERM to the others. None: there is none, or no such job script."""
    folder = os.environ.get("ALMA_ENDED")
    if not folder:
        return None
    found = []
    for path in Path(folder).glob("rank-*"):
        with contextlib.suppress(OSError, ValueError):
            host, process, code = path.read_text(encoding="utf-8").split()
            found.append((int(path.name.removeprefix("rank-")), host, int(process), int(code)))
    asked = {128 + number for number in SIGNALS}  # still starting when it was asked to stop
    causes = [one for one in found if one[3] not in asked]
    if not causes:
        return None
    # a rank that was killed explains why others failed
    rank, host, process, code = min(causes, key=lambda one: (one[3] <= 128, one[0]))
    text = f"was killed by {signal.Signals(code - 128).name}" if code > 128 else f"ended with code {code}"
    return {"rank": rank, "host": host, "process": process, "code": code, "text": text}


# ---- signals ---------------------------------------------------------------------------------------------------------


def listen(handler) -> dict:
    """Have `handler` called for each signal that asks to stop; returns the handlers before. SIGHUP stays ignored where
    it is: nohup(1) says that the end of a terminal shall not matter."""
    return {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }


def _restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def launched() -> bool:
    """Whether `alma run` started this process: it has told the user, and sees to a second Ctrl-C."""
    return "ALMA_CHAIN" in os.environ


def _first(number: int) -> bool:
    """Note a signal; whether it is the first. Ends the process at a second Ctrl-C."""
    global _asked
    now = time.monotonic()
    if _asked is None:
        _asked = now
        return True
    if number == signal.SIGINT and not launched() and now - _asked > (TWICE if "RANK" in os.environ else 0):
        _end_at_once()
    return False


def _end_at_once() -> None:
    if _output is None:
        os._exit(EXIT_INTERRUPTED)
    tell(f"{_output.stage}: ended at once; the same command continues from {place(_output)}")
    _output.close()  # the lock
    os._exit(EXIT_INTERRUPTED)


def tell(text: str) -> None:
    """A line on standard error from rank 0, from inside a signal handler too: `print` may be at work already."""
    if int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, f"{text}\n".encode())


def begin() -> None:
    """First thing in a stage's process."""

    def leave(number, frame):
        if not _first(number):
            return
        if "RANK" in os.environ:  # others may be waiting for this rank: an exit code of a stop would have them wait on
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(f"{name_of(number)} received while the stage was starting; nothing was done yet")

    listen(leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the chain starts its stages with them blocked


def finish() -> None:
    """Last thing in a stage's process: Python gives signals back to the system while it ends, and one that is sent
    twice would then take the place of the exit code. A second Ctrl-C still ends what waits for workers."""
    for number in SIGNALS:
        if number != signal.SIGINT or launched() or "RANK" in os.environ:
            signal.signal(number, signal.SIG_IGN)


class StopSignal:
    """Notes the first signal in `number`, the maximum of which over all processes is what all of them act on."""

    def __init__(self):
        self.number = 0

    def __enter__(self):
        self.previous = listen(self._note)
        return self

    def _note(self, number, frame) -> None:
        if not _first(number):
            return
        self.number = number
        if number == signal.SIGINT and not launched():
            tell("Ctrl-C: saving after this step; Ctrl-C again ends at once")

    def __exit__(self, kind, error, trace):
        global _asked
        _restore(self.previous)
        # came after the last step was agreed on: whoever is responsible from here on shall hear of it
        if self.number and kind is None:
            _asked = None
            os.kill(os.getpid(), self.number)


def stop(output: Output, step: int, number: int) -> None:
    """Leave word for the job script that this run wants to be queued again, and raise Stopped. Everything of `step`
    has been saved."""
    if output.is_main:
        leave_word(output, "signal", step, signal=signal.Signals(number).name)
    raise Stopped(
        f"{output.stage}: {name_of(number)} received, saved at step {step}; the same command continues from there"
    )


@contextlib.contextmanager
def outside(output: Output, kept: str | None = None):
    """While a model is built, data are prepared or the result is published, all there is to save has been saved: a
    signal raises Stopped here and now. `kept`: for a stage without steps, what it keeps of its work, as a sentence.

    The other processes hear of it from the heartbeats (train/watch.py) if the signal reached this one alone.
    """
    global _output, _kept
    _output, _kept = output, kept

    def leave(number, frame):
        if not _first(number):
            return
        name, bad = signal.Signals(number).name, failed_rank()
        if number == signal.SIGINT and not launched():
            tell("Ctrl-C: stopping; Ctrl-C again ends at once")
        if bad is None:
            leave_word(output, "signal", saved_step(output), signal=name)
            raise Stopped(
                f"{output.stage}: {name_of(number)} received; the same command continues from {place(output)}"
            )
        who = f"rank {bad['rank']} ({bad['host']}, process {bad['process']}) {bad['text']}"
        reason = "lost" if bad["code"] > 128 else "failed"
        leave_word(output, reason, saved_step(output), rank=bad["rank"], message=f"{reason}: {who}")
        raise Stopped(f"{output.stage}: {who}, so this rank ends too; saved is {place(output)}")

    previous = listen(leave)
    try:
        yield
    finally:
        _restore(previous)
