"""Files called .json: one value of any size, several values one after the other, or JSON lines, which C4, Dolma and
CC-Net publish under that name. All are read one item at a time, so that a file may be larger than memory."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.sources.decompress import Gap
from pipeline.data.sources.formats import EXCERPT, JSON, MAX_RECORD_BYTES, Bad, Chunk, RepeatedKey
from pipeline.data.sources.line_chunks import DamagedFile, line_chunks, read_blocks, read_parts
from pipeline.data.sources.text_encoding import is_encodable, printable

# One bad record, after which any number of good ones may be lost.
BROKEN = "malformed JSON, the rest of the file is lost"
SAMPLE = 100  # lines that decide whether a file holds JSON lines
LISTED_KEYS = 8  # keys of a block that a message lists
_SPACE = re.compile(r"[ \t\n\r]*")
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len)  # finds the end of a value that JSON refuses


def _never(value: dict) -> bool:
    return False


def json_chunks(
    records: str,
    relative: str,
    path: Path,
    size: int,
    encoding: str | None = None,
    is_record: Callable[[dict], bool] = _never,
) -> Iterator[Chunk]:
    """Records of a file, by the path `records` to them. Without a path, the items of the outermost list or block; or
    the outermost value itself if it is an object that `is_record`, or one of several values."""
    if not records and holds_lines(path, encoding):
        yield from line_chunks(relative, path, "jsonl", size, encoding)
        return
    text = _Text(read_blocks(path, encoding=encoding), encoding)
    rows: list[tuple[int, Any]] = []
    number, begin = 1, 0  # of existing records: a missing branch of the path has a place of its own
    for item in _all_records(text, records, relative, is_record):
        if not isinstance(item, Bad):
            rows.append((number, item))
            number += 1
        elif item.place:
            rows.append((number, item))
        else:
            rows.append((number, Bad(f"{relative}:{number}", item.reason, item.raw, item.lost)))
            number += 1
        if text.read - begin >= size:
            yield Chunk(relative, "values", rows[0][0], rows, text.read - begin)
            rows, begin = [], text.read
    if rows:
        yield Chunk(relative, "values", rows[0][0], rows, text.read - begin)


def holds_lines(path: Path, encoding: str | None) -> bool:
    """Whether a file holds JSON lines: it begins with at least two lines most of which are objects or strings. A
    damaged line makes no difference."""
    head, newlines, is_complete = bytearray(), 0, False
    parts = read_parts(path, encoding=encoding)
    while newlines < SAMPLE and (len(head) < 1 << 20 or not newlines) and len(head) <= MAX_RECORD_BYTES:
        part = next(parts, None)
        if part is None:
            is_complete = True
            break
        if isinstance(part, Gap):
            head += b"\n"  # the data around it is a damaged line
            continue
        if not head.strip():
            head = bytearray((head + part).removeprefix(codecs.BOM_UTF8).lstrip())
            if head[:1] == b"[":
                return False
            newlines = head.count(b"\n")
        else:
            head += part
            newlines += part.count(b"\n")
    lines = head.split(b"\n")
    if not is_complete:
        lines.pop()
    lines = [line for line in lines[:SAMPLE] if line.strip()]
    return len(lines) > 1 and 2 * sum(map(_is_value, lines)) > len(lines)


def _is_value(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), (dict, str))
    except (ValueError, RecursionError):
        return False


# ---- the text of a file ----------------------------------------------------------------------------------------------


class _Broken(Exception):
    """The rest of the text cannot be read: (reason, how it begins)."""


class _Text:
    """The text of a file, of which a part is in memory."""

    def __init__(self, blocks: Iterator[bytes], encoding: str | None):
        self.blocks, self.encoding = blocks, encoding
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.held, self.at = "", 0  # the part in memory, and where in it reading continues
        self.begin = 0  # where the last value begins
        self.read = 0  # characters before `held`
        self.ended, self.damage, self.lost = False, "", 0  # `lost`: bytes of the file after the damage

    def _read_more(self) -> None:
        """Hold at least twice as much as is not read yet, or all that is left."""
        parts, missing = [self.held[self.at :]], max(1 << 16, len(self.held) - self.at)
        self.read += self.at
        while missing > 0 and not self.ended:
            try:
                block = next(self.blocks, None)
            except DamagedFile as error:
                block, self.damage, self.lost = None, str(error), error.lost
            self.ended = block is None
            parts.append(self.decoder.decode(block or b"", self.ended))
            missing -= len(parts[-1])
        self.held, self.at = "".join(parts), 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.held, self.at).end()
            if self.at < len(self.held) or self.ended:
                return self.held[self.at : self.at + 1]
            self._read_more()

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self._broken()
        self.at += 1

    def value(self) -> Any:
        """The next value; Bad, without a place, for one that cannot be used but whose end is known."""
        self.peek()
        while True:
            value, end = self._parse()
            # a number may continue after what is held
            if end is not None and (end < len(self.held) or self.ended):
                break
            if self.ended:
                raise self._broken()
            if len(self.held) - self.at > MAX_RECORD_BYTES:
                raise _Broken(f"longer than {MAX_RECORD_BYTES >> 20} MiB", self.excerpt(self.at))
            self._read_more()
        written, self.begin, self.at = self.held[self.at : end], self.at, end
        if isinstance(value, RepeatedKey):
            return Bad("", str(value), self.excerpt(self.begin))
        if isinstance(value, ValueError):  # a number of 5,000 digits
            return Bad("", "malformed JSON", self.excerpt(self.begin))
        if not written.isascii() and not is_encodable(written):
            return Bad("", f"invalid {self.encoding or 'UTF-8'}", self.excerpt(self.begin))
        return value

    def _parse(self) -> tuple[Any, int | None]:
        """The next value and its end; the error and the end of the value that it refuses; or no end."""
        try:
            return JSON.raw_decode(self.held, self.at)
        except (json.JSONDecodeError, RecursionError):
            return None, None
        except ValueError as error:
            try:
                return error, _LENIENT.raw_decode(self.held, self.at)[1]
            except (ValueError, RecursionError):
                return None, None

    def array(self) -> Iterator[int]:
        """Indices of the items of a list; the value of each must be read before the next one is asked for."""
        yield from self._positions("[", "]")

    def object(self) -> Iterator[str]:
        """Keys of an object; the value of each must be read before the next one is asked for."""
        for _ in self._positions("{", "}"):
            yield self._key()

    def _positions(self, first: str, last: str) -> Iterator[int]:
        self.take(first)
        index = 0
        while self.peek() != last:
            if index:
                self.take(",")
            yield index
            index += 1
        self.take(last)

    def _key(self) -> str:
        if self.peek() != '"':
            raise self._broken()
        key = self.value()
        if isinstance(key, Bad):
            key = self.excerpt(self.begin)
        self.take(":")
        return key

    def _broken(self) -> _Broken:
        return _Broken(self.damage or BROKEN, self.excerpt(max(0, self.at - 40)))

    def excerpt(self, begin: int) -> str:
        return printable(self.held[begin : begin + EXCERPT].encode(errors="surrogateescape"), self.encoding)


# ---- a value -> its records ------------------------------------------------------------------------------------------


def _all_records(text: _Text, records: str, file: str, is_record: Callable[[dict], bool]) -> Iterator[Any]:
    number = 0
    try:
        while first := text.peek():
            number += 1
            if records or first != "{":
                yield from _stream(text, steps_of(records), file)
            else:
                yield from _object_records(text, file, number, is_record)
        if text.damage:
            yield Bad("", text.damage, lost=text.lost)
    except _Broken as error:
        yield Bad("", *error.args, lost=text.lost)


def _object_records(text: _Text, file: str, number: int, is_record: Callable[[dict], bool]) -> Iterator[Any]:
    """The outermost object of a file: a record if it has the fields of one or is not alone, otherwise a block of
    records. An object that is longer than a record may be is a block."""
    try:
        value = text.value()
    except _Broken as error:
        if not error.args[0].startswith("longer"):
            raise
        yield from _stream(text, ["*"], file)
        return
    if isinstance(value, Bad):  # item by item, because the fault may be in one of them
        text.at = text.begin
        yield from _stream(text, ["*"], file)
    elif number > 1 or is_record(value) or text.peek():
        yield value
    else:
        for _, item in _items(value):
            yield item


def _stream(text: _Text, steps: list[str], file: str, place: str = "") -> Iterator[Any]:
    """The values at a path, in order, with one item of the first list or block of the path in memory at a time."""
    first, (step, *rest) = text.peek(), steps
    if step == "*" and first == "[":
        for index in text.array():
            yield from _walk(text.value(), rest, file, f"{place}[{index}]" if rest else place)
    elif step == "*" and first == "{":
        for key in text.object():
            item = _with_key(key, text.value())
            yield from _walk(item, rest, file, f"{place}[{key[:EXCERPT]}]" if rest else place)
    elif step != "*" and first == "{":
        yield from _stream_member(text, step, rest, file, place)
    else:
        yield from _walk(text.value(), steps, file, place)


def _stream_member(text: _Text, step: str, rest: list[str], file: str, place: str) -> Iterator[Any]:
    """The member called `step` of the next object."""
    keys = []
    for key in text.object():
        if key != step:
            text.value()
        elif key in keys:
            text.value()
            yield Bad(f"{file}:{place}" if place else file, "a JSON object has the same key twice", key[:EXCERPT])
        elif rest:
            yield from _stream(text, rest, file, f"{place}.{step}" if place else step)
        else:
            yield text.value()
        if len(keys) < LISTED_KEYS or key == step:
            keys.append(key)
    if step not in keys:
        yield _missing(dict.fromkeys(keys), step, file, place)


def steps_of(path: str) -> list[str]:
    """`data[*].context[*]` -> data, *, context, *. Raises ValueError."""
    if path and not re.fullmatch(r"(\[\*\]|[^\[\].*]+)(\[\*\]|\.[^\[\].*]+)*", path):
        raise ValueError(
            f"records: {path!r} is not a path; write names joined by dots and [*] for every item, such as"
            " data[*].context[*]"
        )
    steps = re.findall(r"\[\*\]|[^\[\].]+", path)
    return ["*" if step == "[*]" else step for step in steps] or ["*"]


def _walk(node: Any, steps: list[str], file: str, place: str = "") -> Iterator[Any]:
    """The values at a path, in order; Bad, with its place, for each branch that lacks a step of it."""
    if not steps or isinstance(node, Bad):
        yield node
        return
    step, *rest = steps
    if step == "*" and isinstance(node, (dict, list)):
        for key, item in _items(node):
            yield from _walk(item, rest, file, f"{place}[{str(key)[:EXCERPT]}]" if rest else place)
    elif step != "*" and isinstance(node, dict) and step in node:
        yield from _walk(node[step], rest, file, f"{place}.{step}" if place else step)
    else:
        yield _missing(node, step, file, place)


def _missing(node: Any, step: str, file: str, place: str) -> Bad:
    reason = "neither list nor block at [*] of records" if step == "*" else f"nothing at {step!r} of records"
    if isinstance(node, dict):
        content = f"a block with the keys {', '.join(list(node)[:LISTED_KEYS])}"
    elif isinstance(node, list):
        content = "a list"
    else:
        content = json.dumps(node, ensure_ascii=False)
    return Bad(f"{file}:{place}" if place else file, reason, content[:EXCERPT])


def _items(node: dict | list) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, list):
        yield from enumerate(node)
        return
    for key, item in node.items():
        yield key, _with_key(key, item)


def _with_key(key: str, item: Any) -> Any:
    """An item of a block, with its key."""
    if isinstance(item, dict):
        return {"key": key, **item}
    if isinstance(item, str):
        return {"key": key, "text": item}
    return item
