"""Files called .json: JSON lines, one value of any size, several values; damage and repeated keys."""

import gzip
import json
import random
import subprocess
import sys

import pytest
from harness import succeed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.sources.byte_ranges import Range, cut_source, read_piece
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.json_files import BROKEN
from pipeline.data.sources.records import Record, parse, read
from pipeline.data.sources.sources import Source, chunks, steps_of

# the shape of a record of C4, of Dolma, and of CC-Net
C4 = [
    {"text": f"Page {i}.\nIt has lines.", "timestamp": "2019-04-25T12:57:54Z", "url": f"http://a.b/{i}"}
    for i in range(300)
]
DOLMA = [{"id": f"cc/{i}", "text": f"第{i}页。", "added": "2023", "metadata": {"a": [1, {}]}} for i in range(300)]
SHAPES = {"c4": C4, "dolma": DOLMA}


def write(path, data: bytes) -> str:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def records(path: str, **keys) -> list:
    return list(read(Source(path=path, **keys), "x"))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.JSON"])
@pytest.mark.parametrize("shape", SHAPES)
def test_json_lines_under_the_name_of_json(tmp_path, name, shape):
    """correctness 22: the form in which C4, Dolma and CC-Net are published, a damaged first line among them."""
    path = write(tmp_path / name, lines(SHAPES[shape]))
    found = records(path)
    assert [item.fields for item in found] == SHAPES[shape] and found[6].place == f"{name}:7"
    path = write(tmp_path / name, b'\xef\xbb\xbf{"text": "cut\n\n' + lines(SHAPES[shape])[:-10])
    found = records(path)
    assert [item.fields for item in found[1:-1]] == SHAPES[shape][:-1]
    assert [(found[at].place, found[at].reason) for at in (0, -1)] == [
        (f"{name}:1", "malformed JSON"),
        (f"{name}:302", "malformed JSON"),
    ]


@pytest.mark.parametrize("broken", [0, 1, 5])
def test_a_damaged_member_of_json_lines_costs_that_member(tmp_path, broken):
    """correctness 20 and 22: under the name .json.gz, and where it is the first one, too."""
    members = [bytearray(gzip.compress(lines(C4[begin : begin + 50]))) for begin in range(0, 300, 50)]
    members[broken][40] ^= 0xFF
    (tmp_path / "a.json.gz").write_bytes(b"".join(members))
    found = records(str(tmp_path / "a.json.gz"))
    bad = [item for item in found if isinstance(item, Bad)]
    assert [(item.reason, item.lost > 0) for item in bad] == [("damaged .gz data", True)]
    good = [item.fields for item in found if isinstance(item, Record)]
    assert good == C4[: 50 * broken] + C4[50 * broken + 50 :]


@pytest.mark.parametrize("first", [b"// a comment", b"garbage", b"\xff\xfe"])
def test_a_first_line_that_is_no_json_costs_itself(tmp_path, first):
    """correctness 22"""
    found = records(write(tmp_path / "a.json.gz", first + b"\n" + lines(C4)))
    assert isinstance(found[0], Bad) and [item.fields for item in found[1:]] == C4


def test_a_shard_of_one_line_is_one_record(tmp_path):
    """correctness 22: as is a file that holds one document; a block of records is told by the fields of `text`."""
    path = write(tmp_path / "a.json.gz", lines(C4[:1]))
    assert [item.fields for item in records(path)] == C4[:1]
    path = write(tmp_path / "b.json", json.dumps(C4[0], indent=2).encode())
    assert [item.fields for item in records(path)] == C4[:1]
    assert [item.fields for item in records(path, text="url")] == C4[:1]
    block = {"Tea": "a drink", "Cha": {"text": "same"}}
    path = write(tmp_path / "c.json", json.dumps(block).encode())
    assert [item.fields for item in records(path)] == [
        {"key": "Tea", "text": "a drink"},
        {"key": "Cha", "text": "same"},
    ]
    assert [item.fields["key"] for item in records(path, records="[*]", text="Tea")] == ["Tea", "Cha"]


def test_values_one_after_the_other(tmp_path):
    """As jq writes them."""
    data = b"".join(json.dumps(row, indent=2).encode() + b"\n" for row in C4[:3])
    assert [item.fields for item in records(write(tmp_path / "a.json", data))] == C4[:3]
    data = b"".join(json.dumps({"data": C4[i : i + 2]}).encode() for i in (0, 2))
    assert [item.fields for item in records(write(tmp_path / "b.json", data), records="data[*]")] == C4[:4]


def test_arrays_that_look_like_lines_are_arrays(tmp_path):
    for number, data in enumerate(
        (
            "[\n" + ",\n".join(map(json.dumps, C4)) + "\n]",
            json.dumps(C4, indent=0),
            "[" + json.dumps(C4[0]) + "\n]",
            json.dumps(["a", "b"], indent=1),
            "[]",
            "{\n}",
        )
    ):
        expected = json.loads(data)
        found = records(write(tmp_path / f"{number}.json", data.encode()))
        assert [item.fields for item in found] == [x if isinstance(x, dict) else {"text": x} for x in expected], data


def test_a_key_that_stands_twice_makes_its_record_bad(tmp_path):
    """correctness 13, in JSON: alone in its line, item or block, and however deep; keys that differ in case are two."""
    reason = "a JSON object has the same key twice"
    twice = [b'{"text": "a", "text": "b"}', b'{"text": "a", "m": [{"x": 1, "x": 1}]}', b'{"text": "a", "Text": "b"}']
    for name, data in (("a.jsonl", b"\n".join(twice)), ("a.json", b"[" + b", ".join(twice) + b"]")):
        found = records(write(tmp_path / name, data))
        assert [item.reason for item in found[:2]] == [reason] * 2 and found[2].fields == {"text": "a", "Text": "b"}
        assert [item.place for item in found] == [f"{name}:{number}" for number in (1, 2, 3)]
    found = records(write(tmp_path / "b.json", b'{"A": {"text": "a"}, "A": {"x": 1, "x": 2}, "B": "b"}'))
    assert [item.reason if isinstance(item, Bad) else item.fields["key"] for item in found] == ["A", reason, "B"]
    path = write(tmp_path / "c.json", b'{"data": [{"text": "a"}], "data": [{"text": "b"}]}')
    assert [item.reason if isinstance(item, Bad) else item.fields for item in records(path, records="data[*]")] == [
        {"text": "a"},
        reason,
    ]


def test_what_stands_before_damage_is_read_and_the_loss_is_told(tmp_path):
    """correctness 22, 29: one bad record, and a warning, for it may hide any number of good ones."""
    good = json.dumps(C4)
    for name, data, number in (
        ("cut", good[:-4000], None),
        ("a comma too few", good.replace("}, {", "} {", 1), 1),
        ("something behind", good + "]", 300),
        ("no JSON", "nothing", 0),
        ("deep", good[:-1] + ", " + "[" * 100_000, 300),
    ):
        found = records(write(tmp_path / "a.json", data.encode()))
        assert found[-1].reason == BROKEN and found[-1].place == f"a.json:{len(found)}", name
        assert [item.fields for item in found[:-1]] == C4[: len(found) - 1] and number in (None, len(found) - 1), name
    packed = gzip.compress("\n".join([good]).encode())
    (tmp_path / "b.json.gz").write_bytes(packed[: len(packed) // 2])
    found = records(str(tmp_path / "b.json.gz"))
    assert (
        found[-1].reason == "truncated .gz data" and [item.fields for item in found[:-1]] == C4[: len(found) - 1] != []
    )
    for wrong, reason in ((b'"\xff\xfe"', "invalid UTF-8"), (b"1" * 5000, "malformed JSON")):
        found = records(write(tmp_path / "c.json", b'[{"text": "a"}, {"text": ' + wrong + b'}, {"text": "c"}]'))
        assert [item.fields["text"] if isinstance(item, Record) else item.reason for item in found] == [
            "a",
            reason,
            "c",
        ]
    keys = {"clean": {"sources": {"a": {"path": "a.json"}}, "max_bad": 0.5, "holdout": 0, "filters": {"min_tokens": 1}}}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "t", "stages": keys}))
    write(tmp_path / "a.json", good[:-4000].encode())
    assert "WARNING sources.a: 1 json file is malformed" in succeed("clean", "r.yaml", cwd=tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["data", "rows", "a", "文"]), inner),
    max_leaves=20,
)


def _walked(node, steps: list[str]) -> list:
    """What json.loads makes of a path: an oracle without streams."""
    if not steps:
        return [node]
    if steps[0] == "*" and isinstance(node, list):
        return [found for item in node for found in _walked(item, steps[1:])]
    if steps[0] == "*" and isinstance(node, dict):
        items = [
            {"key": key} | item
            if isinstance(item, dict)
            else {"key": key, "text": item}
            if isinstance(item, str)
            else item
            for key, item in node.items()
        ]
        return [found for item in items for found in _walked(item, steps[1:])]
    return _walked(node[steps[0]], steps[1:]) if isinstance(node, dict) and steps[0] in node else []


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES, st.sampled_from(["[*]", "data", "data[*]", "data.rows[*]", "[*].data[*]"]), st.sampled_from([None, 2]))
def test_streaming_finds_what_a_parser_of_whole_files_finds(tmp_path, value, path, indent):
    source = Source(path=write(tmp_path / "a.json", json.dumps(value, indent=indent).encode()), records=path)
    found = [item for chunk in chunks(source, "x", 1 << 20) for item in parse(chunk)]
    expected = _walked(json.loads(json.dumps(value)), steps_of(path))
    kept = [item.fields for item in found if isinstance(item, Record)]
    assert kept == [
        {"text": item}
        if isinstance(item, str)
        else dict(zip(map(str, range(99)), item))
        if isinstance(item, list)
        else item
        for item in expected
        if isinstance(item, (str, list, dict))
    ]
    assert [item for chunk in chunks(source, "x", 1) for item in parse(chunk)] == found


def test_big_files_of_json_lines_are_cut_into_ranges(tmp_path):
    path = write(tmp_path / "a.json", lines(C4))
    cut = list(cut_source(Source(path=path), "x", 4096))
    assert len(cut) > 5 and all(isinstance(piece, Range) and piece.kind == "jsonl" for piece in cut)
    found = [
        item.fields for piece in cut for chunk in read_piece(piece, Source(path=path), "x")[0] for item in parse(chunk)
    ]
    assert found == C4


@pytest.mark.parametrize("form", ["lines", "array", "block", "path"])
def test_memory_does_not_grow_with_the_file(tmp_path, form):
    """correctness 22: 120 MB of text in a packed file, read within 50 MB more than an empty process."""
    word = "".join(random.Random(0).choices("abcdefghij ", k=1000)) * 600
    row = json.dumps({"text": word})
    around = {
        "lines": ("", "\n", ""),
        "array": ("[", ",", "]"),
        "block": ("{", ",", "}"),
        "path": ('{"version": 1, "data": [', ",", "]}"),
    }[form]
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wt", compresslevel=1) as handle:
        handle.write(around[0])
        for number in range(200):
            handle.write((around[1] if number else "") + (f'"k{number}": ' if form == "block" else "") + row)
        handle.write(around[2])
    program = (
        "import resource\nfrom pipeline.data.sources.records import read\nfrom pipeline.data.sources.sources import Source\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"source = Source(path={str(path)!r}, records={'data[*]' if form == 'path' else ''!r})\n"
        "print(sum(len(item.fields['text']) for item in read(source, 'x')))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) == 200 * len(word)
    assert int(said[1]) < (300_000 if form == "block" else 50_000)  # of a block as much is held as a record may have
