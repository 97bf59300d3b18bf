"""Text of evaluation sets in training data, found by common runs of tokens: 13 words (GPT-3: Brown et al., 2020,
appendix C), or 20 characters where most tokens are Chinese or Japanese.

One rule for both, because a run is judged by what it consists of: 20 characters of Chinese are about 13 words. Used by
clean for pretraining text and by the tuning stages for their conversations, pairs and prompts.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.core.config import Name, SourceBlock, Strict
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.terminal import many
from pipeline.data.sources.csv_files import REPEATED
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import read, text_of
from pipeline.data.sources.sources import Source, needed_fields
from pipeline.data.sources.templates import MissingField

if TYPE_CHECKING:
    import numpy as np

SHORTEST = 8  # tokens of an item that is shorter than a run and is then looked for as a whole
FILTER_BITS = 24


class Decontaminate(Strict):
    """Leave out what contains text of evaluation sets."""

    sets: dict[Name, Source] = Field(min_length=1)
    """Evaluation sets: where their records come from, with `text` as the field or template of what must not be
    trained on (question and answer, usually)."""
    words: int = Field(13, ge=SHORTEST)
    """Tokens of a common run."""
    characters: int = Field(20, ge=SHORTEST)
    """The same where more than half of them are CJK characters."""
    min_hits: int = Field(1, ge=1)
    """Different runs that a document must have in common with one set to be left out."""


# The key `decontaminate` of a stage, as its Config.external has it.
SETS = SourceBlock(
    "decontaminate.sets",
    lambda config: config.decontaminate.sets if config.decontaminate else {},
    prefix="decontaminate.",
    drop_key=False,
)


@dataclass(frozen=True)
class Runs:
    """Runs of tokens of all sets, sorted by hash."""

    hash: "np.ndarray"  # uint64 [G]
    place: "np.ndarray"  # int64 [G]: number of the set << 32 | number of the item
    lengths: "np.ndarray"  # int64: those of items that are shorter than a run
    filter: "np.ndarray"  # bool [2**24]: whether a hash begins with these bits


def build(wanted: Decontaminate) -> tuple[Runs, dict[str, dict[str, int]]]:
    """The runs of all sets, and of each set its items, those without text, its runs, and the items that are too
    short to be looked for."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import normalise, tokens

    hashes, places, report, lengths = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], {}, set()
    for number, (name, source) in enumerate(wanted.sets.items()):
        texts, bad = [], 0
        for record in read(source, name, "decontaminate.sets", needed_fields(source)):
            if (
                isinstance(record, Bad) and record.reason == REPEATED
            ):  # a whole file that nothing would be compared with
                raise UserError(f"decontaminate.sets.{name}: {record.place}: {record.reason} ({record.raw})")
            try:
                texts.append(normalise(text_of(source, record)) if not isinstance(record, Bad) else "")
            except MissingField:
                texts.append("")
            bad += not texts[-1]
        if not len(texts) - bad:
            raise UserError(
                f"decontaminate.sets.{name}: none of its {many(len(texts), 'record')} has text; look at its `text` and"
                " `records`"
            )
        report[name] = {"items": len(texts), "bad": bad, "runs": 0, "too_short": 0}
        for begin in range(0, len(texts), 256):
            batch = tokens(texts[begin : begin + 256])
            short = np.diff(batch.starts)
            owner, hashed = _runs(batch, wanted, None)
            # An item without a run of its own is looked for as a whole, if it is long enough to be no accident.
            whole = np.flatnonzero((np.bincount(owner, minlength=len(short)) == 0) & (short >= SHORTEST))
            report[name]["too_short"] += int((short < SHORTEST).sum())
            owner, hashed = np.concatenate((owner, whole)), np.concatenate((hashed, _whole(batch, whole)))
            hashes.append(hashed)
            places.append((number << 32) + begin + owner)
            report[name]["runs"] += len(hashed)
            lengths.update(short[whole].tolist())
    hashed, place = np.concatenate(hashes), np.concatenate(places).astype(np.int64)
    order = np.argsort(hashed, kind="stable")
    return _opened(hashed[order], place[order], np.array(sorted(lengths), np.int64)), report


def _opened(hashed: "np.ndarray", place: "np.ndarray", lengths: "np.ndarray") -> Runs:
    import numpy as np

    known = np.zeros(1 << FILTER_BITS, bool)
    known[hashed >> np.uint64(64 - FILTER_BITS)] = True
    return Runs(hashed, place, lengths, known)


def save(runs: Runs, path: Path) -> None:
    """For other processes."""
    import numpy as np

    header = np.array([len(runs.hash), len(runs.lengths)], np.int64)
    write_atomic(path, b"".join(part.tobytes() for part in (header, runs.lengths, runs.hash, runs.place)))


@functools.lru_cache(2)
def load(path: Path) -> Runs:
    import numpy as np

    raw = path.read_bytes()
    number, several = np.frombuffer(raw, np.int64, 2).tolist()
    lengths = np.frombuffer(raw, np.int64, several, 16)
    hashed = np.frombuffer(raw, np.uint64, number, 16 + 8 * several)
    return _opened(hashed, np.frombuffer(raw, np.int64, number, 16 + 8 * (several + number)), lengths)


def matches(batch, runs: Runs, wanted: Decontaminate) -> list[tuple[str, list[int]] | None]:
    """For each text of hashed tokens (text.Tokens): the set that it has most runs in common with, and the numbers of
    its items; None with fewer than `min_hits`."""
    import numpy as np

    owner, hashed = _runs(batch, wanted, runs)
    known = runs.filter[hashed >> np.uint64(64 - FILTER_BITS)]
    owner, hashed = owner[known], hashed[known]
    low, high = np.searchsorted(runs.hash, hashed), np.searchsorted(runs.hash, hashed, "right")
    owner, hashed, low, high = (values[high > low] for values in (owner, hashed, low, high))
    found: list[tuple[str, list[int]] | None] = [None] * (len(batch.starts) - 1)
    names = list(wanted.sets)
    for text in np.unique(owner).tolist():
        mine = owner == text
        hits: dict[int, set] = {}
        items: dict[int, set] = {}
        for value, begin, end in zip(hashed[mine].tolist(), low[mine].tolist(), high[mine].tolist(), strict=True):
            for place in runs.place[begin:end].tolist():
                hits.setdefault(place >> 32, set()).add(value)
                items.setdefault(place >> 32, set()).add(place & 0xFFFFFFFF)
        most = max(hits, key=lambda number: (len(hits[number]), -number))
        if len(hits[most]) >= wanted.min_hits:
            found[text] = (names[most], sorted(items[most]))
    return found


def _runs(batch, wanted: Decontaminate, runs: Runs | None) -> tuple["np.ndarray", "np.ndarray"]:
    """(text, hash) of all runs of a batch; also those of the lengths of short items, if `runs` has some."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import windows

    owner = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
    singles = np.concatenate(([0], np.cumsum(batch.cjk)))
    found = []
    for length in sorted({wanted.words, wanted.characters, *(runs.lengths.tolist() if runs is not None else [])}):
        hashed, valid = windows(batch.hashes, batch.starts, length)
        at = np.flatnonzero(valid)
        chinese = 2 * (singles[at + length] - singles[at]) > length
        right = ~chinese & (length == wanted.words) | chinese & (length == wanted.characters)
        if runs is not None and length in runs.lengths:
            right[:] = True
        found.append((owner[at[right]], hashed[at[right]] ^ np.uint64(length)))
    return np.concatenate([owner for owner, _ in found]), np.concatenate([hashed for _, hashed in found])


def _whole(batch, texts: "np.ndarray") -> "np.ndarray":
    """Hash of all tokens of some texts, the same as that of a run of so many."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import windows

    found = np.zeros(len(texts), np.uint64)
    for i, text in enumerate(texts.tolist()):
        length = int(batch.starts[text + 1] - batch.starts[text])
        mine = batch.hashes[batch.starts[text] : batch.starts[text + 1]]
        found[i] = windows(mine, np.array([0, length]), length)[0][0] ^ np.uint64(length)
    return found


def contaminated(texts: Iterable[str], wanted: Decontaminate) -> tuple[list[str | None], dict[str, dict[str, int]]]:
    """The set that each text has runs in common with, or None; and the report of `build` with `documents` and
    `items_found` of each set, as clean's report has it."""
    from pipeline.data.cleaning.text_arrays import normalise, tokens

    (runs, report), found, texts = build(wanted), [], [normalise(text) for text in texts]
    items: dict[str, set[int]] = {name: set() for name in report}
    for begin in range(0, len(texts), 256):
        for match in matches(tokens(texts[begin : begin + 256]), runs, wanted):
            found.append(match and match[0])
            if match:
                items[match[0]].update(match[1])
    return found, {
        name: {**entry, "documents": found.count(name), "items_found": len(items[name])}
        for name, entry in report.items()
    }
