"""Rows of token ids for sft, reward, dpo, kto and ppo: encoded once, read by every process; and which rows a step
takes."""

import itertools
import json
import shutil
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import distributed, faults
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.files import sync_tree, write_json
from pipeline.core.output import Output
from pipeline.core.seeds import derive
from pipeline.data.chat.record_accounting import Ledger
from pipeline.train import phases
from pipeline.train.finetune_config import FinetuneConfig
from pipeline.train.heartbeat import wait_for
from pipeline.train.record_order import Groups, MixedRecords, Records, grouped_by_length, permutation

SPLITS = ("train", "heldout")


def model_folder(artifact: Artifact) -> Path:
    """The folder of the model in a stage's output, or in a folder that was made elsewhere."""
    inner = artifact.path / "model"
    return inner if inner.is_dir() else artifact.path


# ---- rows on disk ----------------------------------------------------------------------------------------------------


class Ragged:
    """Rows of different lengths in one array: row i is values[starts[i]:starts[i + 1]]."""

    def __init__(self, values: np.ndarray, starts: np.ndarray):
        self.values, self.starts = values, starts

    @classmethod
    def of(cls, rows: list[list[int]], dtype) -> "Ragged":
        lengths = [len(row) for row in rows]
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        values = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)
        return cls(values, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


Arrays = dict[str, Ragged | np.ndarray]


def encode_once(
    output: Output, config: FinetuneConfig, encode: Callable[[], tuple[Arrays, dict]]
) -> tuple[Arrays, dict]:
    """(arrays, JSON) that `encode` returns. The main process calls it once and writes both to work/rows/; all processes
    read them from there, the arrays memory-mapped. Starts the process group.

    The group is started afterwards, so that a mistake in the data is one sentence of the main process, while the others
    still wait for the folder.
    """
    folder = output.path / "work" / "rows"
    if not output.is_main:
        wait_for(folder)
    elif not folder.exists():
        phases.enter("prepare")
        _write_rows(folder, *encode())
        output.note_time()
    phases.enter("start")
    distributed.setup(config)
    distributed.barrier()
    return _read_rows(folder)


def _write_rows(folder: Path, arrays: Arrays, extra: dict) -> None:
    temporary = folder.with_name("rows.tmp")
    if temporary.exists():  # left by a run that was killed while writing
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    for name, array in arrays.items():
        if isinstance(array, Ragged):
            np.save(temporary / f"{name}.values.npy", array.values)
            np.save(temporary / f"{name}.starts.npy", array.starts)
        else:
            np.save(temporary / f"{name}.npy", array)
    write_json(temporary / "extra.json", extra)
    sync_tree(temporary)
    faults.point("save")
    temporary.rename(folder)


def _read_rows(folder: Path) -> tuple[Arrays, dict]:
    files = {path.name.removesuffix(".npy"): path for path in sorted(folder.glob("*.npy"))}
    parts = {name: np.load(path, mmap_mode="r") for name, path in files.items()}
    arrays: Arrays = {}
    for name, array in parts.items():
        if name.endswith(".starts"):
            whole = name.removesuffix(".starts")
            arrays[whole] = Ragged(parts[f"{whole}.values"], array)
        elif not name.endswith(".values"):
            arrays[name] = array
    return arrays, json.loads((folder / "extra.json").read_text(encoding="utf-8"))


def source_numbers(rows: list, names: list[str]) -> np.ndarray:
    """Which of the sources `names` each row is from."""
    return np.array([names.index(row.source) for row in rows], np.int32)


def heldout_sets(config: FinetuneConfig, arrays: Arrays, count: int) -> dict[str, range]:
    """Which of `count` held-out rows are measured together: under the empty name those of the sources, or all if there
    are none; under its name each held-out file. Raises UserError for a file without rows."""
    if not config.evaluate:
        return {"": range(count)}
    source_of, first = arrays["heldout.source"], len(config.sources)
    of_sources = int(np.count_nonzero(source_of < first))
    sets = {"": range(of_sources or count)}
    for number, name in enumerate(config.evaluate, first):
        places = np.flatnonzero(source_of == number)
        if not len(places):
            raise UserError(f"stage {config.kind}: evaluate.{name}: none of its records is left (report.json says why)")
        sets[name] = range(int(places[0]), int(places[-1]) + 1)
    return sets


@dataclass(frozen=True)
class Counts:
    """Records of a stage. noun: what a record is, such as `pair`."""

    noun: str
    train: int
    heldout: int
    rejected: int


def report_records(ledger: Ledger, config: FinetuneConfig, output: Output, **more) -> None:
    """Write report.json: what became of each record, and `more`. Raises UserError if too few records are left or too
    many of a source are unusable."""
    ledger.check(config.holdout)
    path = output.path / "report.json"
    write_json(path, ledger.report() | more)
    ledger.judge(config.max_bad, path)


# ---- which rows a step takes -----------------------------------------------------------------------------------------


class ShuffledRows:
    """Row numbers in the order in which a run takes them: shuffled again in each epoch, as a function of (seed, epoch,
    index).

    per_epoch: rows of an epoch.
    """

    def __init__(self, seed: int, count: int, records: Records | None = None, groups: Groups | None = None):
        """records: of each epoch; by default each of `count` once. groups: rows of a batch are of like length."""
        self.seed, self.per_epoch = seed, count
        self.records, self.groups = records or Records(seed, count), groups
        self._epochs = _LastTwo(self._rows)

    def at(self, index: int) -> int:
        """The row at a global index of the run."""
        epoch, place = divmod(index, self.per_epoch)
        return int(self._epochs.of(epoch)[place])

    def taken(self, num_rows: int) -> np.ndarray:
        """How often each row is taken among the first `num_rows` of the run."""
        epochs, place = divmod(num_rows, self.per_epoch)
        return self.records.taken(epochs) + np.bincount(self._epochs.of(epochs)[:place], minlength=self.per_epoch)

    def _rows(self, epoch: int) -> Sequence[int]:
        rows = self.records.epoch(epoch)
        if self.groups is None:
            return rows
        return grouped_by_length(rows.tolist(), self.groups, epoch * self.per_epoch, self.seed, epoch)


class PackedRows:
    """Lists of conversations that share a row, in the order in which a run takes them: in each epoch the conversations
    are shuffled and packed again, and the rows shuffled, as a function of (seed, epoch, index).

    per_epoch: rows of an epoch; of the first one if epochs have different conversations.
    """

    def __init__(
        self,
        seed: int,
        lengths: np.ndarray,
        capacity: int | None,
        records: Records | None = None,
        groups: Groups | None = None,
    ):
        """capacity: tokens of a row; None for one conversation per row. records and groups as for ShuffledRows; groups
        without packing only."""
        self.seed, self.lengths, self.capacity = seed, lengths, capacity
        self.records, self.groups = records or Records(seed, len(lengths)), groups
        self._epochs = _LastTwo(self._rows)
        self.per_epoch = len(self._epochs.of(0))
        self._starts = [0, self.per_epoch]  # first row of each epoch, where epochs have different numbers of rows

    def at(self, index: int) -> list[int]:
        """The conversations of the row at a global index of the run."""
        epoch, place = self._place(index)
        return self._epochs.of(epoch)[place]

    def taken(self, num_rows: int) -> np.ndarray:
        """How often each conversation is taken in the first `num_rows` rows of the run."""
        epochs, place = self._place(num_rows)
        counts = self.records.taken(epochs)
        for row in self._epochs.of(epochs)[:place]:
            np.add.at(counts, row, 1)
        return counts

    def _place(self, index: int) -> tuple[int, int]:
        if not isinstance(self.records, MixedRecords) or self.capacity is None:
            return divmod(index, self.per_epoch)
        while self._starts[-1] <= index:
            self._starts.append(self._starts[-1] + len(self._epochs.of(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, index) - 1
        return epoch, index - self._starts[epoch]

    def _rows(self, epoch: int) -> list[list[int]]:
        packed = pack(self.lengths, self.capacity, self.records.epoch(epoch))
        order = permutation(derive(self.seed, "rows"), epoch, len(packed))
        rows = [packed[row] for row in order]
        if self.groups is None:
            return rows
        return grouped_by_length(rows, self.groups, epoch * self.records.count, self.seed, epoch)


class _LastTwo:
    """Rows of the two epochs that were used last: a step reaches into no more, unless epochs are shorter than steps."""

    def __init__(self, make: Callable[[int], Sequence]):
        self.make = make
        self.epochs: dict[int, Sequence] = {}

    def of(self, epoch: int) -> Sequence:
        if epoch not in self.epochs:
            if len(self.epochs) == 2:
                self.epochs.pop(min(self.epochs))
            self.epochs[epoch] = self.make(epoch)
        return self.epochs[epoch]


def pack(lengths: np.ndarray, capacity: int | None, order: np.ndarray) -> list[list[int]]:
    """The conversations of each row: as many as `best_fit` finds room for, or one each in `order` if there is no
    capacity."""
    if capacity is None:
        return [[int(conversation)] for conversation in order]
    return best_fit(lengths, capacity, order)


def best_fit(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[list[int]]:
    """Items into as few rows as best-fit decreasing finds: longest first, each into the fullest row that has room (Ding
    et al., 2024). `order` breaks ties.

    Within 11/9 of the fewest rows possible (Johnson, 1974); the number of rows does not depend on `order`. An item may
    be in `order` several times.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_by_room, sorted
    for item in order[np.argsort(-lengths[order], kind="stable")]:
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[place]
        rows[row].append(int(item))
        left = room - length
        if left not in rows_by_room:
            rows_by_room[left] = []
            insort(rooms, left)
        rows_by_room[left].append(row)
    return rows


def micro_batch_rows(config: FinetuneConfig, engine) -> int:
    """Rows that this process has in memory at a time."""
    return config.micro_batch or config.batch_size // engine.data_world


def heldout_share(count: int, config: FinetuneConfig, engine, name: str = "") -> list[np.ndarray]:
    """Held-out rows of this process, an array per micro-batch. name: of a held-out file. Raises UserError if there are
    fewer rows than processes."""
    if count < engine.data_world:
        more = f"give evaluate.{name} more records" if name else f"hold out more (holdout: {config.holdout})"
        raise UserError(
            f"stage {config.kind}: {count} held-out rows cannot be shared by {engine.data_world} processes; {more}"
        )
    mine = np.arange(engine.data_rank, count, engine.data_world)
    return chunks(mine, micro_batch_rows(config, engine))


def by_length(parts: list[list], length: Callable[[Any], int]) -> list[list]:
    """The rows of all parts, shortest first, in parts of the same sizes."""
    ordered = iter(sorted((row for part in parts for row in part), key=length))
    return [list(itertools.islice(ordered, len(part))) for part in parts]


def chunks(rows, size: int) -> list:
    """Slices of at most `size` rows, in order."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
