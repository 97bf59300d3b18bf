"""Pieces of files that workers open themselves hold the same records, at the same places, as reading from the first
byte to the last."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import formats, outcomes, units
from pipeline.data.ranges import Range, load, pieces
from pipeline.data.sources import Bad, Record, Source, chunks, parse
from pipeline.errors import UserError

SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
PIECES = [
    b'{"text": "a"}',
    b'{"text": "' + b"x" * 60 + b'"}',
    "中".encode(),
    "中".encode("gbk"),
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
    for unit in units.cut(source, "x", size):
        items, lines = [], 0
        for piece in unit:
            assert isinstance(piece, Range), "data were read to be sent"
            loaded, number = load(piece, source, "x")
            items, lines = items + [item for chunk in loaded for item in parse(chunk)], lines + number
        before = before if unit[0].continued else 0
        if items:
            places = outcomes.at_lines(pyarrow.table({"place": [item.place for item in items]}), before)
            for item, place in zip(items, places["place"].to_pylist(), strict=True):
                object.__setattr__(item, "place", place)
        found, before = found + items, before + lines
    return found


@settings(max_examples=300, **SETTINGS)
@given(
    data=st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join),
    size=st.integers(1, 80),
    kind=st.sampled_from([("a.jsonl", {}), ("a.txt", {"sample_by": "line"}), ("a.txt", {"sample_by": "paragraph"})]),
    encoding=st.sampled_from([None, "gbk", "latin-1"]),
)
def test_ranges_hold_what_reading_in_one_go_finds(tmp_path, monkeypatch, data, size, kind, encoding):
    name, keys = kind
    # so that many lines are too long; white space around a paragraph is not counted alike by all
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 1 << 26 if keys.get("sample_by") == "paragraph" else 64)
    monkeypatch.setattr(formats, "EXCERPT", 20)
    (tmp_path / name).write_bytes(b"h" + data)
    source = Source(path=str(tmp_path / name), encoding=encoding, **keys)
    whole = serial(source)
    assert serial(source, size) == whole
    assert ranged(source, size) == whole


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
    read = [load(piece, source, "x")[0] for piece in pieces(source, "x", 10_000)]
    assert len(read) == 105 and len(read[0]) > 0 and not any(read[1:])


@settings(max_examples=60, **SETTINGS)
@given(
    rows=st.integers(1, 120),
    group=st.integers(1, 60),
    size=st.integers(1000, 30_000),
    damage=st.booleans(),
    seed=st.randoms(),
)
def test_rows_of_parquet(tmp_path, rows, group, size, damage, seed):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{number} " + "字" * seed.randrange(200) for number in range(rows)]})
    pyarrow.parquet.write_table(
        table, path, row_group_size=group, write_page_checksum=True, compression="none", use_dictionary=False
    )
    meta = pyarrow.parquet.read_metadata(path)
    lost = meta.num_row_groups // 2 if damage else -1
    if damage:
        raw = bytearray(path.read_bytes())
        at = meta.row_group(lost).column(0).data_page_offset
        raw[at : at + 30] = b"\xff" * 30
        path.write_bytes(raw)
    expected = []
    for number in range(rows):
        if number // group != lost:
            expected.append((f"a.parquet:{number + 1}", table["text"][number].as_py()))
        elif number % group == 0:
            expected.append((f"a.parquet:{number + 1}", "damaged parquet data"))
    source = Source(path=str(path))
    largest = max(meta.row_group(at).total_byte_size for at in range(meta.num_row_groups))
    for read in (serial, *([ranged] if largest <= 4 * size else [])):
        found = read(source, size)
        assert [
            (item.place, item.fields["text"] if isinstance(item, Record) else item.reason) for item in found
        ] == expected, read
    if largest <= 4 * size and not damage:
        assert all(piece.weight <= 1.1 * size + 1000 for piece in pieces(source, "x", size))


def test_large_row_groups_and_packed_files_are_read_once(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a" * 100] * 5000}), tmp_path / "a.parquet", use_dictionary=False
    )
    source = Source(path=str(tmp_path / "a.parquet"))
    assert not any(isinstance(piece, Range) for piece in pieces(source, "x", 10_000))
    assert len(serial(source, 10_000)) == 5000


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
    assert not any(isinstance(piece, Range) for piece in pieces(source, "x", 4)) and len(ranged(source, 100)) == 2


def test_a_file_that_a_worker_does_not_find_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "d"}\n' * 9)
    source = Source(path=str(path))
    (piece,) = pieces(source, "x", 1 << 20)
    path.unlink()
    with pytest.raises(UserError, match=r"sources.x: .*a.jsonl is not there on .* all machines see"):
        load(piece, source, "x")
