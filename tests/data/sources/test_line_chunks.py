"""Files of lines: bad lines are counted with their places, long ones skipped in bounded memory."""

import json
import tracemalloc

import pytest
from harness import stage, succeed

from pipeline.data.sources.formats import NULS, Bad
from pipeline.data.sources.records import read
from pipeline.data.sources.sources import Source

pytest.importorskip("resiliparse")
EN = (
    "The bridge was built by the people of the town, and it stood for a hundred years before the river took it away. "
    * 3
)


def test_every_kind_of_bad_line_in_one_file(tmp_path):
    """The run goes on, each is counted under its reason with its place, and the memory stays small although one line
    has 100 MB."""
    good = [json.dumps({"text": f"{EN} number {i} {'abcdefghij'[i % 10] * 3}"}) for i in range(60)]
    nested = "[" * 100_000 + "]" * 100_000
    deep = '{"text": "' + EN + '", "a": ' + "[" * 900 + "]" * 900 + "}"
    lines = good[:20] + [
        nested,
        '{"text": "a", }',
        '{"text": ' + nested + "}",
        '{"body": "x"}',
        '{"text": 3.5}',
        '{"text": null}',
        "[1, 2]",
        '"just a string of text"',
        '{"text": "\\u0000\\u0000 nul ' + EN + '"}',
        deep,
    ]
    lines += [good[0], good[0], '{"text": ""}']
    raw = ("\n".join(lines) + "\n").encode() + b'{"text": "\xff\xfe broken"}\n' + b"\x00" * 500 + b"\n"
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data/a.jsonl", "wb") as handle:
        handle.write(raw)
        handle.write(b'{"text": "')
        for _ in range(100):
            handle.write(b"long line " * 100_000)
        handle.write(b'"}\n')
        handle.write("\n".join(good[20:]).encode())
    recipe = {
        "name": "t",
        "stages": {
            "clean": {
                "sources": {"a": {"path": "data/a.jsonl"}},
                "holdout": 0.1,
                "max_bad": 0.5,
                "workers": 1,
                "dedup": {"near": None},
                "filters": {"max_repeated_shingles": 1},
            }
        },
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    succeed("clean", tmp_path / "r.yaml", cwd=tmp_path)
    report = json.loads((tmp_path / "runs/t/clean/current/report.json").read_text())["sources"]["a"]
    # JSON nested more deeply than Python's stack is malformed here; nested 900 deep it is a record.
    assert report["bad"] == {
        "malformed JSON": 3,
        NULS: 1,
        "missing field": 2,
        "not a JSON object": 1,
        "invalid UTF-8": 1,
        "longer than 64 MiB": 1,
    }, report["bad"]
    assert report["duplicates"]["exact"] == 2 and report["filtered"] == {"garbled": 1, "too_short": 3}
    kept = report["train_documents"] + report["heldout_documents"]
    assert kept == 61 and report["read"] == kept + 9 + 4 + 2
    code, text = stage("clean", tmp_path / "r.yaml", "clean.max_bad=0.01", "clean.holdout=0.2", cwd=tmp_path)
    assert code == 2 and "9 of 76 records are bad" in text


def test_a_long_line_is_skipped_in_bounded_memory(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as handle:
        handle.write(b'{"text": "first"}\n')
        for _ in range(120):
            handle.write(b"x" * (1 << 20))
        handle.write(b'\n{"text": "last"}\n')
    tracemalloc.start()
    found = [
        (item.reason, item.place) if isinstance(item, Bad) else item.fields["text"]
        for item in read(Source(path=str(tmp_path / "a.jsonl")), "s")
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["first", ("longer than 64 MiB", "a.jsonl:2"), "last"] and peak < 150 << 20
