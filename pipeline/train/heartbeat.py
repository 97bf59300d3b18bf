"""A heartbeat of every rank, and a thread in each that looks at the heartbeats of others: a hang names who lags, a
death is told, nobody waits for ever.

    logs/heartbeat/rank-00003.json     host, pid, step, phase, place (phases entered since the step began), beats, and,
                                       when it leaves, its last word
    logs/stacks-rank-3.txt             Python stacks of all threads, when a hang was found

Rank 0 and the last rank look at all files, the others at the files of these two, so that the cost grows with the number
of ranks and not with its square. Time is counted on the reader's own clock from the moment at which it saw a file
change: clocks of hosts differ, and a shared file system shows changes late. A reader that was suspended itself
(SIGSTOP, `scontrol suspend`), or could not write, does not count that time.

* no rank has entered a phase for `watch.hang` seconds: the others wait for those that give no sign of life, or, if all
  live, for the ranks at the lowest (step, place). All dump stacks and leave;
* a rank gives no sign of life for `watch.lost` seconds, or its process is gone from this host: the others say so and
  leave;
* a rank ends with an exception or was asked to stop: the others give their own main thread ten seconds to end by
  itself, and then leave too.

A main thread that is blocked in a collective holds no interpreter lock (gloo and NCCL release it), so this thread runs
on and ends the process.
"""

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path

from pipeline.core.errors import Stopped, UserError
from pipeline.core.lock import born
from pipeline.core.output import Output
from pipeline.train import distributed, phases
from pipeline.train.stop import failed_rank, leave_word

EXIT_HANG = 76  # hang, or another rank lost: to be started again
# phases of a step; all others may take `watch.start` seconds
QUICK = {"data", "forward", "backward", "reduce", "update", "pipeline", "log"}
ALONE = {"prepare"}  # rank 0 works and the others wait for a file, however long it takes; only its life is watched
INTERVAL = 1.0
GRACE = 10.0  # seconds for a main thread to end by itself
# seconds between the word and the end, so that every rank reads it and dumps its stacks before a launcher ends them all
FAREWELL = 4.0


class Watch:
    """`with Watch(output, config.watch):` around the work of a stage. In one process it finds hangs; in several it
    also sees the others."""

    def __init__(self, output: Output, config):
        self.output, self.config = output, config
        self.rank, self.world = distributed.rank(), distributed.world()
        self.folder = output.path / "logs" / "heartbeat"
        self.me = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "space": _pid_space(),
            "launch": _launch(),
            "stage": output.stage,
        }
        # 36 ms of CPU a look at 512 ranks, 0.6 ms at 2
        self.interval = min(max(INTERVAL, self.world / 64), config.hang / 4, config.lost / 4)
        self.lookouts = {0, self.world - 1}
        self.looked_at = [
            rank
            for rank in (range(self.world) if self.rank in self.lookouts else sorted(self.lookouts))
            if rank != self.rank
        ]
        self.beats, self.clock, self.word = 0, 0.0, None
        self.began = None  # step at which this process began: compiling makes it a slow one
        self.seen: dict[int, dict] = {}  # rank -> its newest heartbeat
        self.stale: dict[int, str] = {}  # rank -> what an earlier launch left
        self.changed: dict[int, float] = {}  # rank -> own clock when its file last changed
        self.moved: dict[int, tuple] = {}  # rank -> (step, place, own clock when it got there)
        self.over, self.ending = threading.Event(), threading.Event()

    # ---- the main thread ---------------------------------------------------------------------------------------------

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        if self.ending.is_set():
            self.thread.join()  # it ends the process, with its own word and code
        self.over.set()
        self.thread.join()
        if kind is None:
            self.word = {"why": "done"}
        elif isinstance(error, Stopped):
            self.word = {"why": "stopped", "text": "was asked to stop", "code": 75}
        elif self.world > 1:
            blamed = self._who_broke_it(error)
            if blamed:
                self._leave(blamed)
            self.word = {
                "why": "failed",
                "text": f"{kind.__name__}: {error}",
                "code": 2 if isinstance(error, UserError) else 1,
            }
        self._beat()
        if self.world > 1 and kind is not None and self.me["launch"] is None:
            for _ in range(3):  # who has just started takes the first state it sees for one of an earlier launch
                time.sleep(self.interval)
                self._beat()

    def _who_broke_it(self, error: BaseException) -> dict | None:
        """A collective that fails most often fails because another rank is gone. That rank's word, if one shows in
        time."""
        text = f"{type(error).__name__} {error}"
        if not any(
            sign in text
            for sign in (
                "Connection closed by peer",
                "Connection reset",
                "Broken pipe",
                "Dist",
                "gloo",
                "Gloo",
                "NCCL",
                "ProcessGroup",
                "TCPStore",
            )
        ):
            return None
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            self._look_at_all()
            word = self._others_word() or self._lost_or_ended(min(self.config.lost, GRACE / 2))
            if word:
                return word
            time.sleep(self.interval / 2)
            self.clock += self.interval / 2
            self._beat()
        return None

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self.over.wait(self.interval):
            now = time.monotonic()
            if self._beat():
                self.clock += min(now - before, 2 * self.interval)
            before = now
            self._look_at_all()
            word = (
                self._others_word()
                or self._lost_or_ended(self.config.lost)
                or (self._hang() if self.rank in self.lookouts else None)
            )
            if word is None:
                continue
            if word["why"] in ("failed", "stopped") and self.over.wait(GRACE):
                return
            self.ending.set()
            self._leave(word)

    def _beat(self) -> bool:
        """Write this rank's file; False if the file system would not take it."""
        self.beats += 1
        step, name, place = phases.step, phases.name, phases.place
        self.began = step if self.began is None and step else self.began
        patience = (
            "none"
            if name in ALONE
            else "hang"
            if name in QUICK and self.began is not None and step > self.began
            else "start"
        )
        state = {
            **self.me,
            "step": step,
            "phase": name,
            "place": place,
            "seconds": round(time.perf_counter() - phases.since, 1),
            "patience": patience,
            "beats": self.beats,
            "word": self.word,
        }
        self._note(self.rank, state)
        path = self.folder / f"rank-{self.rank:05d}.json"
        try:  # no fsync: a heartbeat is worth nothing after a crash
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(state))
            os.replace(temporary, path)
            return True
        except OSError:
            return False

    def _look_at_all(self) -> None:
        for rank in self.looked_at:
            try:
                text = (self.folder / f"rank-{rank:05d}.json").read_text()
                state = json.loads(text)
            except (OSError, json.JSONDecodeError):
                continue
            if rank not in self.seen and not (state["launch"] and state["launch"] == self.me["launch"]):
                if self.stale.setdefault(rank, text) == text:
                    continue
            if rank not in self.seen or (state["pid"], state["beats"]) != (
                self.seen[rank]["pid"],
                self.seen[rank]["beats"],
            ):
                self.changed[rank] = self.clock
                self._note(rank, state)

    def _note(self, rank: int, state: dict) -> None:
        at = (state["step"], state["place"])
        if rank not in self.moved or self.moved[rank][:2] != at:
            self.moved[rank] = (*at, self.clock)
        self.seen[rank] = state

    def _others_word(self) -> dict | None:
        for rank, state in self.seen.items():
            word = state["word"]
            if rank == self.rank or word is None or word["why"] == "done":
                continue
            if word["why"] in ("failed", "stopped"):
                who = (
                    f"rank {rank} ({state['host']}, process {state['pid']}) {word['text']} in phase {state['phase']} of"
                    f" step {state['step']}, so the other ranks end too"
                )
                return {**word, "rank": rank, "message": who}
            return word
        return None

    def _lost_or_ended(self, limit: float) -> dict | None:
        """Who is gone may have ended with a word, which it writes before: it shows in a second look, which matters to
        a rank that was suspended between the first one and the finding."""
        lost = self._lost(limit)
        if lost:
            self._look_at_all()
            return self._others_word() or self._lost(limit)
        return None

    def _lost(self, limit: float) -> dict | None:
        bad = failed_rank()
        if bad and bad["rank"] != self.rank and bad["code"] > 128:
            state = self.seen.get(bad["rank"], {"phase": "start", "step": 0})
            message = f"rank {bad['rank']} ({bad['host']}, process {bad['process']}) is lost: it {bad['text']}"
            return self._loss(bad["rank"], state, message)
        for rank, state in self.seen.items():
            if rank == self.rank or state["word"]:
                continue
            gone = (
                state["host"] == self.me["host"]
                and state["space"] == self.me["space"] is not None
                and born(state["pid"]) != state["born"]
            )
            silent = self.clock - self.changed[rank]
            if gone or silent > limit:
                what = (
                    "its process is gone"
                    if gone
                    else f"it has given no sign of life for {silent:.0f} s (dead, suspended, or its node is lost)"
                )
                return self._loss(rank, state, f"rank {rank} ({state['host']}, process {state['pid']}) is lost: {what}")
        return None

    def _loss(self, rank: int, state: dict, message: str) -> dict:
        message += f"; it was last seen in phase {state['phase']} of step {state['step']}. The other ranks end"
        return {
            "why": "lost",
            "rank": rank,
            "phase": state["phase"],
            "step": state["step"],
            "message": message,
            "code": EXIT_HANG,
        }

    def _hang(self) -> dict | None:
        """The word about a hang, if nobody has moved for longer than the rank that is behind may take."""
        here = {rank: self.moved[rank] for rank, state in self.seen.items() if not state["word"]}
        missing = [rank for rank in range(self.world) if rank not in self.seen]
        still = self.clock - max(at for _, _, at in self.moved.values())
        # A rank that is suspended was last seen at a place that it may have left since, so it is blamed before those
        # that live, wherever they are; of several, or of none, those at the lowest place.
        patience = max(3 * self.interval, still / 2)
        silent = {rank for rank in here if rank != self.rank and self.clock - self.changed[rank] > patience}
        places = {rank: (step, place) for rank, (step, place, _) in here.items() if rank in silent or not silent}
        lowest = min(places.values())
        behind = missing or sorted(rank for rank, place in places.items() if place == lowest)
        limits = {"hang": self.config.hang, "start": self.config.start, "none": math.inf}
        limit = self.config.start if missing else max(limits[self.seen[rank]["patience"]] for rank in behind)
        if still <= limit or any(state["patience"] == "none" for state in self.seen.values()):
            return None
        if missing:
            first, text = (
                {"rank": missing[0], "phase": "none", "step": 0},
                f"rank{'s' * (len(missing) > 1)} {_ranges(missing)} did not begin within {still:.0f} s",
            )
        else:
            first = self.seen[behind[0]]
            seconds = self.clock - self.moved[behind[0]][2]
            who = (
                f"rank {behind[0]} ({first['host']}, process {first['pid']}) has"
                if len(behind) == 1
                else f"ranks {_ranges(behind)} have"
            )
            text = f"{who} been in phase {first['phase']} of step {first['step']} for {seconds:.0f} s"
            if silent:
                who, whose = ("it gives", "its interpreter is") if len(behind) == 1 else ("they give", "Python is")
                text += f" (as far as {who.split()[0]} said; {who} no sign of life: suspended, or {whose} blocked)"
        waiting: dict[str, list[int]] = {}
        for rank, state in sorted(self.seen.items()):
            if rank not in behind and rank not in silent and not state["word"]:
                waiting.setdefault(state["phase"], []).append(rank)
        others = ", ".join(
            f"rank{'s' * (len(ranks) > 1)} {_ranges(ranks)} wait{'s' * (len(ranks) == 1)} in {phase}"
            for phase, ranks in waiting.items()
        )
        message = f"hang: {text}{f'; {others}' if others else ''}. Stacks are in logs/stacks-rank-*.txt"
        return {
            "why": "hang",
            "rank": first["rank"],
            "phase": first["phase"],
            "step": first["step"],
            "message": message,
            "code": EXIT_HANG,
        }

    def _leave(self, word: dict) -> None:
        """Tell, leave word, and end this process whatever its main thread is blocked in."""
        self.word = {
            key: word[key] for key in ("why", "rank", "phase", "step", "text", "message", "code") if key in word
        }
        self._beat()
        if word["why"] == "hang":
            with (
                contextlib.suppress(OSError),
                open(self.output.path / "logs" / f"stacks-rank-{self.rank}.txt", "w") as file,
            ):
                faulthandler.dump_traceback(file, all_threads=True)
        # one voice, and not that of a process that may be dead
        if self.rank == (0 if word["rank"] else self.world - 1):
            os.write(2, f"{self.output.stage}: {word['message']}\n".encode())
        if self.rank in self.lookouts:
            if word["why"] in ("hang", "lost"):
                with contextlib.suppress(OSError):
                    leave_word(
                        self.output,
                        word["why"],
                        word["step"],
                        rank=word["rank"],
                        phase=word["phase"],
                        message=word["message"],
                    )
        deadline = time.monotonic() + (FAREWELL if self.world > 1 else 0)
        while time.monotonic() < deadline:
            time.sleep(self.interval)
            self._beat()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        self.output.close()  # the lock: whoever starts again shall not have to find out that its holder is dead
        os._exit(word["code"])


def _launch() -> str | None:
    """A name that all processes of this launch share and no other launch has, if the launcher gives one."""
    if launch := os.environ.get("ALMA_LAUNCH"):  # first: one step of Slurm may be an `alma run` with several launches
        return launch
    if os.environ.get("SLURM_STEP_ID") and os.environ.get("SLURM_JOB_ID"):
        return ".".join(os.environ.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if run == "none" else f"{run}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _pid_space() -> str | None:
    """Process ids mean the same to two processes only in the same namespace: each rank may have its own container.
    None: cannot be told."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _ranges(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2, 5"""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def wait_for(path: Path) -> None:
    """Wait until the main process has made `path`, however long that takes. Its heartbeat is watched meanwhile; a
    collective would give up after its timeout."""
    phases.enter("prepare")
    while not path.exists():
        time.sleep(0.5)
