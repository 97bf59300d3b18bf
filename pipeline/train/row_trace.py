"""Which rows each step read, for the proof that a resumed run reads what an undisturbed one reads (`alma verify
resume`).

With ALMA_WITNESS=FOLDER each process appends a line for every row that it reads: step, number of the row in the run,
hash of its tokens.
"""

import hashlib
import os
from pathlib import Path


def note(step: int, index: int, tokens) -> None:
    """Costs one look-up where nobody asked. `tokens`: an array."""
    folder = os.environ.get("ALMA_WITNESS")
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / f"{os.getpid()}.txt", "a", encoding="utf-8") as handle:
        handle.write(f"{step} {index} {hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()}\n")


def read(folder: Path) -> set[str]:
    """All lines of all processes of all starts: a row that was read again, with the same tokens in the same step,
    counts once."""
    return {line for path in Path(folder).glob("*.txt") for line in path.read_text(encoding="utf-8").splitlines()}
