"""Sources: every format gives the same records, damage is counted and not fatal, what is missing is said in one
sentence."""

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from harness import stage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.core.fingerprint import ExternalContent
from pipeline.data.cleaning.perplexity_model import Perplexity, train
from pipeline.data.dedup.decontaminate import Decontaminate, build_runs
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.json_files import BROKEN
from pipeline.data.sources.records import Record, fraction, parse, read, text_of
from pipeline.data.sources.source_checks import check_first_records, first_record
from pipeline.data.sources.sources import Source, chunks

ROWS = [
    {"title": "晨风", "body": "1.清晨的风。\n2.鸟名。"},
    {"title": "Tea, green", "body": 'He said "so".'},
    {"title": "é", "body": "x" * 50},
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def records(**keys) -> list:
    return list(read(Source(**keys), "x"))


@pytest.fixture
def formats(tmp_path) -> dict[str, dict]:
    table = io.StringIO()
    writer = csv.DictWriter(table, ["title", "body"])
    writer.writeheader()
    writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    nested = {"data": [{"rows": ROWS[:2]}, {"rows": ROWS[2:]}]}
    return {
        "jsonl": {"path": write(tmp_path / "a.jsonl", lines(ROWS))},
        "no newline at the end": {"path": write(tmp_path / "b.jsonl", lines(ROWS).rstrip())},
        "byte order mark, CRLF, blank lines": {
            "path": write(tmp_path / "c.jsonl", b"\xef\xbb\xbf" + lines(ROWS).replace(b"}\n", b"}\r\n\r\n"))
        },
        "gzip": {"path": write(tmp_path / "a.jsonl.gz", gzip.compress(lines(ROWS)))},
        "capitals": {"path": write(tmp_path / "C.JSONL.GZ", gzip.compress(lines(ROWS)))},
        "gzip of two members": {
            "path": write(tmp_path / "b.jsonl.gz", gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:])))
        },
        "zstd": {"path": write(tmp_path / "a.jsonl.zst", zstandard.compress(lines(ROWS)))},
        "zstd of two frames": {
            "path": write(
                tmp_path / "b.jsonl.zst", zstandard.compress(lines(ROWS[:1])) + zstandard.compress(lines(ROWS[1:]))
            )
        },
        "json list": {"path": write(tmp_path / "a.json", json.dumps(ROWS).encode())},
        "json path": {
            "path": write(tmp_path / "b.json.gz", gzip.compress(json.dumps(nested).encode())),
            "records": "data[*].rows[*]",
        },
        "parquet": {"path": str(tmp_path / "a.parquet")},
        "csv": {"path": write(tmp_path / "a.csv", table.getvalue().encode())},
        "two files": {
            "path": [write(tmp_path / "d1.jsonl", lines(ROWS[:1])), write(tmp_path / "d2.jsonl", lines(ROWS[1:]))]
        },
        "format by hand": {"path": write(tmp_path / "a.dat", lines(ROWS)), "format": "jsonl"},
    }


def test_every_format_gives_the_same_records(formats):
    expected = [item.id for item in records(**formats["jsonl"])]
    assert len(set(expected)) == 3
    for name, keys in formats.items():
        found = records(**keys)
        assert [item.fields for item in found] == ROWS, name
        assert [item.id for item in found] == expected, name


def test_glob_is_sorted_and_empty_files_are_nothing(tmp_path):
    for name, rows in (("b/1.jsonl", ROWS[1:2]), ("a/2.jsonl", ROWS[:1]), ("c.jsonl", ROWS[2:]), ("a/3.jsonl", [])):
        write(tmp_path / name, lines(rows))
    assert [item.place for item in records(path=f"{tmp_path}/**/*.jsonl")] == [
        "a/2.jsonl:1",
        "b/1.jsonl:1",
        "c.jsonl:1",
    ]


def test_layouts(tmp_path):
    keyed = write(tmp_path / "keyed.json", json.dumps({"Tea": {"text": "a drink"}, "Cha": "same"}).encode())
    assert [item.fields for item in records(path=keyed)] == [
        {"key": "Tea", "text": "a drink"},
        {"key": "Cha", "text": "same"},
    ]
    nested = write(tmp_path / "nested.json", json.dumps([{"context": [["Tea", ["A drink.", " Hot."]]]}]).encode())
    source = Source(path=nested, records="[*].context[*]", text="{0}\n\n{1}", join="")
    assert [text_of(source, item) for item in read(source, "x")] == ["Tea\n\nA drink. Hot."]
    text = write(tmp_path / "a.txt", "一\n二\n\n\n  三\r\n".encode())
    assert [item.fields["text"] for item in records(path=text, sample_by="line")] == ["一", "二", "  三"]
    assert [(item.place, item.fields["text"]) for item in records(path=text, sample_by="paragraph")] == [
        ("a.txt:1", "一\n二"),
        ("a.txt:5", "三"),
    ]
    assert [item.fields["text"] for item in records(path=text)] == ["一\n二\n\n\n  三\r\n"]
    words = write(tmp_path / "words.txt", '晨风\t1.清晨"的风\n坏\n晨光\t曙光\n'.encode())
    assert [
        item.fields if isinstance(item, Record) else item.reason
        for item in records(path=words, format="tsv", columns=["word", "meaning"])
    ] == [{"word": "晨风", "meaning": '1.清晨"的风'}, "wrong number of cells", {"word": "晨光", "meaning": "曙光"}]


def test_branches_of_a_json_file_that_lack_a_step_are_bad_records(tmp_path):
    """The good ones keep their numbers and order, whatever the size of chunks; a file of another form costs itself."""
    good = {"rows": [{"text": "a"}, "b"]}
    data = {"data": [good, {"rwos": []}, good, 3, {"rows": None}, {"rows": {"k": {"text": "c"}}}, {"rows": []}]}
    write(tmp_path / "1.json", json.dumps(data).encode())
    write(tmp_path / "2.json", b'{"error": "busy"}')
    write(tmp_path / "3.json", b'"text"')
    write(tmp_path / "4.json", json.dumps({"data": [good]}).encode())
    keys = {"path": f"{tmp_path}/*.json", "records": "data[*].rows[*]"}
    found = records(**keys)
    assert [item.place if isinstance(item, Record) else (item.place, item.reason, item.raw) for item in found] == [
        "1.json:1",
        "1.json:2",
        ("1.json:data[1]", "nothing at 'rows' of records", "a block with the keys rwos"),
        "1.json:3",
        "1.json:4",
        ("1.json:data[3]", "nothing at 'rows' of records", "3"),
        ("1.json:data[4].rows", "neither list nor block at [*] of records", "null"),
        "1.json:5",
        ("2.json", "nothing at 'data' of records", "a block with the keys error"),
        ("3.json", "nothing at 'data' of records", '"text"'),
        "4.json:1",
        "4.json:2",
    ]
    assert [item.fields["text"] for item in found if isinstance(item, Record)] == ["a", "b", "a", "b", "c", "a", "b"]
    for size in (1, 40, 10_000):
        assert [item for chunk in chunks(Source(**keys), "x", size) for item in parse(chunk)] == found
    assert [item.reason for item in records(path=f"{tmp_path}/3.json")] == ["neither list nor block at [*] of records"]


def test_datasets_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "repo" / "train.jsonl", lines(ROWS))
    found = records(dataset=str(tmp_path / "repo"), revision="main")
    assert [item.fields for item in found] == ROWS
    with pytest.raises(UserError, match="cannot be loaded"):
        records(dataset=str(tmp_path / "repo"), revision="main", split="nosuch")


def test_bad_records_are_kept_aside_and_their_neighbours_read(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        b'{"text": "a"}\nnope\n{"text": "\xff"}\n[1, 2]\n{"text": "b"\n' + b"[" * 100_000 + b'\n{"text": "z"}',
    )
    found = records(path=path)
    assert [(item.place, item.reason) for item in found if isinstance(item, Bad)] == [
        ("a.jsonl:2", "malformed JSON"),
        ("a.jsonl:3", "invalid UTF-8"),
        ("a.jsonl:4", "not a JSON object"),
        ("a.jsonl:5", "malformed JSON"),
        ("a.jsonl:6", "malformed JSON"),
    ]
    assert [item.fields["text"] for item in found if isinstance(item, Record)] == ["a", "z"]
    assert found[2].raw == '{"text": "\\xff"}'
    path = write(tmp_path / "a.csv", b'text,n\r\n"a\nb",1\r\nc\r\n\xff,3\r\nd,2\r\n"open,4\r\n')
    found = [item.fields["text"] if isinstance(item, Record) else item.reason for item in records(path=path)]
    assert found == ["a\nb", "wrong number of cells", "invalid UTF-8", "d", "malformed CSV"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_cut_file_counts_up_to_the_cut(tmp_path, suffix):
    rows = [{"text": hashlib.sha256(str(i).encode()).hexdigest()} for i in range(20_000)]
    packed = (gzip.compress if suffix == "gz" else zstandard.compress)(lines(rows))
    found = records(path=write(tmp_path / f"a.jsonl.{suffix}", packed[: len(packed) // 2]))
    assert [item.fields for item in found[:-1]] == rows[: len(found) - 1] and len(found) > 5000
    assert (
        isinstance(found[-1], Bad)
        and found[-1].reason == f"truncated .{suffix} data"
        and found[-1].place == f"a.jsonl.{suffix}:{len(found)}"
    )
    damaged = bytearray(packed)
    damaged[len(packed) // 2 : len(packed) // 2 + 99] = bytes(99)
    assert [
        item.reason
        for item in records(path=write(tmp_path / f"b.jsonl.{suffix}", bytes(damaged)))
        if isinstance(item, Bad)
    ][-1] == f"damaged .{suffix} data"


def test_damaged_json_and_parquet_are_bad_records(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert [item.reason for item in records(path=str(tmp_path / "b.parquet"))] == ["damaged parquet data"]
    found = records(path=write(tmp_path / "a.json", b'[{"a": 1}, {"a"'))
    assert [item.fields if isinstance(item, Record) else (item.place, item.reason, item.raw) for item in found] == [
        {"a": 1},
        ("a.json:2", BROKEN, '[{"a": 1}, {"a"'),
    ]


PIECES = [
    b'{"text": "a"}',
    b'"\xe4\xb8\xad',
    b"\n",
    b"\r\n",
    b" ",
    b"\n\n",
    b"\xff",
    b'a,"b',
    b'"',
    b",",
    b"{",
    b"\xef\xbb\xbf",
    b"x\ny",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join), size=st.integers(1, 60))
def test_where_a_file_is_cut_makes_no_difference(tmp_path, data, size):
    for name, keys in (
        ("a.jsonl", {}),
        ("a.txt", {"sample_by": "line"}),
        ("a.txt", {"sample_by": "paragraph"}),
        ("a.csv", {}),
        ("a.tsv", {"columns": ["a", "b"]}),
    ):
        source = Source(path=write(tmp_path / name, b"h\n" + data), **keys)
        whole = [item for chunk in chunks(source, "x", 1 << 30) for item in parse(chunk)]
        assert [item for chunk in chunks(source, "x", size) for item in parse(chunk)] == whole, (name, keys)


def test_where_a_big_file_is_cut_makes_no_difference(tmp_path):
    rows = [{"text": "字" * (i % 700)} for i in range(4000)]
    source = Source(path=write(tmp_path / "a.jsonl.gz", gzip.compress(lines(rows))))
    for size in (10_000, 1 << 30):
        assert [item.fields for chunk in chunks(source, "x", size) for item in parse(chunk)] == rows


def test_parts_are_disjoint_and_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": str(i), "lang": ["en", "zh"][i % 2]} for i in range(2000)))
    halves = [{item.id for item in records(path=path, part=part)} for part in ((0.0, 0.3), (0.3, 1.0))]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 2000
    assert abs(len(halves[0]) - 600) < 100  # 5 standard deviations of a binomial
    assert all(0 <= fraction(id) < 0.3 for id in halves[0])
    assert [item.fields["text"] for item in records(path=path, where={"lang": "zh"}, limit=2)] == ["1", "3"]
    assert len(records(path=path, where={"lang": ["en", "fr"]})) == 1000
    assert records(path=path, where={"nosuch": 1}) == []


@pytest.mark.parametrize("keys, text", [({}, "a.\nb"), ({"join": ""}, "a.b"), ({"join": "\n\n"}, "a.\n\nb")])
def test_lists_of_paragraphs_have_a_separator(tmp_path, keys, text):
    """correctness 12: in every format that has lists, and wherever a text is made of a record."""
    row = {"text": ["a.", "b"], "one": ["only"], "none": []}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl", lines([row])), str(tmp_path / "a.parquet")):
        source = Source(path=path, **keys)
        assert [text_of(source, item) for item in read(source, "x")] == [text]
        source = Source(path=path, text="<{text}|{one}|{none}>", **keys)
        assert [text_of(source, item) for item in read(source, "x")] == [f"<{text}|only|>"]


def test_identity_is_content_not_place(tmp_path):
    one, two = write(tmp_path / "1" / "a.jsonl", lines(ROWS)), write(tmp_path / "2" / "a.jsonl", lines(ROWS))
    cache = tmp_path / "hashes.json"
    first = ExternalContent(cache).sources({"x": Source(path=one)})
    assert (
        first
        == ExternalContent(cache).sources({"x": Source(path=two)})
        == ExternalContent(cache).sources({"x": Source(path=one)})
    )
    assert first != ExternalContent(cache).sources({"x": Source(path=one, limit=1)})
    write(Path(two), lines(ROWS[:2]))
    assert first != ExternalContent(cache).sources({"x": Source(path=two)})


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"path": "nosuch.jsonl"}, "sources.x: nosuch.jsonl does not exist"),
        ({"path": "*.nosuch"}, r"sources.x: no file matches \*.nosuch"),
        ({"path": "folder"}, "sources.x: folder is a folder; give a file or a pattern such as"),
        ({"path": "empty.jsonl"}, "empty.jsonl is empty; give a file with records"),
        ({"path": "a.bin"}, "the suffix of a.bin does not tell its format"),
        ({"path": "a.parquet.gz"}, "compressed parquet"),
        ({"path": "a.jsonl.XZ", "format": "jsonl"}, "a.jsonl.XZ is compressed in a format that is not supported"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.jsonl", b"")
    for name in ("a.bin", "a.parquet.gz", "a.jsonl.XZ", "folder/a.jsonl"):
        write(tmp_path / name, b"{}")
    with pytest.raises(UserError, match=message):
        records(**keys)


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_lines_that_end_with_carriage_returns_alone_are_refused(tmp_path, unit):
    """They would be one record."""
    path = write(tmp_path / "a.txt", "一\r二\r三\r".encode("utf-16"))
    source = Source(path=path, sample_by=unit, encoding="utf-16")
    with pytest.raises(UserError, match=f"sources.x: .*a.txt ends its lines with carriage returns alone.*{unit}"):
        check_first_records({"sources": {"x": source}})
    write(tmp_path / "a.txt", "一\r\n二\r\n三".encode("utf-16"))
    check_first_records({"sources": {"x": source}})


def test_a_file_that_is_not_there_is_named_by_its_key_of_the_recipe(tmp_path):
    """Also where it is no source of the corpus; and what decides the fingerprint keeps its names."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    base = {"sources": {"a": {"path": "a.jsonl"}}}
    for extra, key in (
        ({"decontaminate": {"sets": {"gsm": {"path": "nosuch"}}}}, "decontaminate.sets.gsm"),
        ({"examples": {"good": {"path": "nosuch"}}, "perplexity": {"like": ["good"], "max_en": 100}}, "examples.good"),
        ({"sources": {"b": {"path": "nosuch"}}}, "sources.b"),
    ):
        (tmp_path / "r.yaml").write_text(json.dumps({"name": "t", "stages": {"clean": {**base, **extra}}}))
        code, text = stage("clean", tmp_path / "r.yaml", cwd=tmp_path)
        assert code == 2 and f"{key}: nosuch does not exist" in text, text
    wanted = Decontaminate(sets={"gsm": Source(path=str(tmp_path / "nosuch"))})
    with pytest.raises(UserError, match="^decontaminate.sets.gsm: .*nosuch does not exist"):
        build_runs(wanted)
    perplexity = Perplexity(like=["g"])
    with pytest.raises(UserError, match="^examples.g: .*nosuch does not exist"):
        train({"g": Source(path=str(tmp_path / "nosuch"))}, perplexity, tmp_path)


@pytest.mark.parametrize("keys", [{"sample_by": "line"}, {"columns": ["a"]}, {"records": "a[*]"}, {"extract": "all"}])
def test_a_key_of_another_format_is_refused(tmp_path, keys):
    path = write(tmp_path / "a.jsonl", lines([{"text": "a"}]))
    with pytest.raises(UserError, match=f"sources.x: {next(iter(keys))} is for .*, but its files are jsonl"):
        records(path=path, **keys)


def test_a_join_that_separates_nothing_is_refused(tmp_path):
    """correctness 4: `join` beside a field that holds one text had no effect."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b", "meta": {"parts": ["a"]}}\n{"text": "c"}\n')
    with pytest.raises(
        UserError, match="sources.s: join: ' ' separates the items of a list, and text held no list in 2"
    ):
        first_record(Source(path=str(path), join=" "), "s", None)
    assert first_record(Source(path=str(path), join=" ", text="{meta.parts}"), "s", None).place == "a.jsonl:1"
    path.write_text('{"text": "a b"}\n{"text": ["c", "d"]}\n')  # some records have a list
    assert first_record(Source(path=str(path), join=" "), "s", None).place == "a.jsonl:1"
    text = tmp_path / "a.txt"
    text.write_text("a")
    with pytest.raises(UserError, match="join is for json and jsonl and parquet, but its files are txt"):
        first_record(Source(path=str(text), join=" "), "s", None)
