"""Deliberate death, for the tests that prove resume.

`ALMA_FAULT=save:2` kills the process with SIGKILL the second time that it reaches the point called `save`;
`ALMA_FAULT=work:1:SIGTERM` sends it another signal there. Points are where a real crash hurts most: `work` (a unit or
step was done), `save` (inside the writing of a checkpoint or unit, before its completeness marker) and `publish`
(before the manifest and after the rename).
"""

import os
import signal

_seen: dict[str, int] = {}


def point(name: str) -> None:
    """Send the signal here if ALMA_FAULT says so; otherwise cost one dictionary look-up."""
    wanted = os.environ.get("ALMA_FAULT")
    if not wanted:
        return
    _seen[name] = _seen.get(name, 0) + 1
    place, number, *sent = wanted.split(":")
    if (place, number) == (name, str(_seen[name])):
        os.kill(os.getpid(), signal.Signals[sent[0]] if sent else signal.SIGKILL)
