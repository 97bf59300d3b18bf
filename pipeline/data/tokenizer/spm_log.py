"""What sentencepiece's trainer is doing, shown while it runs: the last line of its log, every ten seconds.

with shown_while_training(log):
    SentencePieceTrainer.train(...)     # C++ that releases the interpreter's lock, so that a thread can read the log
"""

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import tracking

HEAD = re.compile(r"^[A-Z]\d+ \S+ +\d+ \S+\.cc:\d+\] ")  # of a line of its log: level, time, thread, place


@contextlib.contextmanager
def shown_while_training(log: Path) -> Iterator[None]:
    """Print the last line of `log` every `tracking.PLAIN_SECONDS`, and how long training has taken so far."""
    ended = threading.Event()
    thread = threading.Thread(target=_print_until, args=(ended, log), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _print_until(ended: threading.Event, log: Path) -> None:
    began = time.time()
    while not ended.wait(tracking.PLAIN_SECONDS):
        message = _last_message(log)
        if message:
            print(f"tokenizer: sentencepiece, {time.time() - began:.0f} s so far: {message}", flush=True)


def _last_message(log: Path) -> str:
    with open(log, "rb") as handle:
        handle.seek(max(0, log.stat().st_size - 10_000))
        lines = handle.read().decode(errors="replace").split("\n")
    messages = [line for line in lines[:-1] if line.strip() and not line.startswith(" ")]  # settings are indented
    return HEAD.sub("", messages[-1]) if messages else ""
