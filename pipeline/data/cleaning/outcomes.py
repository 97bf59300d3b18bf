"""The outcome of cleaning one record, and the files that hold those of a unit, one row per record."""

import json
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from pipeline.data.cleaning import unit_files

Binary = bytes  # within the class `bytes` is a field


@dataclass(slots=True)
class Outcome:
    """What became of one record. The names of the fields are columns of the unit's file."""

    place: str
    """Where the record is. Where the unit is a part of a file, its line numbers count from the unit's beginning (see
    unit_files.with_file_lines)."""
    id: str | None = None
    status: str = "ok"
    """ok, not selected, bad or filtered."""
    reason: str | None = None
    excerpt: str | None = None
    text: str | None = None
    """The clean text, if the status is ok."""
    whole: str | None = None
    """The text of a document that is dropped, with keep_rejected: full."""
    bytes: int = 0
    """Size of the text as it was read."""
    size: int | None = None
    """Size of the clean text in bytes."""
    lost: int = 0
    """Bytes of the file that could not be decompressed."""
    hash: Binary | None = None
    """Of the clean text, 16 bytes."""
    address: Binary | None = None
    """Hash of the record's address, 16 bytes."""
    signature: Binary | None = None
    """For near duplicates."""
    counted: int = 0
    """1 if the record counts towards `limit`."""
    language: str | None = None
    """If languages are detected."""
    kind: int | None = None
    """Group of languages whose thresholds apply (language.GROUPS); of every document that could be read."""
    statistics: Binary | None = None
    """float32, one per name in steps.statistic_names; of every document that could be read."""
    failed: int | None = None
    """One bit per reason in steps.reasons; of every document that could be read."""
    changed: str | None = None
    """What was done to the text, and how often, as JSON."""
    matched: str | None = None
    """The evaluation set whose text it contains, and the numbers of its items, as JSON."""
    shown: int | None = None
    """Of a web page: characters that it shows."""
    extracted: int | None = None
    """Of a web page: characters of the text that was extracted."""

    def reject(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason


COLUMNS = tuple(Outcome.__slots__)


@dataclass(slots=True)
class Document:
    """A text on its way through the steps of cleaning, and its outcome so far."""

    outcome: Outcome
    text: str
    url: str | None = None  # for the block list
    changed: dict[str, int] = field(default_factory=dict)  # what was done to it, and how often


def _types() -> dict:
    """Arrow types of the columns that are not strings."""
    import pyarrow

    return {
        "bytes": pyarrow.int64(),
        "size": pyarrow.int64(),
        "lost": pyarrow.int64(),
        "hash": pyarrow.binary(16),
        "address": pyarrow.binary(16),
        "signature": pyarrow.binary(),
        "counted": pyarrow.int8(),
        "kind": pyarrow.int8(),
        "statistics": pyarrow.binary(),
        "failed": pyarrow.int64(),
        "shown": pyarrow.int64(),
        "extracted": pyarrow.int64(),
    }


def write(outcomes: list[Outcome], path: Path, is_continued: bool, lines: int) -> None:
    """`is_continued`: line numbers count from the unit's beginning; `lines`: how many lines end in the unit."""
    import pyarrow

    types, columns = _types(), {}
    for name in COLUMNS:
        values = list(map(attrgetter(name), outcomes))
        columns[name] = pyarrow.array(values, types.get(name, pyarrow.string()))
    table = pyarrow.table(columns)
    # Hashes are random bits; compressing the text by a third takes as long as hashing its tokens.
    uncompressed = ("hash", "address", "signature", "text")
    unit_files.write(
        table.replace_schema_metadata({"lines": json.dumps([is_continued, lines])}),
        path,
        compression={name: "none" if name in uncompressed else "lz4" for name in COLUMNS},
        use_dictionary=["status", "reason", "language"],
        write_statistics=False,
    )


def lines_of(outcomes) -> tuple[bool, int]:
    """`is_continued` and `lines` of a table that was read from such a file."""
    is_continued, lines = json.loads(outcomes.schema.metadata[b"lines"])
    return is_continued, lines


def count_records(path: Path) -> int:
    """Records of a unit that count towards `limit`. Raises CorruptFile."""
    import pyarrow.compute

    return pyarrow.compute.sum(unit_files.read(path, ["counted"])["counted"]).as_py() or 0
