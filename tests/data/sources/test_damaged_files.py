"""Damaged sources through the stage: what can be read is kept, what cannot is counted by source and reason with its
place; and one big file is many units, made in parallel and not made again."""

import gzip
import json
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from harness import files_of, stage, succeed

from pipeline import clean
from pipeline.core.errors import UserError
from pipeline.data.cleaning import unit_files
from pipeline.data.sources.csv_files import REPEATED
from pipeline.data.sources.formats import NULS


def text(rng: random.Random, chinese: bool = False) -> str:
    if chinese:
        return "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(90)) + "。"
    return " ".join("".join(rng.choices("abcdefghilmnoprstu", k=rng.randrange(3, 9))) for _ in range(60)) + "."


def warc(body: bytes, length: int | None = None) -> bytes:
    return (
        "WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://a.org/\r\nContent-Length:"
        f" {len(body) if length is None else length}\r\n\r\n".encode()
        + body
        + b"\r\n\r\n"
    )


def run(folder: Path, sources: dict, *words, **options) -> tuple[int, str]:
    block = {
        "sources": {name: {"path": path} for name, path in sources.items()},
        "holdout": 0.1,
        "max_bad": 0.5,
        "workers": 1,
        "dedup": {"near": None},
    }
    (folder / "r.yaml").write_text(json.dumps({"name": "t", "stages": {"clean": block}}))
    return stage("clean", "r.yaml", *words, cwd=folder, **options)


def test_damage_of_every_source_is_counted_with_its_place(tmp_path):
    rng = random.Random(0)
    # equal ids are no duplicates
    lines = [
        json.dumps({"id": number % 7, "text": text(rng, number % 2 == 1)}, ensure_ascii=False) for number in range(2000)
    ]
    packed = "\n".join(lines).encode()
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(packed)[: len(zstandard.compress(packed)) // 2])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(packed)[: len(gzip.compress(packed)) // 2])
    pages = [warc(text(rng).encode()) for _ in range(12)]
    (tmp_path / "a.warc").write_bytes(
        b"".join(
            [
                *pages[:3],
                warc(text(rng).encode(), 9),
                *pages[3:7],
                warc(text(rng).encode(), 700),
                pages[7],
                warc(text(rng).encode(), 10**6),
                pages[8],
                warc(text(rng).encode(), 10**12),
                *pages[9:],
            ]
        )
    )
    table = pyarrow.Table.from_pylist([{"text": text(rng)} for _ in range(400)])
    pyarrow.parquet.write_table(
        table,
        tmp_path / "a.parquet",
        row_group_size=100,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    at = pyarrow.parquet.read_metadata(tmp_path / "a.parquet").row_group(2).column(0).data_page_offset
    raw[at : at + 30] = b"\xff" * 30  # the head of the third group's page
    (tmp_path / "a.parquet").write_bytes(raw)
    documents = {
        "full.txt": text(rng),
        "empty.txt": "",
        "blank.txt": " \n\n\t\n",
        "nul.txt": "\0" * 900,
        "mixed.txt": text(rng) + "\0" + text(rng, True),
    }
    for name, content in documents.items():
        (tmp_path / "docs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "docs" / name).write_text(content)
    (tmp_path / "docs/bytes.txt").write_bytes(text(rng).encode() + b"\xff\xfe\xfd")

    code, said = run(
        tmp_path,
        {"gz": "cut.jsonl.gz", "zst": "cut.jsonl.zst", "warc": "a.warc", "table": "a.parquet", "docs": "docs/*.txt"},
        "clean.filters.max_garbled=0.01",
    )
    assert code == 0 and "Traceback" not in said, said
    output = tmp_path / "runs/t/clean/current"
    report = json.loads((output / "report.json").read_text())
    bad = {name: entry["bad"] for name, entry in report["sources"].items()}
    assert {name: bad[name] for name in ("gz", "zst", "docs")} == {
        "gz": {"truncated .gz data": 1},
        "zst": {"truncated .zst data": 1},
        "docs": {"invalid UTF-8": 1, NULS: 1},
    }
    assert bad["warc"] == {"WARC record with a wrong length": 3, "longer than 64 MiB": 1} and bad["table"] == {
        "damaged parquet data": 1
    }
    # three whole groups, and the damage
    assert report["sources"]["warc"]["read"] == 16 and report["sources"]["table"]["read"] == 301
    read = {name: report["sources"][name]["read"] - 1 for name in ("gz", "zst")}
    assert min(read.values()) > 500 and report["sources"]["gz"]["duplicates"].get("exact", 0) + report["sources"][
        "zst"
    ]["duplicates"].get("exact", 0) == min(read.values())
    places = {
        name: [entry["place"] for reasons in report["funnel"]["bad"][name].values() for entry in reasons]
        for name in bad
    }
    places["warc"].sort(key=lambda place: int(place[7:]))
    places["docs"].sort()
    assert places == {
        "gz": [f"cut.jsonl.gz:{read['gz'] + 1}"],
        "zst": [f"cut.jsonl.zst:{read['zst'] + 1}"],
        "warc": ["a.warc:4", "a.warc:9", "a.warc:11", "a.warc:13"],
        "table": ["a.parquet:201"],
        "docs": ["bytes.txt", "nul.txt"],
    }, places
    kept = {
        row["text"] for split in ("train", "heldout") for row in pyarrow.parquet.read_table(output / split).to_pylist()
    }
    assert (
        documents["mixed.txt"].replace("\0", "") in kept
        and documents["full.txt"] in kept
        and not any("\0" in item for item in kept)
    )
    for name in bad:
        rejected = (
            zstandard.ZstdDecompressor()
            .stream_reader((output / "rejected" / f"{name}.jsonl.zst").read_bytes())
            .read()
            .decode()
            .splitlines()
        )
        assert Counter(entry["reason"] for entry in map(json.loads, rejected) if entry["status"] == "bad") == bad[name]
    code, said = run(tmp_path, {"warc": "a.warc"}, "clean.max_bad=0.1")
    assert code == 2 and "4 of 16 records are bad" in said and "Traceback" not in said


def test_bad_pages_are_a_share_of_the_pages(tmp_path):
    """Requests, metadata and images of an archive do not make its damaged pages fewer."""
    rng = random.Random(2)

    def record(kind: str, body: bytes) -> bytes:
        return warc(body).replace(b"conversion", kind.encode())

    def response(body: bytes, more: str = "") -> bytes:
        return record("response", f"HTTP/1.1 200 OK\r\n{more}\r\n".encode() + body)

    plain, packed = "Content-Type: text/plain\r\n", "Content-Type: text/plain\r\nContent-Encoding: gzip\r\n"
    pages = [response(text(rng).encode(), plain) for _ in range(45)] + [response(b"\x1f\x8bj\xff", packed)] * 5
    other = record("request", b"GET / HTTP/1.1\r\n\r\n") + record("metadata", b"a: b")
    other += response(b"\x89PNG", "Content-Type: image/png\r\n")
    (tmp_path / "a.warc").write_bytes(b"".join(page + other for page in pages))
    code, said = run(tmp_path, {"a": "a.warc"}, "clean.max_bad=0.09")
    assert code == 2 and "sources.a: 5 of 50 records are bad (10.0%" in said, said
    code, said = run(tmp_path, {"a": "a.warc"}, "clean.max_bad=0.11")
    assert code == 0, said


def test_a_table_with_a_repeated_column_costs_itself_and_no_other(tmp_path):
    """Wherever it stands among the files: one record that names the column, and a word that a file is lost."""
    rng = random.Random(3)
    for number in range(4):
        rows = "".join(f'{n},"{text(rng)}"\n' for n in range(20))
        (tmp_path / f"{number}.csv").write_text(("n,text\n" if number != 2 else "text,text\n") + rows)
    code, said = run(tmp_path, {"a": "*.csv"})
    assert code == 0 and "WARNING sources.a: 1 file has two columns of one name" in said, said
    output = tmp_path / "runs/t/clean/current"
    counts = json.loads((output / "report.json").read_text())["sources"]["a"]
    assert counts["bad"] == {REPEATED: 1} and counts["read"] == 61
    with zstandard.open(output / "rejected/a.jsonl.zst") as rejected:
        entry = next(e for e in map(json.loads, rejected.read().splitlines()) if e["status"] == "bad")
    assert entry["place"] == "2.csv:1" and entry["excerpt"].startswith("'text': text,text"), entry
    whole = files_of(output)
    shutil.rmtree(tmp_path / "runs")
    code, said = run(tmp_path, {"a": "*.csv"}, "clean.unit_bytes=1024")
    assert code == 0 and whole == files_of(output), said
    code, said = run(tmp_path, {"a": "2.csv"})
    assert code == 2 and f"none of its 1 record is good; the first: 2.csv:1: {REPEATED}" in said, said
    assert "'text': text,text" in said and "Traceback" not in said
    (tmp_path / "clean.csv").write_text(f'n,text\n1,"{text(rng)}"\n')
    sets = json.dumps({"e": {"path": ["clean.csv", "2.csv"]}})  # nothing must be missing from what is looked for
    code, said = run(tmp_path, {"a": "[013].csv"}, f"clean.decontaminate={{sets: {sets}}}")
    assert code == 2 and f"decontaminate.sets.e: 2.csv:1: {REPEATED}" in said, said


@pytest.mark.parametrize(
    "suffix", [*(pytest.param(suffix, marks=pytest.mark.slow) for suffix in ("jsonl", "jsonl.zst")), "parquet"]
)
def test_one_big_file_is_many_units_that_survive_a_kill(tmp_path, suffix):
    rng = random.Random(1)
    rows = [{"text": text(rng, number % 3 == 0)} for number in range(1500)]
    path = tmp_path / f"big.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=150)
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(zstandard.compress(data) if suffix.endswith("zst") else data)
    words = [f"clean.unit_bytes={8000 if suffix.endswith('zst') else 30000}", "clean.workers=2"]
    code, said = run(tmp_path, {"big": path.name}, *words, fault="work:3")
    assert code == -signal.SIGKILL, said
    done = {unit.name: unit.stat().st_mtime_ns for unit in tmp_path.glob("runs/t/clean/*/work/units-*/big/*.parquet")}
    assert len(done) >= 3
    # all units are there, and nothing is published yet
    code, said = run(tmp_path, {"big": path.name}, *words, fault="publish:1")
    after = {unit.name: unit.stat().st_mtime_ns for unit in tmp_path.glob("runs/t/clean/*/work/units-*/big/*.parquet")}
    assert (
        code == -signal.SIGKILL and len(after) >= max(4, len(done)) and {name: after[name] for name in done} == done
    ), "a finished unit was made again"
    succeed("clean", "r.yaml", *words, cwd=tmp_path)
    succeed("clean", "r.yaml", "output=whole", "clean.workers=1", cwd=tmp_path)
    assert files_of(tmp_path / "runs/t/clean/current") == files_of(tmp_path / "whole/t/clean/current")
    assert json.loads((tmp_path / "runs/t/clean/current/report.json").read_text())["total"]["documents_out"] == len(
        rows
    )


def test_a_changed_byte_of_an_outcome_is_refused_or_changes_nothing(tmp_path):
    """Parquet has checksums of pages, not of its footer and headers, where names and numbers of rows stand."""
    path = tmp_path / "run.partial" / "work" / "unit.parquet"
    path.parent.mkdir(parents=True)
    unit_files.write(pyarrow.table({"a": [1, 2], "b": [3, 4]}), path)
    whole, refused = path.read_bytes(), Counter()
    for mask in (0x55, 0xFF):
        for at, byte in enumerate(whole):
            path.write_bytes(whole[:at] + bytes([byte ^ mask]) + whole[at + 1 :])
            try:
                assert unit_files.read(path, ["a", "b"]).to_pydict() == {"a": [1, 2], "b": [3, 4]}, (at, mask)
            except unit_files.CorruptFile as corrupt:
                refused[corrupt.why.split(" (")[0]] += 1
    assert refused["is damaged"] > len(whole)


def test_only_one_file_that_is_damaged_three_times_ends_the_stage(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    config = clean.Config.model_validate({"kind": "clean", "sources": {"a": {"path": str(tmp_path / "a.jsonl")}}})
    found = []

    def corrupt(*_):
        if not left:
            return {"done": True}
        raise unit_files.CorruptFile(tmp_path / left.pop(), "cut")

    monkeypatch.setattr(clean, "_run", corrupt)
    monkeypatch.setattr(clean, "say", found.append)
    left = ["b", "a", "b", "a"]  # two files, each made again twice: a bad disk, but the work goes on
    assert clean.run(config, {}, SimpleNamespace(path=tmp_path)) == {"done": True} and len(found) == 4
    left = ["a", "b", "a", "a"]
    with pytest.raises(UserError, match="/a: cut, for the third time; check the disk"):
        clean.run(config, {}, SimpleNamespace(path=tmp_path))
