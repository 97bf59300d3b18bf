"""What one rank knows of the others from their heartbeats, and what follows from it: a rank has ended, is lost, or
hangs. No files and no threads here; see heartbeat.py.

A heartbeat is a dict: rank, host, pid, born (start time of the process), space (pid namespace), launch, stage, step,
phase, place (phases entered since the step began), seconds (in this phase), patience (which limit applies: hang, start,
none), beats (number of this heartbeat), ending.

An ending is a dict: reason (done, stopped, failed, hang, lost), code (exit code), and for all but `done` text or
message, and rank, phase and step of the rank that caused it.
"""

from pipeline.core.lock import born
from pipeline.core.stop import failed_rank
from pipeline.core.terminal import ranks_text

EXIT_HANG = 76  # a hang, or another rank is lost: the run may be started again


class RankStates:
    """Newest heartbeats by rank. Times are seconds of the reader's own `clock`, which the reader advances: clocks of
    hosts differ, and a shared file system shows changes late."""

    def __init__(self, own: dict, world: int):
        self.own, self.rank, self.world = own, own["rank"], world
        self.clock = 0.0
        self.newest: dict[int, dict] = {}
        self.changed: dict[int, float] = {}  # rank -> clock when its heartbeat last changed
        self.moved: dict[int, tuple[int, int, float]] = {}  # rank -> (step, place, clock when it got there)

    def update(self, rank: int, heartbeat: dict) -> None:
        """Take a heartbeat, unless it is the one that is known already."""
        known = self.newest.get(rank)
        if known is not None and (known["pid"], known["beats"]) == (heartbeat["pid"], heartbeat["beats"]):
            return
        position = (heartbeat["step"], heartbeat["place"])
        if rank not in self.moved or self.moved[rank][:2] != position:
            self.moved[rank] = (*position, self.clock)
        self.changed[rank] = self.clock
        self.newest[rank] = heartbeat

    def ending_of_another(self) -> dict | None:
        """Why this rank must end because another one has ended, or None."""
        for rank, heartbeat in self.newest.items():
            ending = heartbeat["ending"]
            if rank == self.rank or ending is None or ending["reason"] == "done":
                continue
            if ending["reason"] not in ("failed", "stopped"):
                return ending
            message = (
                f"{self._name(rank)} {ending['text']} in phase {heartbeat['phase']} of step {heartbeat['step']}, so the"
                " other ranks end too"
            )
            return ending | {"rank": rank, "message": message}
        return None

    # ---- lost ranks --------------------------------------------------------------------------------------------------

    def lost(self, limit: float) -> dict | None:
        """The ending after the loss of a rank: its process is gone, or it gave no heartbeat for `limit` seconds."""
        failed = failed_rank()
        if failed and failed["rank"] != self.rank and failed["code"] > 128:
            heartbeat = self.newest.get(failed["rank"], {"phase": "start", "step": 0})
            who = f"rank {failed['rank']} ({failed['host']}, process {failed['process']})"
            return self._loss(failed["rank"], heartbeat, f"{who} is lost: it {failed['text']}")
        for rank, heartbeat in self.newest.items():
            if rank == self.rank or heartbeat["ending"]:
                continue
            silence = self.clock - self.changed[rank]
            if self._is_gone(heartbeat):
                return self._loss(rank, heartbeat, f"{self._name(rank)} is lost: its process is gone")
            if silence > limit:
                reason = f"no heartbeat for {silence:.0f} s (dead, suspended, or its node is lost)"
                return self._loss(rank, heartbeat, f"{self._name(rank)} is lost: {reason}")
        return None

    def _is_gone(self, heartbeat: dict) -> bool:
        same_host = heartbeat["host"] == self.own["host"]
        same_space = self.own["space"] is not None and heartbeat["space"] == self.own["space"]
        return same_host and same_space and born(heartbeat["pid"]) != heartbeat["born"]

    def _loss(self, rank: int, heartbeat: dict, message: str) -> dict:
        phase, step = heartbeat["phase"], heartbeat["step"]
        message += f"; it was last seen in phase {phase} of step {step}. The other ranks end"
        return _ending("lost", rank, phase, step, message)

    # ---- hangs -------------------------------------------------------------------------------------------------------

    def hang(self, limits: dict[str, float], interval: float) -> dict | None:
        """The ending after a hang: no rank has entered a phase for longer than the rank that the others wait for may
        take. limits: seconds by patience; interval: seconds between heartbeats."""
        if any(heartbeat["patience"] == "none" for heartbeat in self.newest.values()):
            return None
        still = self.clock - max(since for _, _, since in self.moved.values())
        silent = self._silent(max(3 * interval, still / 2))
        missing = [rank for rank in range(self.world) if rank not in self.newest]
        if missing:
            if still <= limits["start"]:
                return None
            text = f"{ranks_text(missing)} did not start within {still:.0f} s"
            return self._hang(missing[0], "none", 0, text, [*missing, *silent])
        behind = self._behind(silent)
        if still <= max(limits[self.newest[rank]["patience"]] for rank in behind):
            return None
        first = self.newest[behind[0]]
        text = self._where(behind, first)
        if silent:
            text += _silence(len(behind))
        return self._hang(behind[0], first["phase"], first["step"], text, [*behind, *silent])

    def _running(self) -> list[int]:
        return [rank for rank, heartbeat in self.newest.items() if not heartbeat["ending"]]

    def _silent(self, patience: float) -> set[int]:
        """Other ranks without a heartbeat for `patience` seconds."""
        others = [rank for rank in self._running() if rank != self.rank]
        return {rank for rank in others if self.clock - self.changed[rank] > patience}

    def _behind(self, silent: set[int]) -> list[int]:
        """The ranks that the others wait for. A rank that is suspended was last seen at a place that it may have left
        since, so silent ranks are blamed before those that are alive, wherever these are; of several, or of none, the
        ranks at the lowest (step, place)."""
        places = {}
        for rank in self._running():
            if rank in silent or not silent:
                places[rank] = self.moved[rank][:2]
        lowest = min(places.values())
        return sorted(rank for rank, place in places.items() if place == lowest)

    def _where(self, behind: list[int], first: dict) -> str:
        seconds = self.clock - self.moved[behind[0]][2]
        who = f"{self._name(behind[0])} has" if len(behind) == 1 else f"{ranks_text(behind)} have"
        return f"{who} been in phase {first['phase']} of step {first['step']} for {seconds:.0f} s"

    def _hang(self, rank: int, phase: str, step: int, text: str, excluded: list[int]) -> dict:
        waiting: dict[str, list[int]] = {}
        for number in sorted(self._running()):
            if number not in excluded:
                waiting.setdefault(self.newest[number]["phase"], []).append(number)
        for where, ranks in waiting.items():
            separator = ";" if where == next(iter(waiting)) else ","
            text += f"{separator} {ranks_text(ranks)} wait{'s' if len(ranks) == 1 else ''} in {where}"
        message = f"hang: {text}. Stacks are in logs/stacks-rank-*.txt"
        return _ending("hang", rank, phase, step, message)

    def _name(self, rank: int) -> str:
        heartbeat = self.newest[rank]
        return f"rank {rank} ({heartbeat['host']}, process {heartbeat['pid']})"


def _ending(reason: str, rank: int, phase: str, step: int, message: str) -> dict:
    return {"reason": reason, "rank": rank, "phase": phase, "step": step, "message": message, "code": EXIT_HANG}


def _silence(count: int) -> str:
    if count == 1:
        return " (as far as it reported; it gives no heartbeat: suspended, or its interpreter is blocked)"
    return " (as far as they reported; they give no heartbeat: suspended, or their interpreters are blocked)"
