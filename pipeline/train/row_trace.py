"""Records which rows each step read, for the proof that a resumed run reads the same rows as an uninterrupted one
(`alma verify resume`).

With ALMA_ROW_TRACE=FOLDER each process appends a line for every row that it reads: step, number of the row in the run,
hash of its tokens.
"""

import hashlib
import os
from pathlib import Path

VARIABLE = "ALMA_ROW_TRACE"


def record(step: int, index: int, tokens) -> None:
    """Append a row, an array of tokens. Costs one look-up in the environment if no trace was asked for."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()
    with open(Path(folder) / f"{os.getpid()}.txt", "a", encoding="utf-8") as handle:
        handle.write(f"{step} {index} {digest}\n")


def read(folder: Path) -> set[str]:
    """All lines of all processes of all starts. A row that was read again, with the same tokens in the same step,
    counts once."""
    lines: set[str] = set()
    for path in Path(folder).glob("*.txt"):
        lines.update(path.read_text(encoding="utf-8").splitlines())
    return lines
