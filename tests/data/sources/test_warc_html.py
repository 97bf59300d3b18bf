"""WARC, WET, HTML, addresses, and input that is not what it says: everything readable is read, everything else
counted with its place."""

import gzip
import http.server
import json
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from functools import partial

import pytest
import zstandard
from harness import stage, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from warc import items, page, record, response

from pipeline.core.errors import UserError
from pipeline.data.sources.formats import NULS, Bad, Passed
from pipeline.data.sources.records import Record, parse, read
from pipeline.data.sources.sources import Source, chunks
from pipeline.data.sources.warc_html import text_of_html

pytest.importorskip("resiliparse")
brotli = pytest.importorskip("brotli")
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
        assert [item for item in cut if not isinstance(item, Passed)] == found
        assert [(item.place, item.reason) for item in cut if isinstance(item, Passed)] == [
            (f"{name}:1", "WARC warcinfo"),
            (f"{name}:2", "WARC request"),
            (f"{name}:8", "image/*"),
            (f"{name}:9", "HTTP 404"),
        ]
    assert "Menu entry 3" in items(tmp_path, b"".join(records), extract="all")[0].fields["text"]


def test_wet_and_html(tmp_path):
    wet = (
        record("warcinfo", b"x")
        + record("conversion", ZH.encode(), "http://b.cn/1", "text/plain")
        + record("conversion", EN.encode(), "http://b.cn/2")
    )
    found = items(tmp_path, gzip.compress(wet), "x.warc.wet.gz")
    assert [(item.fields["text"], item.fields["url"]) for item in found] == [
        (ZH, "http://b.cn/1"),
        (EN, "http://b.cn/2"),
    ]
    (item,) = items(tmp_path, page(ZH, "gbk"), "p.html")
    assert ZH in item.fields["text"] and "Menu" not in item.fields["text"]


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def chunked(data: bytes, size: int = 50) -> bytes:
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


LONG = "".join(f"{EN} Number {number}. " for number in range(40))


def bodies() -> dict[str, tuple[str, bytes]]:
    whole, half = page(LONG), len(page(LONG)) // 2
    members = gzip.compress(whole[:half]) + gzip.compress(whole[half:])
    zst = zstandard.ZstdCompressor(write_checksum=True).compress
    frames = zst(whole[:half]) + zst(whole[half:])
    return {
        "gzip": ("gzip", gzip.compress(whole)),
        "x-gzip": ("X-GZIP", gzip.compress(whole)),
        "members": ("gzip", members),
        "padded": ("gzip", members + b"\0" * 9),
        "zlib": ("deflate", zlib.compress(whole)),
        "raw": ("deflate", raw_deflate(whole)),
        "br": ("br", brotli.compress(whole)),
        "zstd": ("zstd", zst(whole)),
        "frames": ("zstd", frames),
        "two": ("gzip, br", brotli.compress(gzip.compress(whole))),
        "three": ("deflate, gzip,zstd", zstandard.compress(gzip.compress(zlib.compress(whole)))),
        "identity": ("identity", whole),
        "undone": ("br", whole),
        "twice": ("gzip", gzip.compress(gzip.compress(whole))),
        "nonsense": ("utf-8", whole),
        "unsaid": ("", gzip.compress(whole)),
    }


@pytest.mark.parametrize("kind", bodies())
def test_every_coding_of_a_body_is_undone(tmp_path, kind):
    """correctness 21: brotli and zstd were read as text, raw deflate was refused, members behind the first were cut."""
    coding, body = bodies()[kind]
    header = f"Content-Encoding: {coding}\r\n" if coding else ""
    two = "".join(f"Content-Encoding: {part.strip()}\r\n" for part in coding.split(","))
    transfer = f"Transfer-Encoding: {coding}{', ' if coding else ''}chunked\r\n"
    data = [
        record("response", response(page(LONG))),
        record("response", response(body, extra=header)),
        record("response", response(body, extra=two if coding else "")),
        record("response", response(chunked(body), extra=f"{header}Transfer-Encoding: chunked\r\n")),
        record("response", response(chunked(body), extra=transfer)),
    ]
    plain, *found = items(tmp_path, b"".join(data))
    assert [item.fields["text"] for item in found] == [plain.fields["text"]] * 4 and "Number 39" in plain.fields["text"]


@pytest.mark.parametrize("kind", ["gzip", "members", "zlib", "raw", "br", "zstd", "frames", "two", "three", "unsaid"])
def test_a_body_that_cannot_be_undone_is_bad(tmp_path, kind):
    """correctness 21: and not text that a rule then leaves out, nor the half of it that could be read."""
    coding, body = bodies()[kind]
    header = f"Content-Encoding: {coding}\r\n" if coding else ""
    damaged = bytearray(body)
    damaged[len(body) // 2 : len(body) // 2 + 20] = b"\xff" * 20
    data = [
        record("response", response(body[: len(body) // 2], extra=header)),
        record("response", response(body[:-1], extra=header)),
        record("response", response(bytes(damaged), extra=header)),
        record("response", response(chunked(body)[:-200], extra=f"{header}Transfer-Encoding: chunked\r\n")),
        record("response", response(body, extra="Content-Encoding: exi\r\n" if coding else header)),
    ]
    found = items(tmp_path, b"".join(data))
    reasons = [item.reason if isinstance(item, Bad) else "good" for item in found]
    assert set(reasons[:4]) <= {"truncated HTTP body", "damaged HTTP body"}, reasons
    assert reasons[4] == ("HTTP body in an unknown coding" if coding else "good")
    if kind in ("gzip", "members", "zlib", "zstd"):  # the crawler may say that it is a part, as of other pages
        said = b"WARC-Truncated: length\r\nWARC-Type"
        cut = record("response", response(body[:-1], extra=header)).replace(b"WARC-Type", said, 1)
        assert "Number 39" in items(tmp_path, cut)[0].fields["text"]


def test_a_body_that_unpacks_to_gigabytes_is_bad_and_takes_no_memory(tmp_path):
    """correctness 31: a bomb in each coding, and a chain of them; none is longer than 2 MB."""
    zeros = bytes(1 << 26)
    gz = b"".join([gzip.compress(zeros, 9)] * 8)
    zst = b"".join([zstandard.compress(zeros, 19)] * 32)
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    wide = b"".join(stream.compress(zeros) for _ in range(4)) + stream.flush()
    wide = wide[:5] + bytes([(31 - 10) << 3]) + wide[6:]  # a window of 2 GiB (RFC 8878, 3.1.1.1.2)
    bombs = [
        ("gzip", gz),
        ("br", brotli.compress(zeros * 3, quality=1)),
        ("zstd", zst),
        ("deflate", zlib.compress(zeros * 2)),
    ]
    bombs += [("gzip, gzip", gzip.compress(gz)), ("gzip, br, zstd", zstandard.compress(brotli.compress(gz)))]
    bombs += [("zstd", wide), (", ".join(["gzip"] * 50), gzip.compress(gz))]
    data = [record("response", response(body, extra=f"Content-Encoding: {coding}\r\n")) for coding, body in bombs]
    del zeros
    assert max(map(len, data)) < 2 << 20
    tracemalloc.start()
    found = items(tmp_path, b"".join(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.reason for item in found] == ["longer than 64 MiB"] * 7 + ["HTTP body in an unknown coding"]
    assert peak < 200 << 20


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
    assert found == [item for item in cut if not isinstance(item, Passed)]


# ---- bad input -------------------------------------------------------------------------------------------------------


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


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www/a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path / "www"))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", tmp_path / "www"
        running.shutdown()


def test_an_address_is_read_like_a_file(server, tmp_path, monkeypatch):
    address, folder = server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = list(read(Source(path=f"{address}/a.jsonl"), "s"))
    assert [(item.fields["text"], item.place) for item in found] == [("one", "a.jsonl:1"), ("two", "a.jsonl:2")]
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    assert len(list(read(Source(path=f"{address}/a.jsonl"), "s"))) == 3  # what changed is fetched again
    with pytest.raises(UserError, match="sources.s: .*/none.jsonl cannot be read"):
        list(read(Source(path=f"{address}/none.jsonl"), "s"))


def test_patterns_of_another_file_system(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe(f"/corpus/{name}.txt", f"text {name}".encode())
    assert [item.fields["text"] for item in read(Source(path="memory://corpus/*.txt"), "s")] == ["text a", "text b"]
    with pytest.raises(UserError, match="no file matches"):
        list(read(Source(path="memory://corpus/*.csv"), "s"))
    with pytest.raises(UserError, match="cannot be read|is not installed"):
        list(read(Source(path="nosuchscheme://x/y.txt"), "s"))


DOCUMENTATION = """<!DOCTYPE html><html><head><title>t</title></head><body>
<header><a href="/">Site</a></header><nav><ul><li>Menu entry 1</li><li>Menu entry 2</li></ul></nav>
<div class="related"><h3>Navigation</h3><a>next</a></div><div class="sphinxsidebar"><p>This page</p></div>
<div class="document"><h1>Installing<a class="headerlink" href="#i">¶</a></h1>
<p>Short.</p><p>第一段说明如何安装。</p>
<h2>Commands</h2><pre class="sh"><span>$ pip</span> install x
    --user

  done</pre><div class="sidebar"><h3>注意</h3><p>侧栏也是正文。</p></div>
<h3>Options</h3><table><caption>All of them</caption><tr><th>key</th><th>meaning</th></tr>
<tr><td><code>a|b</code></td><td><p>either</p><p>of them</p></td></tr><tr><td colspan="2">none</td></tr></table>
<article><header>Inner head</header><p>Inner text.</p><aside>A note.</aside><footer>Inner foot</footer></article>
<ol><li>first<pre>cmd --flag
cmd2</pre></li><li>second</li></ol>
<table><tr><td><p>layout</p><ul><li>of a page</li></ul></td><td>right</td></tr></table></div>
<aside>Advertisement</aside><footer>Copyright</footer></body></html>"""


def test_structure_keeps_headings_tables_and_code(tmp_path):
    """correctness 23: what the page says in the form of Markdown, and nothing that leads through the site."""
    (tmp_path / "a.html").write_text(DOCUMENTATION, encoding="utf-8")
    text = next(read(Source(path=str(tmp_path / "a.html"), extract="structure"), "s")).fields["text"]
    for block in (
        "# Installing",
        "Short.",
        "第一段说明如何安装。",
        "## Commands",
        "```\n$ pip install x\n    --user\n\n  done\n```",
        "### 注意",
        "侧栏也是正文。",
        "All of them\n\n| key | meaning |\n| --- | --- |\n| a\\|b | either of them |\n| none |  |",
        "Inner head",
        "A note.",
        "Inner foot",
        "```\ncmd --flag\ncmd2\n```",
        "layout",
        "right",
    ):
        assert f"\n{block}\n" in f"\n{text}\n" or block in ("layout", "right", "A note.") and block in text, (
            block,
            text,
        )
    for gone in ("Site", "Menu entry", "Navigation", "This page", "¶", "Advertisement", "Copyright", "| layout"):
        assert gone not in text, gone
    whole = next(read(Source(path=str(tmp_path / "a.html"), extract="all"), "s")).fields["text"]
    assert "Menu entry 1" in whole and "# Installing" not in whole


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<",
        "<table>",
        "<html></html>",
        "<pre></pre>",
        "<h1></h1>",
        "<table><tr><td colspan=999999999>a<td>b<tr><td>c",
    ]
    + ["<table><tr><td>" * 300, "<pre>" * 300 + "x", "<h1>" * 300 + "x", "<pre>```\nx\n```</pre>", "<td>a|b"],
)
def test_structure_of_odd_pages(page):
    """correctness 23: no page of broken markup ends a stage."""
    found = text_of_html(page, "structure")
    assert found.shown.text <= found.shown.page == text_of_html(page, "all").shown.page and len(found.text) < 3000


def test_iterations_over_a_large_page_are_not_quadratic():
    """correctness 23: 3,000 headings, tables and blocks took 28 s for each 2,600 of them."""
    page = "<h2>a b</h2><pre>c</pre><table><tr><td>d<td>e<tr><td>f<td>g</table>" * 3000
    began = time.process_time()
    text = text_of_html(page, "structure").text
    assert text.count("## a b") == text.count("| d | e |") == text.count("```\nc\n```") == 3000
    assert time.process_time() - began < 10


@pytest.mark.parametrize("unit_bytes", [1024, 4 << 20])
def test_the_share_that_extraction_kept_is_reported(tmp_path, unit_bytes):
    """correctness 23: by source, in report.json, the summary and `alma inspect data`; against counts of the texts."""
    prose = [
        "The bridge stood for a hundred years.",
        "Nobody has seen the river so low.",
        "They went home in the dark.",
    ]
    pages = [DOCUMENTATION.replace("Short.", f"{number} {text} {ZH[:40]}") for number, text in enumerate(prose)]
    for number, content in enumerate(pages):
        (tmp_path / f"{number}.html").write_text(content, encoding="utf-8")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": ZH[:40]}) + "\n", encoding="utf-8")
    recipe = {
        "name": "r",
        "stages": {"clean": {"unit_bytes": unit_bytes, "workers": 1, "holdout": 0, "dedup": {"near": False}}},
    }
    recipe["stages"]["clean"]["sources"] = {
        "main": {"path": "*.html"},
        "kept": {"path": "*.html", "extract": "structure"},
        "plain": {"path": "plain.jsonl"},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    succeed("clean", "r.yaml", cwd=tmp_path)
    output = tmp_path / "runs/r/clean/current"
    sources = json.loads((output / "report.json").read_text())["sources"]

    def letters(text: str) -> int:
        return sum(not sign.isspace() and sign not in "#|`-" for sign in text)

    shown = sum(letters(text_of_html(content, "all").text) for content in pages)
    for name, mode in (("main", "main"), ("kept", "structure")):
        extracted = sum(letters(text_of_html(content, mode).text) for content in pages)
        assert sources[name]["extraction"] == {
            "pages": 3,
            "characters_shown": shown,
            "characters_extracted": extracted,
            "share": round(extracted / shown, 4),
        }
    assert "extraction" not in sources["plain"]
    assert sources["main"]["extraction"]["share"] < sources["kept"]["extraction"]["share"] < 1
    summary = json.loads((output / "manifest.json").read_text())["metrics"]["summary"]["measure"]
    assert f"main {sources['main']['extraction']['share']:.0%}" in summary
    inspected = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "inspect", "data", "r.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "extracted from 3 pages of main: " in inspected.stdout and inspected.returncode == 0, inspected
