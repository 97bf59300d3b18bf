"""Stopping when asked (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP), at any moment, and the marker for the job script that says
why a run ended.

    begin()                                  # first thing in a stage's process: nothing is done yet, a signal ends it
    with interruptible(output, kept):        # around the stage: everything that can be saved is saved, a signal ends it
        with StopSignal() as signals:        # around the steps: a signal is noted, all processes stop at the same step
            number = int(distributed.all_reduce_max([signals.number])[0])
            if number:
                save(...); stop(output, step, number)

A second Ctrl-C ends the process at once. Other signals after the first have no effect, because terminals, torchrun and
Slurm send some of them twice.

`requeue.json` in the stage's folder is the marker: stage, reason (signal, hang, lost, failed; device, network or
storage for errors of machines, see transient_errors.py), step (at which the run ended), saved (the step from which it
resumes), progress (a number that grows unless a try was in vain), from (the same for people), and further details. Exit
codes do not survive launchers, so the job script reads this file (pipeline/cluster/again.py). A user error and a spike
leave no marker, and an exception on one of several ranks leaves `failed`: starting again would not help.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

from pipeline.cluster.again import ended_ranks
from pipeline.core.checkpoint_folder import newest_step
from pipeline.core.errors import EXIT_INTERRUPTED, Stopped
from pipeline.core.files import read_record, write_json
from pipeline.core.output import Output
from pipeline.core.partial_runs import finished_files

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Seconds in which a second Ctrl-C is taken for the first: a rank gets it from the terminal and from torchrun.
SAME_CTRL_C = 1.0

_first_signal_at: float | None = None  # when this process was first asked to stop
_output: Output | None = None  # of the stage that runs in this process
_kept: str | None = None  # what a stage without steps keeps


# ---- the marker ------------------------------------------------------------------------------------------------------


def write_requeue_marker(output: Output, reason: str, step: int, **details) -> None:
    """Write requeue.json. Any process may. The first reason other than `signal` stays: launchers send signals to the
    remaining ranks, which then fail too."""
    path = output.folder / "requeue.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        if read_record(path, {"reason": str})["reason"] != "signal":
            return
    saved, num_files = saved_step(output), finished_files(output.path)
    marker = {
        "stage": output.stage,
        "reason": reason,
        "step": step,
        "saved": saved,
        "progress": saved if _kept is None else num_files,
        "from": f"step {saved}" if _kept is None else f"{num_files} finished files",
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    write_json(path, marker | details)


def saved_step(output: Output) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    return newest_step(output.path)


def resume_place(output: Output) -> str:
    """From where the same command continues, for people."""
    if _kept is not None:
        return f"there ({_kept})"
    saved = saved_step(output)
    return f"step {saved}" if saved else "the start: nothing was saved yet"


def signal_name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def failed_rank() -> dict | None:
    """What the job script noted about a rank that failed (pipeline/cluster/rank.py): rank, host, process, code and
    `text`. The note exists before Slurm sends SIGTERM to the others. None: no rank failed, or there is no such job
    script."""
    folder = os.environ.get("ALMA_ENDED")
    failed = ended_ranks(Path(folder)) if folder else []
    if not failed:
        return None
    first = failed[0]
    code = first["code"]
    first["text"] = f"was killed by {signal.Signals(code - 128).name}" if code > 128 else f"ended with code {code}"
    return first


# ---- signals ---------------------------------------------------------------------------------------------------------


def set_handlers(handler) -> dict:
    """Call `handler` for each signal that asks to stop; returns the handlers before. SIGHUP stays ignored if it is:
    nohup(1) means that the end of a terminal must not matter."""
    previous = {}
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, handler)
    return previous


def restore_handlers(previous: dict) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)


def started_by_chain() -> bool:
    """Whether `alma run` started this process: then it informs the user and handles a second Ctrl-C."""
    return "ALMA_CHAIN" in os.environ


def _is_first(number: int) -> bool:
    """Note a signal; whether it is the first. Ends the process at a second Ctrl-C."""
    global _first_signal_at
    now = time.monotonic()
    if _first_signal_at is None:
        _first_signal_at = now
        return True
    tolerance = SAME_CTRL_C if "RANK" in os.environ else 0
    if number == signal.SIGINT and not started_by_chain() and now - _first_signal_at > tolerance:
        _end_at_once()
    return False


def _end_at_once() -> None:
    if _output is None:
        os._exit(EXIT_INTERRUPTED)
    print_in_handler(f"{_output.stage}: ended at once; the same command continues from {resume_place(_output)}")
    _output.close()  # releases the lock
    os._exit(EXIT_INTERRUPTED)


def print_in_handler(text: str) -> None:
    """Print a line on standard error from rank 0. Safe in a signal handler, which may have interrupted `print`."""
    if int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, f"{text}\n".encode())


def begin() -> None:
    """First thing in a stage's process."""

    def leave(number, frame):
        if not _is_first(number):
            return
        if "RANK" in os.environ:  # others may wait for this rank, and would continue to after an exit code of a stop
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(f"{signal_name(number)} received while the stage was starting; nothing was done yet")

    set_handlers(leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the chain starts its stages with these signals blocked


def finish() -> None:
    """Last thing in a stage's process. Python gives signals back to the system while it ends, so one that is sent twice
    would replace the exit code. A second Ctrl-C still ends what waits for workers."""
    for number in SIGNALS:
        if number != signal.SIGINT or started_by_chain() or "RANK" in os.environ:
            signal.signal(number, signal.SIG_IGN)


class StopSignal:
    """Notes the first signal in `number`, 0 if there was none. All processes act on the maximum of their numbers."""

    def __init__(self):
        self.number = 0

    def __enter__(self):
        self.previous = set_handlers(self._note)
        return self

    def _note(self, number, frame) -> None:
        if not _is_first(number):
            return
        self.number = number
        if number == signal.SIGINT and not started_by_chain():
            print_in_handler("Ctrl-C: saving after this step; Ctrl-C again ends at once")

    def __exit__(self, kind, error, trace):
        global _first_signal_at
        restore_handlers(self.previous)
        # The signal arrived after the processes last compared their numbers: send it to the handler that follows.
        if self.number and kind is None:
            _first_signal_at = None
            os.kill(os.getpid(), self.number)


def stop(output: Output, step: int, number: int) -> None:
    """Write the marker that this run wants to be queued again, and raise Stopped. Everything up to `step` has been
    saved."""
    if output.is_main:
        write_requeue_marker(output, "signal", step, signal=signal.Signals(number).name)
    raise Stopped(
        f"{output.stage}: {signal_name(number)} received, saved at step {step}; the same command continues from there"
    )


@contextlib.contextmanager
def interruptible(output: Output, kept: str | None = None):
    """While a model is built, data are prepared or the result is published, everything that can be saved is saved: a
    signal raises Stopped at once. `kept`: for a stage without steps, what it keeps of its work, as a sentence.

    If the signal reached this process only, the others learn of it from the heartbeats (train/heartbeat.py).
    """
    global _output, _kept
    _output, _kept = output, kept

    def leave(number, frame):
        if not _is_first(number):
            return
        failed = failed_rank()
        if number == signal.SIGINT and not started_by_chain():
            print_in_handler("Ctrl-C: stopping; Ctrl-C again ends at once")
        if failed is None:
            write_requeue_marker(output, "signal", saved_step(output), signal=signal.Signals(number).name)
            raise Stopped(
                f"{output.stage}: {signal_name(number)} received; the same command continues from"
                f" {resume_place(output)}"
            )
        who = f"rank {failed['rank']} ({failed['host']}, process {failed['process']}) {failed['text']}"
        reason = "lost" if failed["code"] > 128 else "failed"
        write_requeue_marker(output, reason, saved_step(output), rank=failed["rank"], message=f"{reason}: {who}")
        raise Stopped(f"{output.stage}: {who}, so this rank ends too; saved is {resume_place(output)}")

    previous = set_handlers(leave)
    try:
        yield
    finally:
        restore_handlers(previous)
