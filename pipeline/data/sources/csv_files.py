"""csv and tsv files cut into chunks of rows. A quote that is never closed costs its own row and not those after it."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.sources.arrow_values import first_duplicate
from pipeline.data.sources.formats import EXCERPT, MAX_RECORD_BYTES, Bad, Chunk, bad_chunk
from pipeline.data.sources.line_chunks import line_chunks
from pipeline.data.sources.text_encoding import is_encodable, printable

# A file with a duplicate column name is one bad record, like a malformed json file: a record has one value per name,
# and nothing says which column is meant. Names that differ in case are different names.
REPEATED = "two columns of one name; rename one"

# Without this check a compressed file without its suffix would be a header line without rows: silently empty.
UNREADABLE = "a header line with control characters, as compressed data and UTF-16 have"
MALFORMED_HEADER = "malformed header line of a CSV file"
# IANA's tsv has neither quotes nor tabs or newlines within cells, but many programs write quotes as in csv where a cell
# needs them.
QUOTED = "a quoted cell of several lines in a tsv file; save it as csv"
WRONG_NUMBER = "wrong number of cells"
_DOUBLED = re.compile(r'"[^"]*(?:""[^"]*)+"')
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1f]")


def csv_chunks(
    columns: list[str], relative: str, path: Path, kind: str, size: int, encoding: str | None = None
) -> Iterator[Chunk]:
    """Rows of a file of kind csv or tsv. `columns`: names of the columns of a file without a header line."""
    lines = _Lines(relative, path, min(size, 1 << 20), encoding)
    header, weight = columns or None, 0
    rows: list[tuple[int, Any]] = []
    is_open = False  # whether the last cell of the row before is quoted and not closed
    for number, cells in _rows(lines, kind):
        place = f"{relative}:{number}"
        if header is None:
            bad = _bad_header(lines, number, cells)
            if bad:
                yield bad
                return
            header = cells
        elif isinstance(cells, csv.Error):
            rows.append((number, Bad(place, "malformed CSV", _excerpt(f"{cells}: {lines.broken_line}", encoding))))
            weight += len(lines.broken_line)
        else:
            if kind == "tsv":
                cells = list(map(_unquoted, cells))
            record = _record(header, cells, place, encoding)
            if is_open and isinstance(record, Bad) and record.reason == WRONG_NUMBER:  # the rest of the row before
                open_number, open_record = rows.pop()
                excerpt = _excerpt("\t".join(open_record.values()), encoding)
                rows.append((open_number, Bad(f"{relative}:{open_number}", QUOTED, excerpt)))
            rows.append((number, record))
            is_open = kind == "tsv" and isinstance(record, dict) and _opens_quote(cells[-1])
            weight += sum(map(len, cells))
            if weight >= size and not is_open:
                yield Chunk(relative, "values", rows[0][0], rows, weight)
                rows, weight = [], 0
    rows += lines.damage
    if rows:
        yield Chunk(relative, "values", rows[0][0], rows, weight)


class _Lines:
    """Lines of a file for csv.reader, which can read those of a broken row again. Each line is read about twice at
    most: where there is a second quote, the first one is closed."""

    def __init__(self, relative: str, path: Path, size: int, encoding: str | None):
        self.relative, self.path, self.encoding = relative, path, encoding
        self.fresh = self._read(size)
        self.again: deque[str] = deque()
        self.taken: list[str] = []  # lines of the current row
        self.broken_line = ""  # the first line of the last broken row
        self.damage: list[tuple[int, Bad]] = []  # gaps in a compressed file
        self.ends_in_gap = False

    def _read(self, size: int) -> Iterator[str]:
        for chunk in line_chunks(self.relative, self.path, "csv", size, self.encoding):
            self.ends_in_gap = chunk.kind == "values"
            if self.ends_in_gap:
                self.damage.extend(chunk.data)
                continue
            for line in chunk.data.removesuffix(b"\n").decode(errors="surrogateescape").split("\n"):
                yield line + "\n"

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.fresh)
        self.taken.append(line)
        return line

    def end_row(self) -> int:
        """Returns the number of lines of a row that was read."""
        number = len(self.taken)
        self.taken.clear()
        return number

    def end_broken_row(self) -> int:
        """The same for a row that csv.reader refused: it is one line, and the others are read again. At a gap the open
        cell is the file's last one, so all lines belong to it."""
        self.broken_line = self.taken[0]
        number = len(self.taken) if self.ends_in_gap else 1
        self.again.extendleft(reversed(self.taken[number:]))
        self.taken.clear()
        return number


def _rows(lines: _Lines, kind: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(line number, cells) of each row that is not blank."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    # RFC 4180 for csv; tsv (IANA text/tab-separated-values) has no quotes.
    if kind == "csv":
        reader = csv.reader(lines, strict=True)
    else:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    number = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            length = lines.end_broken_row()
            yield number, error
            number += length
            continue
        if cells is None:
            return
        length = lines.end_row()
        if cells and cells != [""]:
            yield number, cells
        number += length


def _bad_header(lines: _Lines, number: int, header: list[str] | csv.Error) -> Chunk | None:
    """The one bad record of a file whose rows cannot be read because of its header line. The line after a malformed
    header is a row, not the header."""
    if lines.damage and lines.damage[0][0] <= number:  # the header line is in the gap
        place, bad = lines.damage[0]
        return bad_chunk(lines.relative, place, bad.reason, bad.raw, lines.path.stat().st_size)
    joined = lines.broken_line if isinstance(header, csv.Error) else ",".join(header)
    if _CONTROL.search(joined):
        return bad_chunk(lines.relative, number, UNREADABLE, _excerpt(joined, lines.encoding))
    if isinstance(header, csv.Error):
        return bad_chunk(lines.relative, number, MALFORMED_HEADER, _excerpt(f"{header}: {joined}", lines.encoding))
    if duplicate := first_duplicate(header):
        return bad_chunk(lines.relative, number, REPEATED, _excerpt(f"{duplicate!r}: {joined}", lines.encoding))
    return None


def _record(header: list[str], cells: list[str], place: str, encoding: str | None) -> dict | Bad:
    if len(cells) != len(header):
        return Bad(place, WRONG_NUMBER, _excerpt(",".join(cells), encoding))
    if not all(cell.isascii() or is_encodable(cell) for cell in cells):
        return Bad(place, f"invalid {encoding or 'UTF-8'}", _excerpt(",".join(cells), encoding))
    return dict(zip(header, cells, strict=True))


def _opens_quote(cell: str) -> bool:
    return cell.startswith('"') and cell.count('"') % 2 == 1


def _unquoted(cell: str) -> str:
    """A cell of a tsv file without the quotes of csv, which doubled quotes within it show: `"say ""hi"" "`. Other
    quotes are its text."""
    return cell[1:-1].replace('""', '"') if len(cell) > 4 and _DOUBLED.fullmatch(cell) else cell


def _excerpt(text: str, encoding: str | None) -> str:
    return printable(text[:EXCERPT].encode(errors="surrogateescape"), encoding)
