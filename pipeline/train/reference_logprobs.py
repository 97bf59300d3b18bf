"""Log-probabilities of answers under the reference, the model that a run starts from: computed once, before the first
step, by the engine that will train, and kept for other runs of the same model.

    cache = Cache(output.folder.parent / "cache", {"weights": ..., "precision": ...})
    logps = reference_logprobs(engine, rows, pad_id, cache, output, "train")

The cache is a folder of small files that are never changed, below a name that is a hash of what the values depend on
besides the tokens. Each value is stored under a hash of its tokens, so another learning rate, another objective or a
changed record costs only the answers that are new. It may be deleted at any time: what is missing is computed again,
with the same bits, because the shape in which an answer is computed depends on its own length alone.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.core import distributed, faults
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.core.output import Output
from pipeline.core.terminal import plural, say
from pipeline.core.tracking import Progress
from pipeline.train.answer_rows import AnswerRow, answer_batch
from pipeline.train.finetune_data import chunks
from pipeline.train.loss_preference import answer_logprobs

FORMAT = 1  # of the files, and of how their values are computed
ENTRY = np.dtype([("key", "S16"), ("logp", "<f4")])
BATCH_TOKENS = 4096  # of a forward pass, padding included; rows that are longer have a pass of their own
BATCHES = 8  # forward passes whose values are written at a time


class Cache:
    """Values of one reference model. depends_on: what they depend on besides the tokens, as JSON."""

    def __init__(self, folder: Path, depends_on: dict):
        depends_on = {"format": FORMAT, **depends_on}
        text = json.dumps(depends_on, sort_keys=True)
        self.folder = folder / "reference-logprobs" / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.depends_on = depends_on

    def read(self) -> np.ndarray:
        """All values, sorted by key; each key once. Raises UserError for a damaged file."""
        parts = [np.zeros(0, ENTRY)]
        for path in sorted(self.folder.glob("*.npy")):
            try:
                part = np.load(path)
            except (ValueError, EOFError) as error:
                raise self._damaged(path, error) from None
            if part.dtype != ENTRY:
                raise self._damaged(path, f"its values are {part.dtype}")
            parts.append(part)
        entries = np.concatenate(parts)
        _, first = np.unique(entries["key"], return_index=True)
        return entries[first]

    def write(self, entries: np.ndarray) -> None:
        """Add values, as one new file or none."""
        if not (self.folder / "model.json").exists():
            write_json(self.folder / "model.json", self.depends_on)
        buffer = io.BytesIO()
        np.save(buffer, entries)
        name = hashlib.sha256(entries["key"].tobytes()).hexdigest()[:16]
        write_atomic(self.folder / f"{name}.npy", buffer.getvalue())

    def _damaged(self, path: Path, why) -> UserError:
        return UserError(f"{path}: is damaged ({why}); delete the folder {self.folder}, which is computed again")


def key_of(row: AnswerRow) -> bytes:
    """What an answer's value is stored under: 16 bytes."""
    hasher = hashlib.blake2b(row.start.to_bytes(8, "little"), digest_size=16)
    hasher.update(np.asarray(row.ids, np.int64).tobytes())
    return hasher.digest()


def padded_length(length: int, most: int) -> int:
    """The number of tokens, at most `most`, to which a row of `length` tokens is padded: the next multiple of 64 up to
    1,024, of 128 up to 2,048, of 256 up to 4,096, ..."""
    step = max(64, 1 << max((length - 1).bit_length() - 4, 0))
    return min(-(-length // step) * step, most)


def reference_logprobs(
    engine, rows: Sequence[AnswerRow], pad_id: int, cache: Cache, output: Output, what: str
) -> np.ndarray:
    """Log-probability of each row's answer, summed over its tokens, under the weights that the engine has now: [N],
    fp32. Equal on all processes. Collective. what: names the rows in the progress line.

    Values that are not in the cache are computed, and written as soon as BATCHES forward passes are done, so that a run
    that is killed computes nothing twice.
    """
    keys = np.array([key_of(row) for row in rows], "S16")
    missing = distributed.from_main(_missing(keys, cache, output.stage) if output.is_main else None)
    with Progress(f"{output.stage}: reference, {what}", len(missing), "answers", is_main=output.is_main) as bar:
        units = chunks(fixed_batches(rows, missing, engine.config.sequence_length), BATCHES)
        for units_of_all in chunks(units, engine.data_world):
            # In the last round there may be fewer units than processes: the others compute one and write none.
            is_mine = engine.data_rank < len(units_of_all)
            unit = units_of_all[engine.data_rank if is_mine else 0]
            entries = _compute(engine, rows, keys, unit, pad_id)
            if is_mine:
                cache.write(entries)
                faults.point("work")
                output.note_time()
            bar.update(sum(len(set(batch)) for unit in units_of_all for batch in unit))
    distributed.barrier()
    known = cache.read()
    places = np.searchsorted(known["key"], keys).clip(max=len(known) - 1)
    assert np.array_equal(known["key"][places], keys), f"{cache.folder} lost a value while it was read"
    return known["logp"][places]


def _missing(keys: np.ndarray, cache: Cache, stage: str) -> np.ndarray:
    """Rows whose values are not in the cache, one of those with equal tokens."""
    unique, first = np.unique(keys, return_index=True)
    missing = np.sort(first[~np.isin(unique, cache.read()["key"])])
    if len(missing) < len(unique):
        found = f"{len(unique) - len(missing):,} of {plural(len(unique), 'answer', ',')}"
        say(f"{stage}: the reference's log-probabilities of {found} are in {cache.folder}")
    return missing


def fixed_batches(rows: Sequence[AnswerRow], indices: np.ndarray, most: int) -> list[list[int]]:
    """Rows in forward passes, shortest first: those of one padded length together, always the same number of them. The
    last of a length is filled with copies of its last row, so that the shape that a row is computed in, and with it
    the last bits of its value, depends on its own length and not on other rows. most: tokens of the longest row."""
    by_length: dict[int, list[int]] = {}
    for index in indices.tolist():
        by_length.setdefault(padded_length(len(rows[index].ids), most), []).append(index)
    batches = []
    for length, members in sorted(by_length.items()):
        size = max(1, BATCH_TOKENS // length)
        for batch in chunks(members, size):
            batches.append(batch + batch[-1:] * (size - len(batch)))
    return batches


def _compute(engine, rows: Sequence[AnswerRow], keys: np.ndarray, unit: list[list[int]], pad_id: int) -> np.ndarray:
    batches = []
    for members in unit:
        batch_rows = [rows[index] for index in members]
        length = padded_length(len(batch_rows[0].ids), engine.config.sequence_length)
        batches.append(answer_batch(batch_rows, pad_id, length) | {"weight": 0.0})
    logps = engine.forward(batches, answer_logprobs)
    entries = np.zeros(sum(map(len, unit)), ENTRY)
    entries["key"] = keys[[index for members in unit for index in members]]
    entries["logp"] = np.concatenate([values.numpy() for values in logps])
    _, first = np.unique(entries["key"], return_index=True)
    return entries[first]
