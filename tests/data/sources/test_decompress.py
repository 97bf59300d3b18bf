"""Compressed files: damage costs the member that it is in, and no file takes more memory than its records do
(correctness 20 and 31)."""

import gzip
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard
from harness import succeed
from warc import record

from pipeline.data.sources import decompress
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import Record, parse, read
from pipeline.data.sources.sources import Source, chunks

PACK = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}


def words(number: int, count: int = 300) -> str:
    draw = random.Random(number)
    return " ".join("".join(draw.choices("abcdefghijklmnop", k=draw.randrange(2, 9))) for _ in range(count))


def found_in(folder: Path, name: str, data: bytes, **keys) -> list:
    (folder / name).write_bytes(data)
    source = Source(path=str(folder / name), **keys)
    found = list(read(source, "s"))
    cut = [item for chunk in chunks(source, "s", 2000) for item in parse(chunk)]
    assert cut == found  # what is read does not depend on where a file is cut
    return found


def damaged(member: bytes, kind: str, draw: random.Random) -> bytes:
    at = draw.randrange(20, len(member) - 12)
    return {
        "flipped": member[:at] + bytes([member[at] ^ 1 << draw.randrange(8)]) + member[at + 1 :],
        "zeros": member[:at] + bytes(10) + member[at + 10 :],
        "lost": member[:at] + member[at + 10 :],
        "noise": member[:at] + draw.randbytes(40) + member[at:],
        "cut": member[:at],
        "head": draw.randbytes(10) + member[10:],
        "checksum": member[:-6] + b"\xff\xff" + member[-4:] if member[:2] == b"\x1f\x8b" else member[:-2] + b"\0\0",
    }[kind]


@pytest.mark.parametrize("kind", ["flipped", "zeros", "lost", "noise", "cut", "head", "checksum"])
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_damaged_member_of_a_web_archive_costs_its_record(tmp_path, suffix, kind):
    """correctness 20: it cost everything behind it, and counted as one bad record. Members of one record each, as
    crawlers write them; damage at random places of any of them."""
    draw = random.Random(f"{suffix} {kind}")
    members = [
        PACK[suffix](record("conversion", words(number).encode(), f"http://a.org/{number}")) for number in range(12)
    ]
    for which in (0, 5, 11, draw.randrange(12)):
        broken = [*members]
        broken[which] = damaged(members[which], kind, draw)
        found = found_in(tmp_path, f"a.warc.{suffix}", b"".join(broken))
        good = [item.fields for item in found if isinstance(item, Record)]
        assert [(item["url"], item["text"]) for item in good] == [
            (f"http://a.org/{number}", words(number)) for number in range(12) if number != which
        ]
        bad = [item for item in found if isinstance(item, Bad)]
        reasons = {f"damaged .{suffix} data", f"truncated .{suffix} data"}
        assert len(bad) == 1 and bad[0].reason in reasons and 0 < bad[0].lost <= len(broken[which])


@pytest.mark.parametrize(
    "name, keys", [("a.jsonl", {}), ("a.txt", {"sample_by": "line"}), ("a.csv", {"columns": ["text"]})]
)
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_damaged_member_of_lines_costs_its_lines(tmp_path, suffix, name, keys):
    """correctness 20: members of five lines, as shards that were joined have them; what is read of them is what was
    written."""
    form = {"a.jsonl": lambda text: json.dumps({"text": text})}.get(name, lambda text: text)
    texts = [words(number, 60) for number in range(60)]
    parts = ["".join(form(text) + "\n" for text in texts[at : at + 5]).encode() for at in range(0, 60, 5)]
    members = [PACK[suffix](part) for part in parts]
    draw = random.Random(name + suffix)
    for which in (0, 4, 11):
        for kind in ("flipped", "cut", "head", "checksum"):
            broken = [*members]
            broken[which] = damaged(members[which], kind, draw)
            found = found_in(tmp_path, f"{name}.{suffix}", b"".join(broken), **keys)
            good = [item.fields["text"] for item in found if isinstance(item, Record)]
            around = [text for text in good if text not in texts[5 * which : 5 * which + 5]]
            assert around == texts[: 5 * which] + texts[5 * which + 5 :], (which, kind)
            bad = [item for item in found if isinstance(item, Bad)]
            assert good == around or bad[0].reason.startswith("truncated")  # then what comes before the end is read
            assert len(bad) == 1 and 0 < bad[0].lost <= len(broken[which]), (which, kind, bad)


def test_no_altered_line_is_read_of_a_flipped_bit(tmp_path):
    """correctness 20: a file of one member, longer than a checksum used to be waited for. A flipped bit altered up to
    55 of 400 lines, which were used although the checksum then failed."""
    draw = random.Random(7)
    texts = [words(number, draw.randrange(100, 900)) for number in range(400)]
    whole = gzip.compress("".join(text + "\n" for text in texts).encode())
    assert len(whole) > 1 << 16
    for _ in range(30):
        broken = bytearray(whole)
        broken[draw.randrange(20, len(whole) - 8)] ^= 1 << draw.randrange(8)
        found = found_in(tmp_path, "a.txt.gz", bytes(broken), sample_by="line")
        assert {item.fields["text"] for item in found if isinstance(item, Record)} <= set(texts)
        assert [item.reason for item in found if isinstance(item, Bad)] in (
            ["damaged .gz data"],
            ["truncated .gz data"],
        )


def test_lines_before_damage_that_is_far_into_a_member_are_said_to_be_unverified(tmp_path, monkeypatch):
    monkeypatch.setattr(decompress, "SHORT", 1 << 14)
    texts = [words(number, 600) for number in range(100)]
    member = bytearray(gzip.compress("".join(text + "\n" for text in texts).encode()))
    member[-8] ^= 1  # the checksum
    found = found_in(tmp_path, "a.txt.gz", bytes(member), sample_by="line")
    assert [item.reason for item in found if isinstance(item, Bad)] == ["damaged .gz data" + decompress.UNVERIFIED]


def test_members_that_are_cut_anywhere_lose_no_line_without_a_word(tmp_path):
    """correctness 20: bgzip cuts lines in two. The rest of a line whose beginning is lost is no record."""
    texts = [f"{number} {words(number, 60)}" for number in range(200)]
    whole = "".join(text + "\n" for text in texts).encode()
    members = [gzip.compress(whole[at : at + 5000]) for at in range(0, len(whole), 5000)]
    for which in range(len(members)):
        broken = [*members]
        broken[which] = damaged(members[which], "checksum", random.Random(which))
        found = found_in(tmp_path, "a.txt.gz", b"".join(broken), sample_by="line")
        good = [item.fields["text"] for item in found if isinstance(item, Record)]
        if which:  # of the first member nobody knows whether it ended a line
            assert set(good) <= set(texts)
        assert len(texts) - 40 < len(good) < len(texts) and len([item for item in found if isinstance(item, Bad)]) == 1


def test_a_table_whose_header_is_lost_is_not_read_with_another_one(tmp_path):
    """correctness 20: the first row that is left must not become the names of the columns."""
    members = [gzip.compress(b"text,n\nfirst,1\n"), gzip.compress(b"second,2\nthird,3\n")]
    broken = damaged(members[0], "checksum", random.Random(0)) + members[1]
    (bad,) = found_in(tmp_path, "a.csv.gz", broken)
    assert isinstance(bad, Bad) and bad.reason == "damaged .gz data" and bad.lost == len(broken)


def test_bytes_that_could_not_be_read_are_in_the_report_and_the_warning(tmp_path):
    """correctness 20"""
    members = [gzip.compress((json.dumps({"text": words(number)}) + "\n").encode()) for number in range(60)]
    for which in (7, 30):
        members[which] = damaged(members[which], "checksum", random.Random(which))
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(members))
    clean = {"sources": {"a": {"path": "a.jsonl.gz"}}, "holdout": 0, "workers": 1, "filters": {"min_letters": 0}}
    clean |= {"dedup": {"near": None}}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "t", "stages": {"clean": clean}}))
    said = succeed("clean", tmp_path / "r.yaml", cwd=tmp_path)
    lost = len(members[7]) + len(members[30])
    assert f"WARNING sources.a: {lost:,} bytes of its compressed files could not be read, in 2 places" in said
    report = json.loads((tmp_path / "runs/t/clean/current/report.json").read_text())
    assert report["sources"]["a"]["bytes_lost"] == report["total"]["bytes_lost"] == lost
    assert report["sources"]["a"]["bad"] == {"damaged .gz data": 2} and report["total"]["train_documents"] == 58


def bomb(name: str) -> bytes:
    """400 MB of zeros in less than 2 MB."""
    block = bytes(1 << 24)
    if name.endswith("gz"):
        packer = zlib.compressobj(1, wbits=31)
        return b"".join([*(packer.compress(block) for _ in range(24)), packer.flush()])
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    data = b"".join([*(stream.compress(block) for _ in range(24)), stream.flush()])
    return wide(data) if "wide" in name else data


def wide(frame: bytes) -> bytes:
    """A frame of zstd that asks for a window of 2 GiB (RFC 8878, 3.1.1.1.2)."""
    found = frame[:5] + bytes([(31 - 10) << 3]) + frame[6:]
    assert zstandard.get_frame_parameters(found).window_size == 1 << 31
    return found


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "wide.jsonl.zst", "wide.txt.zst", "a.json.zst", "a.warc.zst"]
)
def test_a_small_file_that_unpacks_to_hundreds_of_megabytes_takes_little_memory(tmp_path, name):
    """correctness 31: 184 kB of zstd with a window of 2 GiB took 2.3 GB."""
    (tmp_path / name).write_bytes(bomb(name))
    assert (tmp_path / name).stat().st_size < 2e6
    program = (
        "from pipeline.data.sources.records import read\nfrom pipeline.data.sources.sources import Source\n"
        "import zstandard\n"
        "def most(): return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) >> 10\n"
        "before = most()\n"
        f"print([item.reason for item in read(Source(path={str(tmp_path / name)!r}), 's')])\n"
        "print(most() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    reasons, megabytes = done.stdout.splitlines()
    assert reasons not in ("[]", "") and int(megabytes) < 350, done.stdout


def test_a_large_window_that_is_not_filled_is_read(tmp_path):
    """correctness 31: `zstd --long=31` writes a window of 2 GiB whatever it packs."""
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    rows = [{"text": words(number)} for number in range(500)]
    data = wide(stream.compress("".join(json.dumps(row) + "\n" for row in rows).encode()) + stream.flush())
    assert [item.fields for item in found_in(tmp_path, "a.jsonl.zst", data)] == rows
