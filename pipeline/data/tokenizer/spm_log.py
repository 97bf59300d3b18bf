"""What sentencepiece's trainer is at, shown from its log as it grows: it says so nowhere else.

with follow(log, vocab_size):
    SentencePieceTrainer.train(...)     # in C++, without the interpreter's lock, so that a thread can look
"""

import contextlib
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import tracking

LOOK_SECONDS = 0.25
# what a line of the log holds -> what begins with it
PHASES = {
    "Loaded all ": "counting characters",
    "Extracting seed sentencepieces": "looking for first pieces (suffix array)",
    "Tokenizing input sentences": "counting words",
    " for EM training": "first iteration",
    "Completed ": "writing the model",
}
SHRINKING = 0.75  # unigram: share of the pieces that each round keeps, and ...
ROUNDS_OF = 2  # ... iterations of a round, until it has vocab_size * 1.1 pieces (sentencepiece's defaults)


@contextlib.contextmanager
def follow(log: Path, vocab_size: int) -> Iterator[None]:
    """Progress of a training whose stderr goes into `log`, on stdout: a bar on a terminal, elsewhere a line every ten
    seconds."""
    ended = threading.Event()
    thread = threading.Thread(target=_look, args=(log, vocab_size, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _look(log: Path, vocab_size: int, ended: threading.Event) -> None:
    shown = _Shown(vocab_size)
    with open(log, encoding="utf-8", errors="replace") as handle, contextlib.ExitStack() as bars:
        held = ""
        while not ended.wait(LOOK_SECONDS):
            *lines, held = (held + handle.read()).split("\n")
            for line in lines:
                shown.line(line, bars)
            shown.wait()


class _Shown:
    def __init__(self, vocab_size: int):
        self.vocab_size, self.taken, self.done, self.bar, self.values = vocab_size, 0, 0, None, {}
        self.phase, self.begun = "", time.time()
        self.said = self.begun

    def line(self, line: str, bars: contextlib.ExitStack) -> None:
        for words, phase in PHASES.items():
            if words in line:
                bars.close()
                self.bar, self.phase, self.begun = None, phase, time.time()
        self.taken += "Adding meta_piece" in line
        if found := re.search(r"Alphabet size=(\d+)", line):
            self.taken += int(found[1])
        elif found := re.search(r"Merged: .*merges=(\d+)", line):
            self._to(int(found[1]), self.vocab_size - self.taken, "merges", bars)
        elif found := re.search(r"EM sub_iter=(\d+) size=(\d+)", line):
            turn, self.values = int(found[1]), {"pieces": int(found[2])}
            rounds = math.log(self.values["pieces"] / (1.1 * self.vocab_size), 1 / SHRINKING)
            left = ROUNDS_OF * max(0, math.ceil(rounds)) + ROUNDS_OF - 1 - turn
            self._to(self.done + 1, self.done + 1 + left, "iterations", bars)

    def _to(self, done: int, total: int, unit: str, bars: contextlib.ExitStack) -> None:
        if self.bar is None:
            self.bar = bars.enter_context(tracking.Progress(f"tokenizer: {unit}", total, unit=unit))
        self.bar.retarget(total)
        self.bar.update(done - self.done, **self.values)
        self.done = done

    def wait(self) -> None:
        """What is shown while the log says nothing."""
        now = time.time()
        if self.bar:
            self.bar.update(0, **self.values)
        elif self.phase and now - max(self.said, self.begun) >= tracking.PLAIN_SECONDS:
            self.said = now
            print(f"tokenizer: {self.phase}, {now - self.begun:.0f} s so far", flush=True)
