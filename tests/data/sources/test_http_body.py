"""Codings of HTTP bodies in web archives."""

import gzip
import tracemalloc
import zlib

import pytest
import zstandard
from warc import items, page, record, response

from pipeline.data.sources.formats import Bad

pytest.importorskip("resiliparse")
brotli = pytest.importorskip("brotli")
EN = (
    "The bridge was built by the people of the town, and it stood for a hundred years before the river took it away. "
    * 3
)


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


def test_a_member_with_a_damaged_head_does_not_cut_the_page(tmp_path):
    """correctness 21: bytes after a member were ignored, whatever they were."""
    whole = page(LONG)
    first, second = gzip.compress(whole[:1000]), gzip.compress(whole[1000:])
    header = "Content-Encoding: gzip\r\n"
    for at in (0, 1, 2):
        body = first + second[:at] + bytes([second[at] ^ 1]) + second[at + 1 :]
        (found,) = items(tmp_path, record("response", response(body, extra=header)))
        assert isinstance(found, Bad) and found.reason == "damaged HTTP body"
    for rest in (b"", b"\0" * 100, b"\r\n", b"<!-- 3 ms -->"):
        (found,) = items(tmp_path, record("response", response(gzip.compress(whole) + rest, extra=header)))
        assert "Number 39" in found.fields["text"]


def test_a_coding_that_no_header_names(tmp_path):
    """correctness 21: bodies that are no text were read as pages in windows-1252."""
    whole = page(LONG)
    for body in (zlib.compress(whole), zlib.compress(whole, 9)):
        (found,) = items(tmp_path, record("response", response(body)))
        assert "Number 39" in found.fields["text"]
    for body in (raw_deflate(whole), brotli.compress(whole)):
        (found,) = items(tmp_path, record("response", response(body)))
        assert isinstance(found, Bad) and found.reason == "HTTP body in an unknown coding"


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
