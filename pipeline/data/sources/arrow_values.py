"""Arrow's values as Python's. Arrow holds values that Python has no type for (nanoseconds, the year 0 or 12000, time
zones that this machine does not know): they cost the record only if somebody asks for them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.sources.formats import EXCERPT, Bad, Chunk
from pipeline.data.sources.templates import look_up


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in a record for a value that has no form in Python."""

    type: str
    raw: str
    """The number that Arrow stores, so that records that differ in it have different ids."""
    why: str

    def __str__(self) -> str:
        return f"{self.type} {self.raw}"


@contextmanager
def opened_table(path: Path) -> Iterator:
    """A pyarrow.parquet.ParquetFile. By bytes, because pyarrow takes names that are not UTF-8 in no other way."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.OSFile(os.fsencode(path)) as raw, pyarrow.parquet.ParquetFile(raw) as opened:
        yield opened


def damage() -> tuple[type[Exception], ...]:
    """What Arrow raises for a file that is damaged."""
    import pyarrow

    return pyarrow.ArrowException, OSError, UnicodeDecodeError  # the last: a column's name


def repeated(names: list[str]) -> str | None:
    """The first name that stands there twice. Columns without a name may be many: nothing can ask for them."""
    return next((name for place, name in enumerate(names) if name.strip() and name in names[:place]), None)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:EXCERPT] or type(error).__name__


def rows(chunk: Chunk) -> Iterator[tuple[int, dict | Bad]]:
    """(row, record) of a chunk of kind `table`. Bad is a record with text that is not UTF-8, or in which a field of
    `chunk.asked` holds what Python cannot hold."""
    table = _in_microseconds(chunk.data)
    try:
        yield from enumerate(table.to_pylist(), chunk.first)
        return
    except MemoryError:
        raise
    except Exception:  # ValueError, OverflowError, Arrow's and those of the time zones' library, by type and value
        columns = [_values(column) for column in table.columns]
    for row in range(table.num_rows):
        number = chunk.first + row
        record = {name: values[row] for name, values in zip(table.column_names, columns, strict=True)}
        yield number, _judged(record, f"{chunk.file}:{number}", chunk.asked or ())


def _values(column) -> list:
    """The values of a column; Unreadable for one that has no form in Python, UnicodeDecodeError for damaged text."""
    try:
        return column.to_pylist()
    except MemoryError:
        raise
    except Exception:  # as above
        return [_value(scalar) for scalar in column]


def _value(scalar) -> Any:
    """A value with what is unreadable in it replaced, however deep it is."""
    import pyarrow

    try:
        return scalar.as_py()
    except MemoryError:
        raise
    except UnicodeDecodeError as error:
        return error
    except Exception as error:  # as above
        kind = scalar.type
        if pyarrow.types.is_struct(kind) and not repeated([field.name for field in kind]):
            return {name: _value(part) for name, part in scalar.items()}
        if isinstance(scalar, pyarrow.ListScalar) and not pyarrow.types.is_map(kind):
            return [_value(item) for item in scalar.values]
        raw = str(scalar.value) if pyarrow.types.is_temporal(kind) else ""
        return Unreadable(str(kind), raw, first_line(error))


def _judged(record: dict, place: str, asked) -> dict | Bad:
    for error in _found(record, UnicodeDecodeError):
        return Bad(place, "invalid UTF-8", error.object[:EXCERPT].decode(errors="backslashreplace"))
    for field in sorted(asked):
        try:
            value = look_up(record, field)
        except KeyError:
            continue
        for wrong in _found(value, Unreadable):
            return Bad(place, "value that cannot be read", f"{field}: {wrong} ({wrong.why})"[:EXCERPT])
    return record


def _found(value: Any, kind: type) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _found(item, kind)
    elif isinstance(value, list):
        for item in value:
            yield from _found(item, kind)


def _in_microseconds(table):
    """What has nanoseconds, without them: Python's types have none, and pyarrow would make it pandas's types where
    pandas is installed, and an error elsewhere."""
    import pyarrow

    for at, field in enumerate(table.schema):
        fits = _without_nanoseconds(field.type)
        if fits != field.type:
            try:
                table = table.set_column(at, field.name, table.column(at).cast(fits, safe=False))
            except pyarrow.ArrowNotImplementedError:
                continue  # some nested types; _values takes such a value alone
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
