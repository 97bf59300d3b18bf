"""Kills this process, or has it fail, at chosen points, for the tests of resuming.

`ALMA_FAULT=save:2` sends SIGKILL the second time that the process reaches the point `save`; `ALMA_FAULT=work:1:SIGTERM`
sends another signal, and `ALMA_FAULT=work:1:device` raises what torch raises when the memory of a GPU is broken. The
points are where a real crash does most harm: `work` (a unit or step was finished), `save` (in the writing of a
checkpoint or unit, before it is marked complete), `publish` (before the manifest and after the rename) and `fork`
(after a checkpoint was copied).
"""

import os
import signal

_seen: dict[str, int] = {}


def point(name: str) -> None:
    """Send the signal or raise the error if ALMA_FAULT names this point; otherwise it costs one dictionary look-up."""
    fault = os.environ.get("ALMA_FAULT")
    if not fault:
        return
    _seen[name] = _seen.get(name, 0) + 1
    place, number, *action = fault.split(":")
    if (place, number) != (name, str(_seen[name])):
        return
    if action == ["device"]:
        from torch import AcceleratorError

        raise AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    os.kill(os.getpid(), signal.Signals[action[0]] if action else signal.SIGKILL)
