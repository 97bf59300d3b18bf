"""The process around a rollout server: `python -m pipeline.rl.server_guard COMMAND WORD...`. It ends the server, and
all that this has started, when its standard input is closed: however the stage ends, the kernel closes it.
"""

import os
import select
import signal
import subprocess
import sys

from pipeline.core.processes import FOR_PARENTS, die_with_parent
from pipeline.rl import process_tree


def guard(command: list[str]) -> int:
    """Run the command until it ends or standard input is closed. Returns its exit code."""
    process_tree.adopt_orphans()
    own = os.getpid()

    def begin() -> None:
        die_with_parent(own)
        for number in FOR_PARENTS:
            signal.signal(number, signal.SIG_DFL)

    for number in FOR_PARENTS:
        signal.signal(number, signal.SIG_IGN)  # they are for the stage, which ends its server
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # of this process; the server has an environment of its own
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=begin, env=environment)
    while server.poll() is None:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 1):
            break
    process_tree.end_children(own)
    server.kill()  # where no descendants are found
    return server.wait()


if __name__ == "__main__":
    sys.exit(abs(guard(sys.argv[1:])))
