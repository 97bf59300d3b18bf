"""csv and tsv files: damage costs the row that contains it."""

import csv
import gzip
import hashlib
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.sources.csv_files import MALFORMED_HEADER, QUOTED, REPEATED, UNREADABLE, csv_chunks
from pipeline.data.sources.formats import Bad, values
from pipeline.data.sources.records import Record, read, text_of
from pipeline.data.sources.sources import Source


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def records(**keys) -> list:
    return list(read(Source(**keys), "x"))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["plain", '"open', '"shut"', 'in "side"']), min_size=1, max_size=12))
def test_a_quote_that_nobody_closes_costs_its_own_row(tmp_path, kinds):
    rows = [
        f"{kind} {number},{number}" if not kind.startswith('"shut') else f'"shut {number}",{number}'
        for number, kind in enumerate(kinds)
    ]
    found = records(path=write(tmp_path / "a.csv", ("text,n\n" + "\n".join(rows) + "\n").encode()))
    assert [item.place for item in found] == [f"a.csv:{number}" for number in range(2, len(rows) + 2)]
    assert [isinstance(item, Bad) for item in found] == [kind == '"open' for kind in kinds]


def test_the_open_quote_of_a_cut_table_is_one_bad_record(tmp_path):
    packed = gzip.compress(
        ('text\na\n"b\n' + "".join(hashlib.sha256(str(i).encode()).hexdigest() + "\n" for i in range(5000))).encode()
    )
    found = records(path=write(tmp_path / "a.csv.gz", packed[: len(packed) // 2]))
    assert [item.fields["text"] if isinstance(item, Record) else item.reason for item in found] == [
        "a",
        "malformed CSV",
        "truncated .gz data",
    ]


def test_columns_without_a_name_may_be_several_and_named_ones_not(tmp_path):
    """A spreadsheet's empty columns are nothing that a recipe could ask for."""
    path = write(tmp_path / "a.csv", b"text,,n,\na,,1,\n")
    assert [text_of(Source(path=path), item) for item in records(path=path)] == ["a"]
    path = write(tmp_path / "two.csv", b"\ntext,n,text\na,1,b\n")
    assert records(path=path) == [Bad("two.csv:2", REPEATED, "'text': text,n,text")]
    with pytest.raises(ValueError, match="columns: duplicate name 'a'; give each column its own name"):
        Source(path=path, columns=["a", "b", "a"])


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b"text\nhello\n", mtime=0),
        gzip.compress(b"text\nhello\n", mtime=0x0D41),  # a carriage return in what would be the header line
        gzip.compress(b"text\nhello\n", mtime=0x0A41),
        gzip.compress(b"text\nhello\n", mtime=0x41220A),  # a quote
        "text\nhello\n".encode("utf-16-le"),
    ],
    ids=["packed", "packed, carriage return", "packed, line feed", "packed, quote", "utf-16"],
)
def test_a_table_whose_header_is_no_text_is_one_bad_record(tmp_path, data):
    """correctness 20 and 29: a packed file without its suffix was a header line without rows, so nothing told of it."""
    (tmp_path / "a.csv").write_bytes(data)
    (tmp_path / "b.csv").write_text("text\nhello\n")
    found = list(read(Source(path=str(tmp_path / "*.csv")), "x"))
    assert [item.reason for item in found if isinstance(item, Bad)] == [UNREADABLE]
    assert [item.fields for item in found if isinstance(item, Record)] == [{"text": "hello"}]


def test_a_row_is_not_taken_for_a_malformed_header(tmp_path):
    """The columns would be named after a row, and that row lost."""
    path = write(tmp_path / "a.csv", b'"text"s,n\nhello,1\nworld,2\n')
    [bad] = records(path=path)
    assert (bad.place, bad.reason) == ("a.csv:1", MALFORMED_HEADER) and bad.raw.endswith('"text"s,n\n')


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_quotes_that_programs_write_into_tsv(tmp_path, size):
    """correctness 3 and 25: what pandas writes with sep=tab was kept with its doubled quotes, and a cell of several
    lines became a document of its first one. Quotes of plain tsv are text."""
    texts = ['He said "hi" there', "two\nlines", '"I know," he said.', '"Open quotation', "plain", '5" screen', '""']
    buffer = io.StringIO()
    rows = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    rows.writerows([["id", "text"], *enumerate(texts[:2])])
    buffer.write("".join(f"{number}\t{text}\n" for number, text in enumerate(texts[2:], 2)))
    path = write(tmp_path / "a.tsv", buffer.getvalue().encode())
    found = [item for chunk in csv_chunks([], "a.tsv", Path(path), "tsv", size) for _, item in values(chunk)]
    assert [item["text"] for item in found if isinstance(item, dict)] == [texts[0], *texts[2:]]
    assert [(item.place, item.reason) for item in found if isinstance(item, Bad)] == [
        ("a.tsv:3", QUOTED),
        ("a.tsv:4", "wrong number of cells"),
    ]
