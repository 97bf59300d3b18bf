"""Stopping when asked (SIGTERM, SIGUSR1), at any moment, and the word that is left for the job script.

    with outside(output):                  # around the whole stage: nothing is unsaved, so a signal ends this process
        with StopSignal() as signals:      # around the steps: a signal is noted, and all processes stop at one step
            number = int(distributed.all_reduce_max([signals.number])[0])
            if number:
                save(...); stop(output, step, number)

`requeue.json` in the stage's folder says why the run ended and that the same command goes on: stage, reason (signal,
hang, lost), step (where it was), saved (the step it goes on from), and what else is known. Exit codes do not survive
launchers, so the job script reads this (launch/slurm/again.py). A mistake of the user, an exception and a spike leave
no such word: to start again would not help.
"""

import contextlib
import json
import os
import re
import signal

from pipeline.errors import Stopped
from pipeline.files import write_json
from pipeline.output import Output

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def leave_word(output: Output, reason: str, step: int, **more) -> None:
    """Write requeue.json. Any process may. A signal is no news after a hang or a loss: launchers send one to the
    ranks that are left."""
    path = output.folder / "requeue.json"
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        if reason == "signal" and json.loads(path.read_text(encoding="utf-8"))["reason"] in ("hang", "lost"):
            return
    write_json(
        path,
        {
            "stage": output.stage,
            "reason": reason,
            "step": step,
            "saved": saved_step(output),
            "job": os.environ.get("SLURM_JOB_ID"),
            **more,
        },
    )


def saved_step(output: Output) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    found = [
        re.fullmatch(r"step-(\d+)", path.parent.name)
        for path in (output.path / "checkpoints").glob("step-*/complete.json")
    ]
    return max((int(match[1]) for match in found if match), default=0)


class StopSignal:
    """Notes SIGTERM and SIGUSR1 in `number`, the maximum of which over all processes is what all of them act on."""

    def __init__(self):
        self.number = 0
        self.previous = {}

    def __enter__(self):
        for number in SIGNALS:
            self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame) -> None:
        self.number = number

    def __exit__(self, kind, error, trace):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        # came after the last step was agreed on: whoever is responsible from here on shall hear of it
        if self.number and kind is None:
            os.kill(os.getpid(), self.number)


def stop(output: Output, step: int, number: int) -> None:
    """Leave word for the job script that this run wants to be queued again, and raise Stopped. Everything of `step`
    has been saved."""
    name = signal.Signals(number).name
    if output.is_main:
        leave_word(output, "signal", step, signal=name)
    raise Stopped(f"{output.stage}: {name} received, saved at step {step}; the same command goes on from here")


@contextlib.contextmanager
def outside(output: Output):
    """While a model is built, data are prepared or the result is published, all there is to save has been saved: a
    signal raises Stopped here and now.

    The other processes hear of it from the heartbeats (train/watch.py) if the signal reached this one alone.
    """

    def leave(number, frame):
        name, saved = signal.Signals(number).name, saved_step(output)
        leave_word(output, "signal", saved, signal=name)
        raise Stopped(
            f"{output.stage}: {name} received, nothing is lost; the same command goes on from"
            f" {f'step {saved}' if saved else 'the start'}"
        )

    previous = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
