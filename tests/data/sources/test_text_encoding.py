"""Sources in other encodings: the same records as from UTF-8, and bytes that stand for nothing cost their own record."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.core.fingerprint import ExternalContent
from pipeline.data.chat.chat_sources import ChatSource
from pipeline.data.chat.conversations import load_conversations
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import Record, parse
from pipeline.data.sources.source_checks import first_record
from pipeline.data.sources.sources import Source, chunks

ENCODINGS = ["gb18030", "gbk", "big5", "utf-16", "utf-16-be", "utf-32", "shift_jis", "euc_jp", "iso2022_jp", "hz"]
TEXTS = ["清水在山", 'tea, "green"', "一\n二", "山" * 300]  # in every one of these encodings


def write(path: Path, text: str, encoding: str) -> Path:
    path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(text.encode(encoding)))
    return path


def items(path: Path, size: int = 1 << 20, **keys) -> list:
    return [item for chunk in chunks(Source(path=str(path), **keys), "x", size) for item in parse(chunk)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_format_gives_the_records_of_utf_8(tmp_path, encoding):
    rows = [{"text": text, "number": str(number)} for number, text in enumerate(TEXTS * 20)]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["text", "number"])
    writer.writeheader()
    writer.writerows(rows)
    texts = {
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "b.jsonl.gz": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows),
        "a.json": json.dumps(rows, ensure_ascii=False),
        "a.csv": table.getvalue(),
        "a.tsv": "text\tnumber\n" + "清水\t1\n山\t2\n",
        "a.txt": "\n\n".join(TEXTS),
    }
    for name, text in texts.items():
        for by in ("document", "paragraph", "line") if name == "a.txt" else ("document",):
            expected = items(write(tmp_path / name, text, "utf-8"), sample_by=by)
            assert expected and all(isinstance(item, Record) for item in expected)
            write(tmp_path / name, text, encoding)
            for size in (7, 1 << 20):
                assert items(tmp_path / name, size, sample_by=by, encoding=encoding) == expected, (name, by, size)


PIECES = [
    "中".encode("gbk"),
    "é".encode("gb18030"),
    b"a",
    b"\n",
    b"\r\n",
    b"\x81",
    b"\xff",
    b"\x81\x30",
    b" ",
    b"\x84\x31\xa4",
    b"\xa4\xd4",
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join),
    size=st.integers(1, 40),
    encoding=st.sampled_from(["gb18030", "gbk", "big5", "shift_jis", "euc_kr", "ascii", "cp1252"]),
)
def test_a_line_is_bad_if_it_alone_is_not_in_the_encoding(tmp_path, data, size, encoding):
    data = b"h\n" + data  # an empty file is refused
    (tmp_path / "a.txt").write_bytes(data)
    expected = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = line.removesuffix(b"\r").decode(encoding)
            expected.append((f"a.txt:{number}", text))
        except UnicodeDecodeError:
            expected.append((f"a.txt:{number}", f"invalid {encoding}"))
    found = items(tmp_path / "a.txt", size, sample_by="line", encoding=encoding)
    assert [(item.place, item.reason if isinstance(item, Bad) else item.fields["text"]) for item in found] == expected


def test_bytes_of_bad_records_are_shown_as_they_are_in_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "水'.encode("gbk") + b'\x81"}\n' + '{"text": "山"}\n'.encode("gbk"))
    bad, good = items(path, encoding="gbk")
    assert (bad.place, bad.reason, bad.raw) == ("a.jsonl:1", "invalid gbk", '{"text": "水\\x81"}')
    assert good.fields == {"text": "山"}
    path = tmp_path / "a.csv"
    path.write_bytes("text\n水".encode("gbk") + b"\xff\n" + "山\n".encode("gbk"))
    bad, good = items(path, encoding="gbk")
    assert (bad.place, bad.reason, bad.raw) == ("a.csv:2", "invalid gbk", "水\\xff") and good.fields == {"text": "山"}
    path = tmp_path / "a.txt"  # half a surrogate pair, of which one byte is below 128
    path.write_bytes("山\n".encode("utf-16-le") + b"\x00\xd8" + "\n水\n".encode("utf-16-le"))
    assert [item.place for item in items(path, encoding="utf-16-le", sample_by="line") if isinstance(item, Bad)] == [
        "a.txt:2"
    ]


def test_latin_1_is_read_as_windows_1252(tmp_path):
    """correctness 8, for text files: the labels of the Encoding Standard. And who takes the smaller one of two
    encodings for Windows' own is told its name."""
    path = write(tmp_path / "a.txt", "it’s “fine” – 5 €", "cp1252")
    for name in ("latin-1", "ISO-8859-1", "l1"):
        assert [item.fields["text"] for item in items(path, encoding=name)] == ["it’s “fine” – 5 €"]
    path = write(tmp_path / "b.txt", "똠방각하", "cp949")
    with pytest.raises(UserError, match="try encoding: cp949"):
        first_record(Source(path=str(path), encoding="euc_kr"), "s", None)


@pytest.mark.parametrize("name", ["gb1803", "hex", "rot13", "unicode_escape", "idna", "", "a\0b", "../os"])
def test_an_unknown_encoding_is_refused(name):
    with pytest.raises(ValueError, match="is not an encoding that Python knows; expected one such as gb18030"):
        Source(path="a.txt", encoding=name)


def test_an_encoding_where_there_is_none_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="encoding is for csv and json and jsonl and tsv and txt, but its files are"):
        items(tmp_path / "a.parquet", encoding="gbk")
    with pytest.raises(ValueError, match="encoding is for text files"):
        Source(dataset="org/name", revision="1", encoding="gbk")


def test_identity_counts_an_encoding_and_not_how_it_is_spelled(tmp_path):
    path = str(write(tmp_path / "a.txt", "山", "gbk"))
    found = {
        name: json.dumps(
            ExternalContent(tmp_path / "cache").sources(
                {"x": Source(path=path, **({"encoding": name} if name else {}))}
            )
        )
        for name in ("", "utf-8", "UTF8", "gbk", "GBK", "936", "gb18030")
    }
    assert found[""] == found["utf-8"] == found["UTF8"] and "encoding" not in found[""]
    assert found["gbk"] == found["GBK"] == found["936"]
    assert len({found[""], found["gbk"], found["gb18030"]}) == 3


def test_conversations_may_be_in_another_encoding(tmp_path):
    rows = [{"q": f"第{n}问：山在哪里？", "a": f"第{n}答：山在水边。"} for n in range(60)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "gbk")
    messages = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]
    train, heldout, _ = load_conversations({"x": ChatSource(path=str(path), messages=messages, encoding="gbk")}, 0.2)
    assert {row.messages[0]["content"] for row in train + heldout} == {row["q"] for row in rows}
    with pytest.raises(UserError, match="none of its 60 records can be used: .*invalid UTF-8.* encoding: gb18030"):
        load_conversations({"x": ChatSource(path=str(path), messages=messages)}, 0.2)
