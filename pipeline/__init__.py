"""alma: raw text to an aligned chat model, one recipe, every stage resumable."""

import os
import signal
import sys
import threading

__version__ = "0.1.0"


def _leave_quietly_while_importing() -> None:
    """Ctrl-C while a program of alma imports its modules, which takes a second or more, prints one line and no
    traceback. The program installs its own handler afterwards. Other programs that import this package, and ranks of a
    launcher, keep the handler that they have."""
    program = os.path.realpath(sys.argv[0]) if sys.argv else ""
    is_ours = os.path.basename(program) == "alma" or os.path.dirname(program) == os.path.dirname(__file__)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not is_ours or not in_main_thread or "RANK" in os.environ:
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as under nohup
        return

    def leave(number, frame):
        os.write(2, b"interrupted before anything was done\n")
        os._exit(130)  # what a shell gives for SIGINT

    signal.signal(signal.SIGINT, leave)


_leave_quietly_while_importing()
