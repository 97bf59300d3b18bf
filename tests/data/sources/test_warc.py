"""WARC, WET, HTML, addresses, and input that is not what it says: everything readable is read, everything else
counted with its place."""

import gzip
import json

import pytest
import zstandard
from harness import stage, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from warc import items, page, record, response

from pipeline.data.sources.formats import Bad, Skipped
from pipeline.data.sources.records import Record, parse
from pipeline.data.sources.sources import Source, chunks

pytest.importorskip("resiliparse")
EN = (
    "The bridge was built by the people of the town, and it stood for a hundred years before the river took it away. "
    * 3
)
ZH = "这座桥是镇上的人自己修的，在河水把它冲走之前，它在那里站了一百年，人们每天都从上面走过去。" * 3


def test_pages_of_a_warc(tmp_path):
    chunked = page(EN)
    chunked = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (50, chunked[:50], len(chunked) - 50, chunked[50:])
    records = [
        record("warcinfo", b"software: x\r\n"),
        record("request", b"GET / HTTP/1.1\r\n\r\n"),
        record("response", response(page(EN)), "http://a.org/en"),
        record("response", response(page(ZH, "gbk")), "http://a.org/zh"),
        record("response", response(page(ZH, "gb18030", meta=False), "text/html; charset=gb2312"), "http://a.org/zh2"),
        record("response", response(chunked, extra="Transfer-Encoding: chunked\r\n"), "http://a.org/chunked"),
        record("response", response(gzip.compress(page(EN)), extra="Content-Encoding: gzip\r\n"), "http://a.org/gz"),
        record("response", response(b"\x89PNG....", "image/png")),
        record("response", response(page(EN), status="404 Not Found")),
        record("response", response(EN.encode(), "text/plain"), "http://a.org/plain"),
    ]
    expected = {"en": EN, "zh": ZH, "zh2": ZH, "chunked": EN, "gz": EN, "plain": EN}
    for name, data in (
        ("a.warc", b"".join(records)),
        ("b.warc.gz", b"".join(map(gzip.compress, records))),
        ("c.warc.zst", zstandard.compress(b"".join(records))),
    ):
        found = items(tmp_path, data, name)
        assert all(isinstance(item, Record) for item in found) and len(found) == len(expected), found
        for item in found:
            assert (
                expected[item.fields["url"].rpartition("/")[2]].strip() in item.fields["text"]
                and "Menu entry" not in item.fields["text"]
                and "Copyright" not in item.fields["text"]
            )
        assert found[0].place == f"{name}:3" and found[0].fields["date"] == "2024-01-02T03:04:05Z"
        cut = [item for chunk in chunks(Source(path=str(tmp_path / name)), "s", 700) for item in parse(chunk)]
        assert [item for item in cut if not isinstance(item, Skipped)] == found
        assert [(item.place, item.reason) for item in cut if isinstance(item, Skipped)] == [
            (f"{name}:1", "WARC warcinfo"),
            (f"{name}:2", "WARC request"),
            (f"{name}:8", "image/*"),
            (f"{name}:9", "HTTP 404"),
        ]
    assert "Menu entry 3" in items(tmp_path, b"".join(records), extract="all")[0].fields["text"]


def chunked(data: bytes, size: int = 50) -> bytes:
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_what_holds_no_text_is_counted_by_few_reasons(tmp_path):
    """Every record of an archive is in the ledger, whatever servers call their files, and `read` is their number."""
    other = {
        "WARC warcinfo": record("warcinfo", b"software: x\r\n"),
        "WARC request": record("request", b"GET / HTTP/1.1\r\n\r\n"),
        "WARC revisit": record("revisit", response(b"")),
        "WARC record of no known kind": record("surprise", b"x"),
        "no HTTP response": record("response", b"1.2.3.4", "dns:a.org", "text/dns"),
        "HTTP 301": record("response", response(b"", status="301 Moved Permanently")),
        "image/*": record("response", response(b"\x89PNG", "image/png")),
        "application/pdf": record("response", response(b"%PDF", "Application/PDF; x=y")),
        "application/*": record("response", response(b"x", "application/x-anything-at-all")),
        "of no known type": record("response", response(b"\x00", "")) + record("resource", b"x", media="nonsense"),
    }
    good = [record("response", response(page(f"{EN} {i} {'abcdefghij'[i % 10] * 4} {i * i}"))) for i in range(40)]
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(b"".join([*other.values(), *good, *[other["image/*"]] * 3000])))
    recipe = {
        "name": "t",
        "stages": {
            "clean": {
                "sources": {"a": {"path": "a.warc.gz"}},
                "holdout": 0.1,
                "workers": 1,
                "dedup": {"near": None},
                "filters": {"max_repeated_shingles": 1},
            }
        },
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    succeed("clean", tmp_path / "r.yaml", cwd=tmp_path)
    report = json.loads((tmp_path / "runs/t/clean/current/report.json").read_text())
    counts = report["sources"]["a"]
    wanted = {**dict.fromkeys(other, 1), "image/*": 3001, "of no known type": 2}
    assert counts["not selected"] == wanted and counts["bad"] == {}
    kept = counts["train_documents"] + counts["heldout_documents"]
    assert kept == 40 and counts["read"] == len(good) + sum(wanted.values()) and counts["documents_in"] == 40
    assert report["total"]["not_selected"] == sum(wanted.values())
    summary = json.loads((tmp_path / "runs/t/clean/current/manifest.json").read_text())["metrics"]["summary"]
    assert summary["input"].endswith("MB, 40 documents, 1 source")
    with zstandard.open(tmp_path / "runs/t/clean/current/rejected/a.jsonl.zst") as ledger:
        assert ledger.read() == b""
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(b"".join(other.values())))
    code, text = stage("clean", tmp_path / "r.yaml", cwd=tmp_path)
    assert code == 2 and "sources.a: has no page among its 11 records (2 x of no known type, 1 x WARC" in text, text


def test_a_warc_with_wrong_lengths_loses_the_wrong_records_only(tmp_path):
    good = [record("conversion", f"{EN} {i}".encode(), f"http://a.org/{i}") for i in range(8)]
    bad = (
        record("conversion", EN.encode(), length=17),
        record("conversion", EN.encode(), length=len(EN) + 40),
        record("conversion", EN.encode()).replace(b"Content-Length", b"Content-Lenght"),
    )
    data = (
        good[0]
        + bad[0]
        + good[1]
        + good[2]
        + bad[1]
        + good[3]
        + bad[2]
        + good[4]
        + b"rubbish between\r\nmore rubbish\r\n"
        + good[5]
        + record("conversion", EN.encode(), length=10**12)
        + b""
    )
    found = items(tmp_path, data)
    assert [item.fields["text"].rpartition(" ")[2] for item in found if isinstance(item, Record)] == list("012345")
    reasons = [(item.reason, item.place) for item in found if isinstance(item, Bad)]
    assert [reason for reason, _ in reasons] == ["WARC record with a wrong length"] * 2 + [
        "WARC record without a length",
        "no WARC record",
        "longer than 64 MiB",
    ]
    assert [place for _, place in reasons] == ["a.warc:2", "a.warc:5", "a.warc:7", "a.warc:9", "a.warc:11"]
    packed = gzip.compress(b"".join(good))
    found = items(tmp_path, packed[:-20], "t.warc.gz")
    assert found[-1].reason == "truncated .gz data" and len(found) > 1
    found = items(tmp_path, b"".join(good)[:-300], "t.warc")
    assert found[-1].reason == "truncated WARC record" and len(found) == 8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_survived(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("w")
    raw = bytearray(b"".join(record("conversion", f"text {i} ".encode() * 9) for i in range(6)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=30))
    found = items(folder, bytes(raw) or b"x")
    assert all(isinstance(item, (Record, Bad)) for item in found)
    cut = [item for chunk in chunks(Source(path=str(folder / "a.warc")), "s", 50) for item in parse(chunk)]
    assert found == [item for item in cut if not isinstance(item, Skipped)]
