"""Files called .json: one value of any size, several values one after the other, or JSON lines, which C4, Dolma and
CC-Net publish under that name. All are read an item at a time, so that a file may be larger than memory."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.sources.decompress import Gap
from pipeline.data.sources.formats import (
    EXCERPT,
    JSON,
    MAX_RECORD_BYTES,
    Bad,
    Chunk,
    RepeatedKey,
    TornFile,
    blocks_of,
    line_chunks,
    parts_of,
)
from pipeline.data.sources.text_encoding import encodes, shown

# One bad record, behind which any number of good ones may be lost.
BROKEN = "malformed JSON, the rest of the file is lost"
SAMPLE = 100  # lines that are looked at to tell JSON lines from other files
_SPACE = re.compile(r"[ \t\n\r]*")
_ANY = json.JSONDecoder(parse_int=len, parse_float=len)  # finds the end of a value that JSON refuses


def json_chunks(
    records: str,
    relative: str,
    path: Path,
    size: int,
    encoding: str | None = None,
    is_record: Callable[[dict], bool] = lambda value: False,
) -> Iterator[Chunk]:
    """Records of a file, by the path `records` to them. Without one, the items of the outermost list or block; and the
    value itself where it is an object that `is_record`, or one of several values."""
    if not records and holds_lines(path, encoding):
        yield from line_chunks(relative, path, "jsonl", size, encoding)
        return
    text = _Text(blocks_of(path, encoding=encoding), encoding)
    rows: list[tuple[int, Any]] = []
    number, begun = 1, 0  # of records that are there: a branch that lacks them has a place of its own
    for item in _found(text, records, relative, is_record):
        if isinstance(item, Bad) and not item.place:
            item = Bad(f"{relative}:{number}", item.reason, item.raw, item.lost)
            is_there = True
        else:
            is_there = not isinstance(item, Bad)
        rows.append((number, item))
        number += is_there
        if text.read - begun >= size:
            yield Chunk(relative, "values", rows[0][0], rows, text.read - begun)
            rows, begun = [], text.read
    if rows:
        yield Chunk(relative, "values", rows[0][0], rows, text.read - begun)


def holds_lines(path: Path, encoding: str | None) -> bool:
    """Whether a file holds JSON lines: most of its first lines are objects or strings by themselves, and there are two
    at least. One that is damaged makes no difference."""
    head, newlines, is_whole = bytearray(), 0, False
    parts = parts_of(path, encoding=encoding)
    while newlines < SAMPLE and (len(head) < 1 << 20 or not newlines) and len(head) <= MAX_RECORD_BYTES:
        part = next(parts, None)
        if part is None:
            is_whole = True
            break
        if isinstance(part, Gap):
            head += b"\n"  # what is torn is a damaged line
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
    if not is_whole:
        lines.pop()
    lines = [line for line in lines[:SAMPLE] if line.strip()]
    return len(lines) > 1 and 2 * sum(map(_is_record, lines)) > len(lines)


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), (dict, str))
    except (ValueError, RecursionError):
        return False


# ---- the text of a file ----------------------------------------------------------------------------------------------


class _Broken(Exception):
    """Text that is no JSON, from where nothing can be read any more: (reason, how it goes on)."""


class _Text:
    """The text of a file, of which a part is in memory."""

    def __init__(self, blocks: Iterator[bytes], encoding: str | None):
        self.blocks, self.encoding = blocks, encoding
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.held, self.at, self.begin = "", 0, 0  # `begin`: where the value begins that was taken last
        self.read = 0  # characters that were read and are done with
        self.ended, self.torn, self.lost = False, "", 0  # `lost`: bytes of the file, with `torn`

    def more(self) -> None:
        """Hold at least twice as much of what is not done with, or all that is left."""
        parts, wanted = [self.held[self.at :]], max(1 << 16, len(self.held) - self.at)
        self.read += self.at
        while wanted > 0 and not self.ended:
            try:
                block = next(self.blocks, None)
            except TornFile as error:
                block, self.torn, self.lost = None, str(error), error.lost
            self.ended = block is None
            parts.append(self.decoder.decode(block or b"", self.ended))
            wanted -= len(parts[-1])
        self.held, self.at = "".join(parts), 0

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.held, self.at).end()
            if self.at < len(self.held) or self.ended:
                return self.held[self.at : self.at + 1]
            self.more()

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self.broken()
        self.at += 1

    def value(self) -> Any:
        """The next value; Bad, without a place, for one that cannot be used but whose end is known."""
        self.peek()
        while True:
            value, end = self._parsed()
            # a number may go on behind what is held
            if end is not None and (end < len(self.held) or self.ended):
                break
            if self.ended:
                raise self.broken()
            if len(self.held) - self.at > MAX_RECORD_BYTES:
                raise _Broken(f"longer than {MAX_RECORD_BYTES >> 20} MiB", self.shown(self.at))
            self.more()
        taken, self.begin, self.at = self.held[self.at : end], self.at, end
        if isinstance(value, ValueError):
            why = str(value) if isinstance(value, RepeatedKey) else "malformed JSON"  # a number of 5,000 digits
            return Bad("", why, self.shown(self.begin))
        if not taken.isascii() and not encodes(taken):
            return Bad("", f"invalid {self.encoding or 'UTF-8'}", self.shown(self.begin))
        return value

    def _parsed(self) -> tuple[Any, int | None]:
        """The value that is held, and its end; the error, and the end of what it refuses; or no end."""
        try:
            return JSON.raw_decode(self.held, self.at)
        except (json.JSONDecodeError, RecursionError):
            return None, None
        except ValueError as error:
            try:
                return error, _ANY.raw_decode(self.held, self.at)[1]
            except (ValueError, RecursionError):
                return None, None

    def array(self) -> Iterator[int]:
        """Numbers of the items of a list; each must be taken before the next one is asked for."""
        yield from self._items("[", "]", lambda index: index)

    def object(self) -> Iterator[str]:
        """Keys of an object; the value of each must be taken before the next one is asked for."""
        yield from self._items("{", "}", lambda index: self._key())

    def _items(self, first: str, last: str, name: Callable[[int], Any]) -> Iterator[Any]:
        self.take(first)
        index = 0
        while self.peek() != last:
            if index:
                self.take(",")
            yield name(index)
            index += 1
        self.take(last)

    def _key(self) -> str:
        if self.peek() != '"':
            raise self.broken()
        key = self.value()
        key = self.shown(self.begin) if isinstance(key, Bad) else key
        self.take(":")
        return key

    def broken(self) -> _Broken:
        return _Broken(self.torn or BROKEN, self.shown(max(0, self.at - 40)))

    def shown(self, begin: int) -> str:
        return shown(self.held[begin : begin + EXCERPT].encode(errors="surrogateescape"), self.encoding)


# ---- a value -> its records ------------------------------------------------------------------------------------------


def _found(text: _Text, records: str, file: str, is_record: Callable[[dict], bool]) -> Iterator[Any]:
    number = 0
    try:
        while first := text.peek():
            number += 1
            if records or first != "{":
                yield from _streamed(text, steps_of(records), file)
            else:
                yield from _object(text, file, number, is_record)
        if text.torn:
            yield Bad("", text.torn, lost=text.lost)
    except _Broken as error:
        yield Bad("", *error.args, lost=text.lost)


def _object(text: _Text, file: str, number: int, is_record: Callable[[dict], bool]) -> Iterator[Any]:
    """The outermost object of a file: a record if it has the fields of one or is not alone, else a block of records.
    One that is longer than a record may be is a block."""
    try:
        value = text.value()
    except _Broken as error:
        if not error.args[0].startswith("longer"):
            raise
        yield from _streamed(text, ["*"], file)
        return
    if isinstance(value, Bad):  # item by item, because the fault may be in one of them
        text.at = text.begin
        yield from _streamed(text, ["*"], file)
    elif number > 1 or is_record(value) or text.peek():
        yield value
    else:
        yield from (item for _, item in _items(value))


def _streamed(text: _Text, steps: list[str], file: str, at: str = "") -> Iterator[Any]:
    """What lies at a path, in order, with one item of the first list or block on it in memory at a time."""
    first, (step, *rest) = text.peek(), steps
    if step == "*" and first == "[":
        for index in text.array():
            yield from _walk(text.value(), rest, file, f"{at}[{index}]" if rest else at)
    elif step == "*" and first == "{":
        for key in text.object():
            yield from _walk(_keyed(key, text.value()), rest, file, f"{at}[{key[:EXCERPT]}]" if rest else at)
    elif step != "*" and first == "{":
        keys = []
        for key in text.object():
            if key != step:
                text.value()
            elif key in keys:
                text.value()
                yield Bad(f"{file}:{at}" if at else file, "a key stands twice in a JSON object", key[:EXCERPT])
            elif rest:
                yield from _streamed(text, rest, file, f"{at}.{step}" if at else step)
            else:
                yield text.value()
            if len(keys) < 8 or key == step:
                keys.append(key)
        if step not in keys:
            yield _missing(dict.fromkeys(keys), step, file, at)
    else:
        yield from _walk(text.value(), steps, file, at)


def steps_of(path: str) -> list[str]:
    """`data[*].context[*]` -> data, *, context, *."""
    if path and not re.fullmatch(r"(\[\*\]|[^\[\].*]+)(\[\*\]|\.[^\[\].*]+)*", path):
        raise ValueError(
            f"records: {path!r} is no path; write names joined by dots and [*] for every item, such as"
            " data[*].context[*]"
        )
    return [step if step != "[*]" else "*" for step in re.findall(r"\[\*\]|[^\[\].]+", path)] or ["*"]


def _walk(node: Any, steps: list[str], file: str, at: str = "") -> Iterator[Any]:
    """What lies at a path, in order; Bad, with its place, for each branch that lacks a step of it."""
    if not steps or isinstance(node, Bad):
        yield node
    elif steps[0] == "*" and isinstance(node, (dict, list)):
        for key, item in _items(node):
            yield from _walk(item, steps[1:], file, f"{at}[{str(key)[:EXCERPT]}]" if steps[1:] else at)
    elif steps[0] != "*" and isinstance(node, dict) and steps[0] in node:
        yield from _walk(node[steps[0]], steps[1:], file, f"{at}.{steps[0]}" if at else steps[0])
    else:
        yield _missing(node, steps[0], file, at)


def _missing(node: Any, step: str, file: str, at: str) -> Bad:
    reason = "neither list nor block at [*] of records" if step == "*" else f"nothing at {step!r} of records"
    if isinstance(node, dict):
        holds = f"a block with the keys {', '.join(list(node)[:8])}"
    else:
        holds = "a list" if isinstance(node, list) else json.dumps(node, ensure_ascii=False)
    return Bad(f"{file}:{at}" if at else file, reason, holds[:EXCERPT])


def _items(node: dict | list) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, list):
        yield from enumerate(node)
    else:
        yield from ((key, _keyed(key, item)) for key, item in node.items())


def _keyed(key: str, item: Any) -> Any:
    """An item of a block, with its key."""
    if isinstance(item, dict):
        return {"key": key, **item}
    return {"key": key, "text": item} if isinstance(item, str) else item
