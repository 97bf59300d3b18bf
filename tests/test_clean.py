"""Clean: what it keeps and why, duplicates against a brute-force oracle, and equal bytes whatever the workers, the
cuts and the kills."""

import collections
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cleaned import ledger, published
from harness import files_of, stage, succeed
from paths import ROOT

from pipeline.core import artifact
from pipeline.data.cleaning.normal_form import normalise
from pipeline.data.cleaning.work_units import cut_units
from pipeline.data.sources.sources import Source
from pipeline.data.tokens.documents import documents

EN = (
    "the of river water king stone light under over winter summer bread house market table letter number people morning"
    " evening garden".split()
)
UNITS: list = []
LONG = [chr(0x4E00 + i) for i in range(2000)]


def english(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(EN) + str(rng.randrange(60)).replace("0", "") for _ in range(words)]


def chinese(rng: random.Random, characters: int) -> list[str]:
    return [rng.choice(LONG) for _ in range(characters)]


def corpus(folder: Path) -> dict:
    """Two sources, English and Chinese, with every kind of thing that must be left out; returns what was planted."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    en = [" ".join(english(rng, rng.randrange(40, 160))) + "." for _ in range(400)]
    zh = ["".join(chinese(rng, rng.randrange(60, 300))) + "。" for _ in range(300)]
    near = en[5].split()
    near[20] = "changed"
    rows = [{"text": text, "lang": "en"} for text in en]
    # exact twice (one once normalised), near once
    rows += [{"text": en[3]}, {"text": f"  {en[4]} \r\n"}, {"text": " ".join(near)}]
    rows += [
        {"text": "too short"},
        {"text": "1 + 2 = 3; " * 40},
        {"text": "Ã©tÃ© â€™ " + en[9] + "â€œ" * 30},
        {"text": "\n".join(["the same line again and again"] * 9)},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[100:100] = ["{broken", '{"text": "\\ud800 half a pair"}', '{"body": "no text"}', '{"text": null}']
    rng.shuffle(lines)
    (folder / "en.jsonl").write_text("\n".join(lines), encoding="utf-8")
    packed = gzip.compress(
        "".join(json.dumps({"t": text, "n": i}) + "\n" for i, text in enumerate([*zh, zh[0], zh[1]])).encode()
    )
    (folder / "zh.jsonl.gz").write_bytes(packed[:-4])
    return {
        "read": 400 + 3 + 4 + 4 + 302 + 1,
        "bad": {"malformed JSON": 1, "lone surrogate": 1, "missing field": 2},
        "bad_zh": {"truncated .gz data": 1},
        "filtered": {"too_short": 1, "few_letters": 1, "garbled": 1, "repeated_lines": 1},
        "exact": 4,
        "near": 1,
    }


def recipe(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    block = {
        "sources": {"en": {"path": "data/en.jsonl"}, "zh": {"path": "data/zh.jsonl.gz", "text": "{t}"}},
        "holdout": 0.1,
        "unit_bytes": 20_000,
        "workers": 1,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"name": "t", "seed": 3, "stages": {"clean": block}}))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory) -> tuple[Path, dict]:
    """One uninterrupted run with one worker."""
    folder = tmp_path_factory.mktemp("clean")
    planted = corpus(folder / "data")
    succeed("clean", recipe(folder), cwd=folder)
    for name, keys in (("en", {"path": f"{folder}/data/en.jsonl"}), ("zh", {"path": f"{folder}/data/zh.jsonl.gz"})):
        UNITS.extend(cut_units(Source(**keys), name, 20_000))
    return folder, planted


def texts_of(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    output = artifact.current(folder / "runs/t/clean")
    return {split: list(documents(output, split)) for split in ("train", "heldout")}


def test_every_record_is_accounted_for(cleaned):
    folder, planted = cleaned
    report = json.loads((published(folder) / "report.json").read_text())
    total, en, zh = report["total"], report["sources"]["en"], report["sources"]["zh"]
    assert en["bad"] == planted["bad"] and zh["bad"] == planted["bad_zh"] and en["filtered"] == planted["filtered"]
    assert (total["read"], total["duplicates_exact"], total["duplicates_near"]) == (
        planted["read"],
        planted["exact"],
        planted["near"],
    )
    split = texts_of(folder)
    kept = sum(map(len, split.values()))
    rejected = ledger(folder, "en") + ledger(folder, "zh")
    assert (
        total["documents_out"] == kept == planted["read"] - len(rejected)
        and len(split["heldout"]) == total["heldout_documents"] > 20
    )
    assert total["bytes_out"] == sum(len(text.encode()) for part in split.values() for text, _, _ in part)
    for name, counts in (("en", en), ("zh", zh)):
        found = collections.Counter((entry["status"], entry["reason"]) for entry in ledger(folder, name))
        assert found == {
            (status, reason): number
            for status in ("bad", "filtered", "duplicates")
            for reason, number in counts[status].items()
        }
    assert (
        total["read"]
        == kept
        + total["bad_records"]
        + total["filtered_documents"]
        + total["duplicates_exact"]
        + total["duplicates_near"]
    )
    broken = next(entry for entry in rejected if entry["reason"] == "malformed JSON")
    assert (
        broken["excerpt"] == "{broken"
        and (folder / "data/en.jsonl").read_text().splitlines()[int(broken["place"].removeprefix("en.jsonl:")) - 1]
        == "{broken"
    )
    ids = {id for part in split.values() for _, _, id in part}
    assert all(entry["of"] in ids for entry in rejected if entry["status"] == "duplicates")
    metrics = artifact.current(folder / "runs/t/clean").metrics
    assert (
        metrics["by_source"] == report["sources"]
        and set(metrics["summary"]) == {"input", "output", "measure"}
        and metrics["heldout_bytes"] == total["heldout_bytes"]
    )


def test_order_is_that_of_the_sources_and_the_split_is_by_document(cleaned):
    folder, _ = cleaned
    split = texts_of(folder)
    wanted = [
        normalise(row["text"])
        for row in map(_row, (folder / "data/en.jsonl").read_text().splitlines())
        if row and isinstance(row.get("text"), str)
    ]
    position = {text: i for i, text in reversed(list(enumerate(wanted)))}
    for part in split.values():
        places = [position[text] for text, source, _ in part if source == "en"]
        assert [source for _, source, _ in part] == sorted(source for _, source, _ in part)
        assert len(places) == len(set(places))
    assert not {text for text, _, _ in split["train"]} & {text for text, _, _ in split["heldout"]}


def _row(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def test_the_split_does_not_move_when_a_source_is_added(cleaned, tmp_path):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    succeed("clean", recipe(tmp_path, sources={"en": {"path": "data/en.jsonl"}}), cwd=tmp_path)
    alone, together = texts_of(tmp_path), texts_of(folder)
    for part in ("train", "heldout"):
        assert [row for row in together[part] if row[1] == "en"] == alone[part]


@pytest.mark.parametrize("workers, unit", [(2, 10_000), (1, 4 << 20)])
def test_workers_and_cuts_change_nothing(cleaned, tmp_path, workers, unit):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    succeed("clean", recipe(tmp_path, workers=workers, unit_bytes=unit), cwd=tmp_path)
    assert files_of(published(tmp_path)) == files_of(published(folder))


@pytest.mark.parametrize("fault", ["work:3", "save:5", "save:last", "publish:1", "publish:2"])
def test_killed_and_resumed_is_equal(cleaned, tmp_path, fault):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    path = recipe(tmp_path)
    if fault == "save:last":  # the held-out shard: every unit and the other shard are done
        fault = f"save:{len(UNITS) + 2}"
    code, text = stage("clean", path, cwd=tmp_path, fault=fault)
    assert code == -signal.SIGKILL, text
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("runs/t/clean/*/work/*/*/*.parquet")}
    succeed("clean", path, cwd=tmp_path)
    assert files_of(published(tmp_path)) == files_of(published(folder))
    assert fault != "work:3" or len(before) == 3


def test_killed_at_any_moment_with_two_workers_is_equal(cleaned, tmp_path):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    path = recipe(tmp_path, workers=2, unit_bytes=10_000)
    rng = random.Random(os.getpid())  # another moment in each run of the suite
    for _ in range(2):
        code, _ = stage("clean", path, cwd=tmp_path, kill_after=rng.uniform(0.1, 3))
        if code == 0:
            break
    succeed("clean", path, cwd=tmp_path)
    assert files_of(published(tmp_path)) == files_of(published(folder))


def test_run_as_a_script_with_workers_that_end_with_it(cleaned, tmp_path):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    script = ROOT / "pipeline/clean.py"
    command = [sys.executable, str(script), str(recipe(tmp_path, workers=2, unit_bytes=10_000))]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while (
        not list(tmp_path.glob("runs/t/clean/*/work/*/*/*.parquet")) and time.time() < deadline and child.poll() is None
    ):
        time.sleep(0.01)
    workers = _children(child.pid)
    child.kill()
    child.wait()
    assert workers
    while any(_alive(pid) for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if _alive(pid)]
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0
    assert files_of(published(tmp_path)) == files_of(published(folder))


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("limit", [57])
def test_limit_takes_the_first_records_whatever_the_cuts(cleaned, tmp_path, limit):
    folder, _ = cleaned
    kept = []
    for name, unit in (("a", 2_000), ("b", 4 << 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(folder / "data")
        sources = {"zh": {"path": "data/zh.jsonl.gz", "text": "t", "limit": limit}}
        succeed("clean", recipe(tmp_path / name, sources=sources, unit_bytes=unit, holdout=0), cwd=tmp_path / name)
        kept.append(files_of(published(tmp_path / name)))
    assert kept[0] == kept[1]
    assert json.loads(kept[0]["report.json"])["total"]["documents_in"] == limit


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sources": {}}, "sources"),
        ({"sources": {"a": {"path": "nosuch.jsonl"}}}, "sources.a: nosuch.jsonl does not exist"),
        ({"sources": {"a": {"path": "nosuch/*.jsonl"}}}, "sources.a: no file matches nosuch/*.jsonl"),
        ({"sources": {"a": {"path": "empty.jsonl"}}}, "empty.jsonl is empty"),
        ({"sources": {"a": {"path": "blank.jsonl"}}}, "sources.a: has no record"),
        (
            {"sources": {"a": {"path": "cut.json"}}},
            "sources.a: none of its 1 record is good; the first: cut.json:1: malformed JSON",
        ),
        (
            {"sources": {"a": {"path": "cut.jsonl.gz"}}},
            "none of its 1 record is good; the first: cut.jsonl.gz:1: truncated .gz data",
        ),
        ({"sources": {"a": {"path": "data/en.jsonl", "text": "body.x"}}}, "no field 'body.x'"),
        (
            {"sources": {"a": {"path": "data/en.jsonl", "where": {"lang": "xx"}}}},
            "has no record that `where` and `part` select",
        ),
        ({"sources": {"a": {"path": "data/en.jsonl", "pth": "x"}}}, "path"),
        (
            {"sources": {"a": {"path": "data/en.jsonl", "package": "x==1", "member": "y"}}},
            "exactly one of path, package and dataset",
        ),
        ({"sources": {"a": {"path": "gbk.txt"}}}, "gbk.txt: invalid UTF-8"),
        ({"sources": {"a": {"path": "gbk.txt"}}}, "if the text is not UTF-8, set encoding, such as encoding: gb18030"),
        (
            {"sources": {"a": {"path": "gbk.txt", "encoding": "ascii"}}},
            "the source says encoding: ascii, but its files",
        ),
        (
            {"sources": {"a": {"path": "gbk.txt", "encoding": "gb1803"}}},
            "'gb1803' is not an encoding that Python knows",
        ),
        ({"language": {"keep": ["en", "cn"]}}, "'cn' is not a language that can be detected"),
        ({"quality": {"min_score": 0.9}}, "min_score has no effect without a classifier"),
        ({"perplexity": {"max_en": 900}}, "max_en has no effect without a language model"),
        (
            {"max_bad": 0.001},
            "sources.en: 4 of 411 records are bad (1.0%, most often: missing field), more than max_bad 0.001",
        ),
        ({"filters": {"min_tokens": 9999}}, "sources.en: nothing is left of its 411 records (most often: too_short)"),
        ({"holdout": 0.9999}, "no document is left for train"),
        ({"holdout": 0.0001}, "no document is left for heldout"),
    ],
)
def test_a_mistake_is_one_sentence(cleaned, tmp_path, change, message):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "gbk.txt").write_bytes("今天我们来介绍一种新的方法".encode("gbk"))
    (tmp_path / "cut.json").write_text('[{"text": "a"')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:20])
    code, text = stage("clean", recipe(tmp_path, **change), cwd=tmp_path)
    sentences = [
        line
        for line in text.strip().splitlines()
        if not line.startswith("WARNING sources.zh: 1 file ends early (truncated .gz data)")
    ]
    assert code == 2 and len(sentences) == 1 and message in sentences[0] and sentences[0].startswith("error: "), text


def test_an_address_that_no_record_has_is_said(cleaned, tmp_path):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    text = succeed("clean", recipe(tmp_path, dedup={"url": "adress"}), cwd=tmp_path)
    assert "WARNING dedup.url: 'adress' is not in the first record of any source" in str(text)


def test_max_bad_can_be_raised_afterwards(cleaned, tmp_path):
    """It is no part of the result, so the work done so far is gone on with."""
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    path = recipe(tmp_path)
    assert stage("clean", path, "clean.max_bad=0", cwd=tmp_path)[0] == 2
    succeed("clean", path, cwd=tmp_path)
    assert files_of(published(tmp_path)) == files_of(published(folder))
