"""Parquet files: only the needed columns are read, and odd schemas cost nothing else."""

import subprocess
import sys

import pyarrow
import pyarrow.parquet

from pipeline.data.sources.byte_ranges import cut_source, read_piece
from pipeline.data.sources.csv_files import REPEATED
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import parse, read
from pipeline.data.sources.sources import Source, needed_fields

NUMBER = 6


def write(path, columns: dict, **options) -> str:
    text = {"text": [f"line {i} 第{i}行" for i in range(NUMBER)]}
    pyarrow.parquet.write_table(pyarrow.table(text | columns), path, **options)
    return str(path)


def test_only_columns_that_are_asked_for_are_decoded(tmp_path):
    """correctness 25: a damaged page of another column is not seen, and one of its own costs its row group."""
    path = tmp_path / "a.parquet"
    write(path, {"other": [b"x" * 5000] * NUMBER, "meta": [{"url": "u", "n": 1}] * NUMBER}, compression="none")
    column = pyarrow.parquet.read_metadata(path).row_group(0).column(1)
    assert column.path_in_schema == "other"
    raw = bytearray(path.read_bytes())
    raw[column.data_page_offset : column.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(raw)
    source = Source(path=str(path), text="{text}{meta.url}", where={"meta.n": 1})
    needed = needed_fields(source)
    for size in (1, 1 << 20):  # by the process that cuts, and by a worker
        found = [
            item
            for piece in cut_source(source, "x", size, needed)
            for chunk in read_piece(piece, source, "x", needed)[0]
            for item in parse(chunk)
        ]
        assert [item.fields["meta"]["url"] for item in found] == ["u"] * NUMBER
    assert [item.reason for item in read(source, "x")] == ["damaged parquet data"]


def test_all_columns_are_read_where_one_is_missing_so_that_they_can_be_named(tmp_path):
    path = write(tmp_path / "a.parquet", {"body": ["b"] * NUMBER})
    source = Source(path=path, text="title")
    assert [list(item.fields) for item in read(source, "x", needed=needed_fields(source))] == [
        ["text", "body"]
    ] * NUMBER
    source = Source(path=path, text="nothing but this")
    assert len(list(read(source, "x", needed=frozenset()))) == NUMBER  # rows, of no column


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    """correctness 13: as in csv, the file is one bad record; columns whose names differ in case are two columns."""
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    source = Source(path=str(path))
    for needed in (None, needed_fields(source), frozenset({"other"})):
        assert list(read(source, "x", needed=needed)) == [Bad("a.parquet:1", REPEATED, "'text': text, text")]
    pyarrow.parquet.write_table(table.rename_columns(["text", "Text"]), path)
    assert [item.fields for item in read(source, "x")] == [{"text": "a", "Text": "b"}]
    assert [item.fields for item in read(source, "x", needed=needed_fields(source))] == [{"text": "a"}]


def test_a_footer_that_ends_the_process_when_it_is_asked_for_a_column(tmp_path):
    """correctness 29: pyarrow 26 ends the process (std::terminate) where levels of one column do not fit their number,
    as soon as anybody asks the metadata for this column."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", "b"], "none": pyarrow.nulls(2, pyarrow.int32())})
    pyarrow.parquet.write_table(table, path)
    raw = path.read_bytes()
    optional, unknown = b"\x25\x02\x18\x04none", b"\x25\x22\x18\x04none"  # field 3 of a SchemaElement, and its name
    assert raw.count(optional) == 1
    path.write_bytes(raw.replace(optional, unknown))
    program = (
        "from pipeline.data.sources.records import read\nfrom pipeline.data.sources.sources import Source, needed_fields\n"
        f"source = Source(path={str(path)!r})\n"
        "print(len(list(read(source, 'x', needed=needed_fields(source)))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) >= 1, done.stderr[-2000:]
