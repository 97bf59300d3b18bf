"""Pieces of files that workers open themselves hold the same records, at the same places, as reading from the first
byte to the last."""

import errno
import gzip
import io
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.data.cleaning import unit_files, work_units
from pipeline.data.sources import decompress, formats
from pipeline.data.sources.byte_ranges import Range, cut_source, read_piece
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import Record, parse
from pipeline.data.sources.sources import Source, chunks

SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
PIECES = [
    b'{"text": "a"}',
    b'{"text": "' + b"x" * 60 + b'"}',
    "中".encode(),
    "中".encode("gbk"),
    b"\xb46",  # half of four bytes of gb18030
    b"\x8f",  # the first of three bytes of euc_jp
    b"\xa4\xd4",  # a quarter of eight bytes of euc_kr
    b"\n",
    b"\r\n",
    b"\n\n",
    b" ",
    b"\n \t\r\n",
    b"\n" + b" " * 300 + b"\n",
    b"\xff",
    b"\x81",
    b"\xef\xbb\xbf",
    b"y" * 40,
]


def serial(source: Source, size: int = 1 << 30) -> list:
    return [item for chunk in chunks(source, "x", size) for item in parse(chunk)]


def ranged(source: Source, size: int) -> list:
    """As the stage does it: unit by unit, with the lines of the units before added."""
    found, before = [], 0
    for unit in work_units.cut_units(source, "x", size):
        items, lines = [], 0
        for piece in unit:
            assert isinstance(piece, Range), "data were read to be sent"
            loaded, number = read_piece(piece, source, "x")
            items, lines = items + [item for chunk in loaded for item in parse(chunk)], lines + number
        before = before if unit[0].continued else 0
        if items:
            places = unit_files.with_file_lines(pyarrow.table({"place": [item.place for item in items]}), before)
            for item, place in zip(items, places["place"].to_pylist(), strict=True):
                object.__setattr__(item, "place", place)
        found, before = found + items, before + lines
    return found


@settings(max_examples=300, **SETTINGS)
@given(
    data=st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join),
    size=st.integers(1, 80),
    kind=st.sampled_from([("a.jsonl", {}), ("a.txt", {"sample_by": "line"}), ("a.txt", {"sample_by": "paragraph"})]),
    encoding=st.sampled_from([None, "gbk", "latin-1", "gb18030", "euc_jp", "euc_kr"]),
    start=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_ranges_hold_what_reading_in_one_go_finds(tmp_path, monkeypatch, data, size, kind, encoding, start):
    name, keys = kind
    # so that many lines are too long; white space around a paragraph is not counted alike by all
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 1 << 26 if keys.get("sample_by") == "paragraph" else 64)
    monkeypatch.setattr(formats, "EXCERPT", 20)
    (tmp_path / name).write_bytes(start + (data or b"h"))  # an empty file is refused
    source = Source(path=str(tmp_path / name), encoding=encoding, **keys)
    whole = serial(source)
    assert serial(source, size) == whole
    assert ranged(source, size) == whole


@pytest.mark.parametrize("by", ["line", "paragraph"])
@pytest.mark.parametrize(
    "encoding, half", [("gb18030", b"\xb46"), ("euc_jp", b"\x8f"), ("euc_jis_2004", b"\x8f"), ("euc_kr", b"\xa4\xd4")]
)
def test_half_a_character_costs_its_record_alone_wherever_a_range_ends(tmp_path, encoding, half, by):
    path = tmp_path / "a.txt"
    between = b"\n" if by == "line" else b"\n\n"
    path.write_bytes(between.join([b"ab" + half, b"ok", b"cd" + half, b"fine"]) + between)
    source = Source(path=str(path), sample_by=by, encoding=encoding)
    whole = serial(source)
    assert [isinstance(item, Bad) for item in whole] == [True, False, True, False]
    for size in range(1, 24):
        assert ranged(source, size) == serial(source, size) == whole, size


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_record_that_is_too_long_costs_itself_and_no_range_reads_on_behind_it(tmp_path, monkeypatch, start):
    cap = 1 << 12
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", cap)
    path = tmp_path / "a.txt"
    lines = [b"a", b"b" * (cap - 1), b"c" * cap, b"d" * (cap + 1), b"e", b"f" * (9 * cap), b"g"]
    path.write_bytes(start + b"\n".join(lines))
    for size in (100, 999, cap, 2 * cap, 1 << 30):
        for found in (
            serial(Source(path=str(path), sample_by="line"), size),
            ranged(Source(path=str(path), sample_by="line"), size),
        ):
            assert [item.place for item in found] == [f"a.txt:{number}" for number in range(1, 8)]
            assert [isinstance(item, Bad) for item in found] == [len(line) > cap for line in lines], size
    paragraphs = [b"a", b"b\n" * 99 + b"b", b"c\n" * cap + b"c", b"e", b"f" * (9 * cap), b"g\ng"]
    path.write_bytes(start + b"\n \n\n".join(paragraphs))
    places = [f"a.txt:{number}" for number in (1, 4, 106, 106 + cap + 3, 106 + cap + 6, 106 + cap + 9)]
    for size in (100, 999, cap, 2 * cap, 1 << 30):
        for found in (
            serial(Source(path=str(path), sample_by="paragraph"), size),
            ranged(Source(path=str(path), sample_by="paragraph"), size),
        ):
            assert [item.place for item in found] == places, size
            assert [isinstance(item, Bad) for item in found] == [len(text) > cap for text in paragraphs], size
    path.write_bytes(b"x" * (1 << 20))  # one line: all ranges but the first see that it does not begin in them
    source = Source(path=str(path), sample_by="line")
    read = [read_piece(piece, source, "x")[0] for piece in cut_source(source, "x", 10_000)]
    assert len(read) == 105 and len(read[0]) > 0 and not any(read[1:])


@settings(max_examples=60, **SETTINGS)
@given(
    rows=st.integers(1, 120),
    group=st.integers(1, 60),
    size=st.integers(1000, 30_000),
    page=st.sampled_from([300, 1 << 20]),
    damage=st.booleans(),
    last=st.booleans(),
    seed=st.randoms(),
)
def test_rows_of_parquet(tmp_path, rows, group, size, page, damage, last, seed):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{number} " + "字" * seed.randrange(200) for number in range(rows)]})
    pyarrow.parquet.write_table(
        table,
        path,
        row_group_size=group,
        compression="none",
        use_dictionary=False,
        write_batch_size=8,  # a page holds one batch at least, 1,024 rows by default
        data_page_size=page,
    )
    meta = pyarrow.parquet.read_metadata(path)
    lost = meta.num_row_groups // 2 if damage else -1
    if damage:
        raw = bytearray(path.read_bytes())
        column = meta.row_group(lost).column(0)
        at = column.data_page_offset
        if last:  # the header of the last page, behind rows that are whole
            at = raw.rindex(b"\x15\x00\x15", at, at + column.total_compressed_size)  # type: a data page; then its size
        raw[at : at + 30] = b"\xff" * 30
        path.write_bytes(raw)
    expected = []
    for number in range(rows):
        if number // group != lost:
            expected.append((f"a.parquet:{number + 1}", table["text"][number].as_py()))
        elif number % group == 0:
            lost_rows = f"rows {number + 1} to {min(number + group, rows)}"
            expected.append((f"a.parquet:{number + 1}", f"damaged parquet data: {lost_rows}"))
    source = Source(path=str(path))
    largest = max(meta.row_group(at).total_byte_size for at in range(meta.num_row_groups))
    whole = serial(source)
    for read in (serial, *([ranged] if largest <= 4 * size else [])):
        found = read(source, size)
        assert found == whole, read
        assert [
            (item.place, item.fields["text"] if isinstance(item, Record) else f"{item.reason}: {item.raw}")
            for item in found
        ] == expected, read
    if largest <= 4 * size and not damage:
        assert all(piece.weight <= 1.1 * size + 1000 for piece in cut_source(source, "x", size))


def test_large_row_groups_and_packed_files_are_read_by_who_cuts_them(tmp_path, monkeypatch):
    lines = [{"text": f"{number} " + "a" * 100} for number in range(5000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "a.parquet", use_dictionary=False)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    opened, decoded, opens = [], [], io.open
    iterate = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr("builtins.open", lambda path, *rest: (opened.append(Path(path).name), opens(path, *rest))[1])
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, *rest, **keys: (decoded.append(keys["row_groups"]), iterate(self, *rest, **keys))[1],
    )
    source = Source(path=str(tmp_path / "*"))
    cut = list(cut_source(source, "x", 10_000))
    found = [item.fields for piece in cut for chunk in read_piece(piece, source, "x")[0] for item in parse(chunk)]
    assert found == lines * 2 and len(cut) > 50
    assert not any(isinstance(piece, Range) for piece in cut)
    assert opened == ["b.jsonl.gz"]
    assert decoded == [[0], [0]]  # once to see that it is whole


@pytest.mark.parametrize("fill", [b"\xff", b"\x0a"])
def test_what_is_left_of_a_damaged_packed_file_does_not_depend_on_the_unit(tmp_path, monkeypatch, fill):
    monkeypatch.setattr(decompress, "SHORT", 1 << 16)  # of a shorter member nothing would be left
    draw = random.Random(0)
    text = b"".join(b"%d %s\n" % (number, bytes(draw.choices(b"abcdefghijklmnop", k=200))) for number in range(3000))
    packed = bytearray(gzip.compress(text))
    at = len(packed) * 3 // 4
    packed[at : at + 4000] = fill * 4000
    (tmp_path / "a.txt.gz").write_bytes(packed)
    source = Source(path=str(tmp_path / "a.txt.gz"), sample_by="line")
    whole = serial(source)
    assert len(whole) > 1000 and whole[-1].reason == "damaged .gz data" + decompress.UNVERIFIED
    for size in (1024, 8192, 1 << 16, 1 << 18):
        assert serial(source, size) == whole, size


def test_small_files_are_opened_by_who_parses_them(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    (tmp_path / "b.csv").write_text('text\n"a\nb"\nc\n')
    (tmp_path / "c.jsonl").write_text('{"text": "d"}\n\nnope\n')
    (tmp_path / "d.md").write_text("e")
    (tmp_path / "e.jsonl").write_text('{"text": "d"}\n' * 9)
    (tmp_path / "f.md").write_text("")
    source = Source(path=str(tmp_path / "*"))
    for size in (40, 100, 1 << 20):
        assert ranged(source, size) == serial(source)
    assert [item.place for item in serial(source)][:6] == [
        "a.json:1",
        "a.json:2",
        "b.csv:2",
        "b.csv:4",
        "c.jsonl:1",
        "c.jsonl:3",
    ]
    (tmp_path / "a.txt").write_text("一\n二\n", "utf-16")  # its newlines are two bytes
    source = Source(path=str(tmp_path / "a.txt"), encoding="utf-16", sample_by="line")
    assert not any(isinstance(piece, Range) for piece in cut_source(source, "x", 4)) and len(ranged(source, 100)) == 2


def test_a_file_that_a_worker_does_not_find_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "d"}\n' * 9)
    source = Source(path=str(path))
    (piece,) = cut_source(source, "x", 1 << 20)
    path.unlink()
    with pytest.raises(UserError, match=r"sources.x: .*a.jsonl does not exist on .* all machines share"):
        read_piece(piece, source, "x")


CHANGES = {
    "shorter": lambda path, raw: path.write_bytes(raw[: len(raw) // 3]),
    "longer": lambda path, raw: path.write_bytes(raw * 2),
    "as long": lambda path, raw: path.write_bytes(raw[::-1]),
    "junk": lambda path, raw: path.write_bytes(b"junk"),
    "empty": lambda path, raw: path.write_bytes(b""),
    "a folder": lambda path, raw: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.json", "a.jsonl.gz"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, name, change):
    path = tmp_path / name
    lines = b"".join(b'{"text": "%d %s"}\n' % (number, os.urandom(30).hex().encode()) for number in range(1000))
    if name == "a.parquet":
        table = pyarrow.table({"text": [line.decode() for line in lines.splitlines()]})
        pyarrow.parquet.write_table(table, path, row_group_size=100, use_dictionary=False)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else b"[{}]" if name == "a.json" else lines)
    os.utime(path, ns=(0, 0))  # the clock of a file system may be coarse
    source = Source(path=str(path), sample_by="line" if name == "a.txt" else "document")
    left = cut_source(source, "x", 8192)
    begun = [next(left)] if name == "a.jsonl.gz" else [*left]  # packed files are not opened again
    CHANGES[change](path, path.read_bytes())
    with pytest.raises(UserError, match=rf"^sources.x: {path} changed while the stage ran; .*run the same command"):
        for piece in [*begun, *left]:
            read_piece(piece, source, "x")


def test_a_source_that_a_worker_may_not_read_is_told_apart_from_the_output(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "d"}\n' * 9)
    source = Source(path=str(path))
    (piece,) = cut_source(source, "x", 1 << 20)

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))  # root, whom tests may run as, may read all

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(UserError, match=r"sources.x: .*a.jsonl cannot be read on .*: Permission denied; "):
        read_piece(piece, source, "x")
