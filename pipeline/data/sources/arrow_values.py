"""Arrow's values as Python's. Arrow holds values that Python has no type for (nanoseconds, the year 0 or 12000, time
zones unknown to this machine): a record with one is bad only if that field is needed.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.sources.formats import EXCERPT, Bad, Chunk
from pipeline.data.sources.templates import look_up


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In a record, in place of a value that Python cannot represent."""

    type: str
    raw: str
    """The number that Arrow stores, so that records that differ in it have different ids."""
    why: str

    def __str__(self) -> str:
        return f"{self.type} {self.raw}"


@contextmanager
def open_parquet(path: Path) -> Iterator:
    """A pyarrow.parquet.ParquetFile. The path is passed as bytes: pyarrow takes names that are not UTF-8 in no other
    way."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.OSFile(os.fsencode(path)) as raw, pyarrow.parquet.ParquetFile(raw) as opened:
        yield opened


def damage_errors() -> tuple[type[Exception], ...]:
    """The exceptions that Arrow raises for a damaged file."""
    import pyarrow

    return pyarrow.ArrowException, OSError, UnicodeDecodeError  # the last: a column's name


def first_duplicate(names: list[str]) -> str | None:
    """The first name that occurs twice. Columns without a name may be many, because no template can refer to them."""
    seen = set()
    for name in names:
        if name.strip() and name in seen:
            return name
        seen.add(name)
    return None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:EXCERPT] or type(error).__name__


def table_rows(chunk: Chunk) -> Iterator[tuple[int, dict | Bad]]:
    """(row, record) of a chunk of kind `table`. A record with text that is not UTF-8, or whose value of a field in
    `chunk.needed` Python cannot represent, is Bad."""
    table = _in_microseconds(chunk.data)
    try:
        yield from enumerate(table.to_pylist(), chunk.first)
        return
    except MemoryError:
        raise
    except Exception:  # ValueError, OverflowError, Arrow's and those of the time zone library, by type and value
        columns = [_column_values(column) for column in table.columns]
    for row in range(table.num_rows):
        number = chunk.first + row
        record = {name: values[row] for name, values in zip(table.column_names, columns, strict=True)}
        yield number, _record_or_bad(record, f"{chunk.file}:{number}", chunk.needed or ())


def _column_values(column) -> list:
    """The values of a column, with Unreadable or UnicodeDecodeError in place of those that cannot be read."""
    try:
        return column.to_pylist()
    except MemoryError:
        raise
    except Exception:  # as above
        return [_value(scalar) for scalar in column]


def _value(scalar) -> Any:
    """A value in which everything unreadable is replaced, at any depth."""
    import pyarrow

    try:
        return scalar.as_py()
    except MemoryError:
        raise
    except UnicodeDecodeError as error:
        return error
    except Exception as error:  # as above
        kind = scalar.type
        if pyarrow.types.is_struct(kind) and not first_duplicate([field.name for field in kind]):
            return {name: _value(part) for name, part in scalar.items()}
        if isinstance(scalar, pyarrow.ListScalar) and not pyarrow.types.is_map(kind):
            return [_value(item) for item in scalar.values]
        raw = str(scalar.value) if pyarrow.types.is_temporal(kind) else ""
        return Unreadable(str(kind), raw, first_line(error))


def _record_or_bad(record: dict, place: str, needed: Iterable[str]) -> dict | Bad:
    for error in _instances(record, UnicodeDecodeError):
        return Bad(place, "invalid UTF-8", error.object[:EXCERPT].decode(errors="backslashreplace"))
    for field in sorted(needed):
        try:
            value = look_up(record, field)
        except KeyError:
            continue
        for unreadable in _instances(value, Unreadable):
            excerpt = f"{field}: {unreadable} ({unreadable.why})"[:EXCERPT]
            return Bad(place, "value that cannot be read", excerpt)
    return record


def _instances(value: Any, kind: type) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _instances(item, kind)
    elif isinstance(value, list):
        for item in value:
            yield from _instances(item, kind)


def _in_microseconds(table):
    """The table with nanoseconds cut to microseconds: Python's types have no nanoseconds, and pyarrow would return
    pandas's types where pandas is installed, and an error elsewhere."""
    import pyarrow

    for index, field in enumerate(table.schema):
        type_ = _without_nanoseconds(field.type)
        if type_ != field.type:
            try:
                table = table.set_column(index, field.name, table.column(index).cast(type_, safe=False))
            except pyarrow.ArrowNotImplementedError:
                continue  # some nested types; _column_values handles their values one by one
    return table


def _without_nanoseconds(type_):
    import pyarrow
    from pyarrow import types

    if types.is_timestamp(type_) and type_.unit == "ns":
        return pyarrow.timestamp("us", type_.tz)
    if types.is_duration(type_) and type_.unit == "ns":
        return pyarrow.duration("us")
    if types.is_time64(type_) and type_.unit == "ns":
        return pyarrow.time64("us")
    if types.is_list(type_):
        return pyarrow.list_(_without_nanoseconds(type_.value_type))
    if types.is_large_list(type_):
        return pyarrow.large_list(_without_nanoseconds(type_.value_type))
    if types.is_struct(type_):
        return pyarrow.struct([field.with_type(_without_nanoseconds(field.type)) for field in type_])
    return type_
