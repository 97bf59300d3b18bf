"""Text of evaluation sets in training data, found by common runs of tokens: 13 words (GPT-3: Brown et al., 2020,
appendix C), or 20 characters where most tokens are Chinese or Japanese.

One rule for both, because a run is judged by its own tokens: 20 characters of Chinese are about 13 words. Used by clean
for pretraining text and by the finetuning stages for their conversations, pairs and prompts.
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
from pipeline.core.terminal import plural
from pipeline.data.sources.csv_files import REPEATED
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import Record, read, text_of
from pipeline.data.sources.sources import Source, needed_fields
from pipeline.data.sources.templates import MissingField

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

    from pipeline.data.cleaning.token_hashes import Tokens

SHORTEST = 8  # tokens of an item that is searched for as a whole because it is shorter than a run
FILTER_BITS = 24
BATCH = 256  # texts hashed at a time


class Decontaminate(Strict):
    """Drop documents that contain text of evaluation sets."""

    sets: dict[Name, Source] = Field(min_length=1)
    """Evaluation sets: where their records come from, with `text` as the field or template of what must not be
    trained on (question and answer, usually)."""
    words: int = Field(13, ge=SHORTEST)
    """Tokens of a common run."""
    characters: int = Field(20, ge=SHORTEST)
    """The same where more than half of them are CJK characters."""
    min_hits: int = Field(1, ge=1)
    """Different runs that a document must have in common with one set to be dropped."""


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


# ---- the runs of evaluation sets -------------------------------------------------------------------------------------


def build_runs(config: Decontaminate) -> tuple[Runs, dict[str, dict[str, int]]]:
    """The runs of all sets, and per set the numbers of its items, of those without text, of its runs, and of items
    that are too short to be searched for."""
    import numpy as np

    from pipeline.data.cleaning.token_hashes import tokens

    hashes, places, report, lengths = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], {}, set()
    for number, (name, source) in enumerate(config.sets.items()):
        texts = _item_texts(name, source)
        bad = texts.count("")
        counts = report[name] = {"items": len(texts), "bad": bad, "runs": 0, "too_short": 0}
        for begin in range(0, len(texts), BATCH):
            batch = tokens(texts[begin : begin + BATCH])
            size = np.diff(batch.starts)
            owner, run_hashes = _runs(batch, config, None)
            # An item without a run of its own is searched for as a whole, if it is long enough not to match by
            # accident.
            without_run = np.bincount(owner, minlength=len(size)) == 0
            whole = np.flatnonzero(without_run & (size >= SHORTEST))
            counts["too_short"] += int((size < SHORTEST).sum())
            owner = np.concatenate((owner, whole))
            run_hashes = np.concatenate((run_hashes, _whole_texts(batch, whole)))
            hashes.append(run_hashes)
            places.append((number << 32) + begin + owner)
            counts["runs"] += len(run_hashes)
            lengths.update(size[whole].tolist())
    all_hashes, all_places = np.concatenate(hashes), np.concatenate(places).astype(np.int64)
    order = np.argsort(all_hashes, kind="stable")
    return _with_filter(all_hashes[order], all_places[order], np.array(sorted(lengths), np.int64)), report


def _item_texts(name: str, source: Source) -> list[str]:
    """Normalised texts of the items of a set, "" for those without text. Raises UserError if all are."""
    from pipeline.data.cleaning.normal_form import normalise

    texts = []
    for item in read(source, name, "decontaminate.sets", needed_fields(source)):
        if isinstance(item, Bad) and item.reason == REPEATED:  # an entire file that nothing would be compared with
            raise UserError(f"decontaminate.sets.{name}: {item.place}: {item.reason} ({item.raw})")
        text = ""
        if isinstance(item, Record):
            try:
                text = normalise(text_of(source, item))
            except MissingField:
                text = ""  # an item without text: reported below if the whole set has none
        texts.append(text)
    if not any(texts):
        raise UserError(
            f"decontaminate.sets.{name}: none of its {plural(len(texts), 'record')} has text; look at its `text` and"
            " `records`"
        )
    return texts


def _with_filter(hashes: "np.ndarray", places: "np.ndarray", lengths: "np.ndarray") -> Runs:
    import numpy as np

    is_prefix = np.zeros(1 << FILTER_BITS, bool)
    is_prefix[hashes >> np.uint64(64 - FILTER_BITS)] = True
    return Runs(hashes, places, lengths, is_prefix)


def save_runs(runs: Runs, path: Path) -> None:
    """For other processes."""
    import numpy as np

    header = np.array([len(runs.hash), len(runs.lengths)], np.int64)
    write_atomic(path, b"".join(part.tobytes() for part in (header, runs.lengths, runs.hash, runs.place)))


@functools.lru_cache(2)
def load_runs(path: Path) -> Runs:
    import numpy as np

    raw = path.read_bytes()
    num_runs, num_lengths = np.frombuffer(raw, np.int64, 2).tolist()
    at = 16
    lengths = np.frombuffer(raw, np.int64, num_lengths, at)
    at += 8 * num_lengths
    hashes = np.frombuffer(raw, np.uint64, num_runs, at)
    at += 8 * num_runs
    return _with_filter(hashes, np.frombuffer(raw, np.int64, num_runs, at), lengths)


# ---- texts that have them --------------------------------------------------------------------------------------------


def find_matches(batch: "Tokens", runs: Runs, config: Decontaminate) -> list[tuple[str, list[int]] | None]:
    """Per text: the set that it has most runs in common with, and the numbers of its items; None with fewer than
    `min_hits`."""
    import numpy as np

    owner, hashes = _runs(batch, config, runs)
    may_match = runs.filter[hashes >> np.uint64(64 - FILTER_BITS)]
    owner, hashes = owner[may_match], hashes[may_match]
    low, high = np.searchsorted(runs.hash, hashes), np.searchsorted(runs.hash, hashes, "right")
    is_match = high > low
    owner, hashes, low, high = owner[is_match], hashes[is_match], low[is_match], high[is_match]
    matches: list[tuple[str, list[int]] | None] = [None] * (len(batch.starts) - 1)
    names = list(config.sets)
    for text in np.unique(owner).tolist():
        mine = owner == text
        hits: dict[int, set] = {}
        items: dict[int, set] = {}
        for value, begin, end in zip(hashes[mine].tolist(), low[mine].tolist(), high[mine].tolist(), strict=True):
            for place in runs.place[begin:end].tolist():
                number, item = place >> 32, place & 0xFFFFFFFF
                hits.setdefault(number, set()).add(value)
                items.setdefault(number, set()).add(item)
        most = max(hits, key=lambda number: (len(hits[number]), -number))
        if len(hits[most]) >= config.min_hits:
            matches[text] = (names[most], sorted(items[most]))
    return matches


def find_contaminated(
    texts: Iterable[str], config: Decontaminate
) -> tuple[list[str | None], dict[str, dict[str, int]]]:
    """Per text the set that it has runs in common with, or None; and the report of `build_runs` with `documents` and
    `items_found` per set, as in clean's report.json."""
    from pipeline.data.cleaning.normal_form import normalise
    from pipeline.data.cleaning.token_hashes import tokens

    runs, report = build_runs(config)
    texts = [normalise(text) for text in texts]
    sets: list[str | None] = []
    items: dict[str, set[int]] = {name: set() for name in report}
    for begin in range(0, len(texts), BATCH):
        for match in find_matches(tokens(texts[begin : begin + BATCH]), runs, config):
            sets.append(match[0] if match else None)
            if match:
                items[match[0]].update(match[1])
    for name, counts in report.items():
        counts["documents"] = sets.count(name)
        counts["items_found"] = len(items[name])
    return sets, report


# ---- runs of tokens --------------------------------------------------------------------------------------------------


def _runs(batch: "Tokens", config: Decontaminate, runs: Runs | None) -> tuple["np.ndarray", "np.ndarray"]:
    """(text, hash) of all runs of a batch, and of those that are as long as the short items of `runs`."""
    import numpy as np

    from pipeline.data.cleaning.token_hashes import windows

    owner = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
    num_cjk = np.concatenate(([0], np.cumsum(batch.cjk)))
    short_lengths = set(runs.lengths.tolist()) if runs is not None else set()
    owners, all_hashes = [], []
    for length in sorted({config.words, config.characters, *short_lengths}):
        hashes, is_complete = windows(batch.hashes, batch.starts, length)
        at = np.flatnonzero(is_complete)
        is_chinese = 2 * (num_cjk[at + length] - num_cjk[at]) > length
        is_run = np.where(is_chinese, length == config.characters, length == config.words)
        if length in short_lengths:
            is_run[:] = True
        owners.append(owner[at[is_run]])
        all_hashes.append(hashes[at[is_run]] ^ np.uint64(length))
    return np.concatenate(owners), np.concatenate(all_hashes)


def _whole_texts(batch: "Tokens", texts: "np.ndarray") -> "np.ndarray":
    """Hash of all tokens of some texts, the same as that of a run of this length."""
    import numpy as np

    from pipeline.data.cleaning.token_hashes import windows

    hashes = np.zeros(len(texts), np.uint64)
    for i, text in enumerate(texts.tolist()):
        text_tokens = batch.hashes[batch.starts[text] : batch.starts[text + 1]]
        length = len(text_tokens)
        hashes[i] = windows(text_tokens, np.array([0, length]), length)[0][0] ^ np.uint64(length)
    return hashes
