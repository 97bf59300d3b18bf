"""Kills this process at chosen points, for the tests of resuming.

`ALMA_FAULT=save:2` sends SIGKILL the second time that the process reaches the point `save`; `ALMA_FAULT=work:1:SIGTERM`
sends another signal. The points are where a real crash does most harm: `work` (a unit or step was finished), `save` (in
the writing of a checkpoint or unit, before it is marked complete), `publish` (before the manifest and after the rename)
and `fork` (after a checkpoint was copied).
"""

import os
import signal

_seen: dict[str, int] = {}


def point(name: str) -> None:
    """Send the signal if ALMA_FAULT names this point; otherwise this costs one dictionary look-up."""
    fault = os.environ.get("ALMA_FAULT")
    if not fault:
        return
    _seen[name] = _seen.get(name, 0) + 1
    place, number, *signal_name = fault.split(":")
    if (place, number) == (name, str(_seen[name])):
        os.kill(os.getpid(), signal.Signals[signal_name[0]] if signal_name else signal.SIGKILL)
