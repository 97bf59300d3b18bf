"""The ledger: every count against one made from the published files alone, and `alma inspect data` as a person reads
it."""

import collections
import json
import random
import re
import subprocess
import sys

import pyarrow.parquet
import pytest
import zstandard
from harness import files_of, succeed

from pipeline.data.cleaning.normal_form import normalise

ALMA = [sys.executable, "-m", "pipeline.cli"]
QUESTION = "which of the seven bridges over the old river was built before the great fire of the year"
FRAGE = "古代长江上最早建成的浮桥是在哪一个朝代由谁主持修建完成的呢"


def prose(rng: random.Random, language: str, size: int) -> str:
    if language == "zh":
        return "".join(chr(rng.randrange(0x4E00, 0x5600)) for _ in range(size)) + "。"
    return " ".join("".join(rng.choices("abcdefghilmnoprstu", k=rng.randrange(3, 9))) for _ in range(size)) + "."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two sources with everything that can be left out, once with small units and once with one unit a source and
    two workers."""
    folder = tmp_path_factory.mktemp("ledger")
    rng = random.Random(2)
    for name, language in (("web", "en"), ("书", "zh")):
        texts = [prose(rng, language, rng.randrange(30, 200)) for _ in range(120)]
        texts += texts[:9] + [texts[0]] * 3
        texts += [text.replace(text[40:44], "wxyz") for text in texts[10:14]]  # near
        texts += [prose(rng, language, 3) for _ in range(11)] + ["1 + 2 = 3; " * 30] * 2 + ["7 2 9"]
        texts += [
            f"{prose(rng, language, 40)} {QUESTION if language == 'en' else FRAGE} {prose(rng, language, 40)}"
            for _ in range(6)
        ]
        lines = [json.dumps({"text": text, "n": number}, ensure_ascii=False) for number, text in enumerate(texts)]
        lines += ["{broken", '{"body": 1}', '{"body": 2}', "[" * 3000]
        rng.shuffle(lines)
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "eval.jsonl").write_text(
        "\n".join(
            json.dumps({"q": text})
            for text in (
                QUESTION,
                FRAGE,
                "another question that nobody has ever written into the text of a page",
                "short",
            )
        )
    )
    block = {
        "sources": {"web": {"path": "web.jsonl"}, "books_zh": {"path": "书.jsonl"}},
        "holdout": 0.1,
        "workers": 1,
        "unit_bytes": 5000,
        "decontaminate": {"sets": {"exam": {"path": "eval.jsonl", "text": "q"}}},
        "dedup": {"upsample": {3: 2}, "lines": 8},
    }
    for name, changes in (("a", {}), ("b", {"workers": 2, "unit_bytes": 4 << 20})):
        (folder / f"{name}.yaml").write_text(
            json.dumps({"name": name, "seed": 1, "stages": {"clean": {**block, **changes}}})
        )
        succeed("clean", f"{name}.yaml", cwd=folder)
    return folder


def rejected(output, source: str) -> list[dict]:
    raw = zstandard.ZstdDecompressor().stream_reader((output / "rejected" / f"{source}.jsonl.zst").read_bytes()).read()
    return [json.loads(line) for line in raw.decode().splitlines()]


def test_the_ledger_does_not_depend_on_units_and_workers(made):
    assert files_of(made / "runs/a/clean/current") == files_of(made / "runs/b/clean/current")


def test_the_funnel_against_the_published_files(made):
    output = made / "runs/a/clean/current"
    report = json.loads((output / "report.json").read_text())
    shards = {split: pyarrow.parquet.read_table(output / split).to_pylist() for split in ("train", "heldout")}
    for source, file in (("web", "web"), ("books_zh", "书")):
        steps = report["funnel"]["steps"][source]
        lines = (made / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        found, bytes_read = collections.Counter(), collections.Counter()
        gone = set()
        for entry in rejected(output, source):
            found[entry["status"], entry["reason"]] += 1
            number = int(entry["place"].rpartition(":")[2])
            gone.add(number)
            if entry["status"] in ("filtered", "duplicates"):
                bytes_read[entry["status"], entry["reason"]] += len(json.loads(lines[number - 1])["text"].encode())
        cells = [
            (status, reason, cell)
            for statuses in steps.values()
            for status, reasons in statuses.items()
            for reason, cell in reasons.items()
        ]
        for status, reason, _ in cells:
            if status in ("filtered", "duplicates", "bad"):
                same = [cell for other, why, cell in cells if (other, why) == (status, reason)]
                assert (sum(cell[0] for cell in same), sum(cell[1] for cell in same)) == (
                    found[status, reason],
                    bytes_read[status, reason],
                )
        assert {(status, reason) for status, reason, _ in cells if status != "kept"} == set(found)
        kept = sum(len(json.loads(line)["text"].encode()) for number, line in enumerate(lines, 1) if number not in gone)
        assert sum(cell[1] for status, _, cell in cells if status == "kept") == kept
        for split, rows in shards.items():
            once = {row["id"]: row["text"] for row in rows if row["source"] == source}
            mine = [cell for status, reason, cell in cells if (status, reason) == ("kept", split)]
            assert (sum(cell[0] for cell in mine), sum(cell[2] for cell in mine)) == (
                len(once),
                sum(len(text.encode()) for text in once.values()),
            )
        assert sum(cell[0] for _, _, cell in cells) == len(lines) == report["sources"][source]["read"]
        # 1 + 2 = 3 has no CJK letter
        assert set(steps) == {"en" if source == "web" else "zh", ""} | ({"en"} if source == "books_zh" else set())
        places = [entry for entry in rejected(output, source) if entry["reason"] == "missing field"]
        assert report["funnel"]["bad"][source]["missing field"] == [
            {key: entry[key] for key in ("place", "excerpt")} for entry in places
        ]


def test_clusters_and_samples_of_duplicates(made):
    output = made / "runs/a/clean/current"
    report = json.loads((output / "report.json").read_text())["funnel"]["duplicates"]
    copies = [
        {**entry, "source": source}
        for source in ("web", "books_zh")
        for entry in rejected(output, source)
        if entry["status"] == "duplicates"
    ]
    sizes = collections.Counter(entry["of"] for entry in copies)
    rows = {
        row["id"]: row
        for split in ("train", "heldout")
        for row in pyarrow.parquet.read_table(output / split).to_pylist()
    }
    expected = collections.Counter(sizes[id] + 1 for id in rows)
    assert {row["cluster"] for row in rows.values()} == set(expected)
    assert {least: (number, members) for least, number, members in report["clusters"]} == {
        1: (expected[1], expected[1]),
        2: (expected[2], 2 * expected[2]),
        5: (expected[5], 5 * expected[5]),
    }
    assert [entry["documents"] for entry in report["largest"]] == sorted(
        (size + 1 for size in sizes.values()), reverse=True
    )[:5]
    assert all(normalise(rows[entry["id"]]["text"]).startswith(entry["excerpt"]) for entry in report["largest"])
    for reason, samples in report["samples"].items():
        mine = {entry["id"]: entry for entry in copies if entry["reason"] == reason}
        assert [sample["id"] for sample in samples] == sorted(mine)[:5]
        for sample in samples:
            assert sample["of"]["id"] == mine[sample["id"]]["of"] and normalise(
                rows[sample["of"]["id"]]["text"]
            ).startswith(sample["of"]["excerpt"])
            assert ("alike" in sample) == (reason == "near") and sample.get("alike", 1) >= 0.7
    assert sum(number for _, number in report["alike"]) == sum(entry["reason"] == "near" for entry in copies) == 8


def inspect(folder, *words) -> tuple[int, str]:
    done = subprocess.run([*ALMA, "inspect", "data", *words], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_inspect_shows_that_counts_reconcile(made):
    code, text = inspect(made, "a.yaml")
    report = json.loads((made / "runs/a/clean/current/report.json").read_text())
    total = report["total"]
    assert code == 0 and max(map(len, text.splitlines())) <= 100
    assert (
        "NOT" not in text
        and f"= read {total['read']:,} = " in text
        and f"= heldout: {total['heldout_documents']} rows" in text
    )
    summed = re.search(r"= read \S+ = ([^=]*?)= train", text, re.S).group(1)
    assert sum(int(number.replace(",", "")) for number in re.findall(r"[\d,]+", summed)) == total["read"]
    assert f"{total['train_copies']} of them copies by `upsample`" in text
    assert (
        re.search(r"contaminated +12 ", text)
        and re.search(r"exam +4 +2 \(50.0%\) +12 +1", text)
        and "web: malformed JSON: first at web.jsonl:" in text
    )


def test_inspect_goes_deep(made):
    code, text = inspect(made, "a.yaml", "--reason", "too_short", "--samples", "2")
    entry = json.loads((made / "runs/a/clean/current/report.json").read_text())["rules"]["rules"]["too_short"]
    assert code == 0 and "filters.min_tokens: other bounds" in text and "dropped by all rules" in text
    for sample in entry["samples"][:2]:
        assert f"[{sample['value']:g}] {sample['source']} {sample['place']}" in text and sample["excerpt"] in text
    assert entry["samples"][2]["place"] + "\n" not in text
    code, text = inspect(made, "a.yaml", "--reason", "contaminated", "--source", "books_zh")
    assert "dropped by all rules" not in text
    assert code == 0 and text.count("[exam] books_zh 书.jsonl:") == 5 and "web.jsonl" not in text
    code, text = inspect(made, "a.yaml", "--reason", "near")
    assert code == 0 and text.count("kept for it: ") == 5 and "signatures alike" in text
    code, text = inspect(made, "a.yaml", "--reason", "malformed JSON", "--samples", "3")
    assert code == 0 and "{broken" in text and "web.jsonl" in text


def test_inspect_refuses_what_is_not_there(made):
    for words, said in (
        (["--source", "wab"], "no such source; it has books_zh, web"),
        (["--reason", "garbeld"], "nothing was dropped for it"),
        (["tokenizer"], "no stage is called"),
        (["clean.holdout=0.2", "output=elsewhere"], "has published nothing yet"),
    ):
        code, text = inspect(made, "a.yaml", *words)
        assert code == 2 and said in text and "Traceback" not in text and text.count("error:") == 1, text


@pytest.mark.parametrize("unit_bytes", [2000, 4 << 20])
def test_rejected_documents_are_kept_whole_where_that_is_asked_for(tmp_path, unit_bytes):
    """correctness 24: filtered ones, duplicates, and records whose text is missing; masked, and nothing else changes."""
    rng = random.Random(24)
    long = prose(rng, "en", 200)
    filtered = "\n".join(["mail me at jane.doe@mail.org"] + [prose(rng, "zh", 40)] * 30)
    rows = [{"text": long}, {"text": long}, {"text": filtered}, {"text": prose(rng, "en", 300)}]
    rows += [
        {"body": "x" * 900},
        {"text": "too short"},
        {"text": long.replace(long[40:44], "wxyz") + " jane.doe@mail.org"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows] + ['{"broken": ' + "y" * 900]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = {}
    for keep in ("excerpt", "full"):
        block = {"sources": {"s": {"path": "a.jsonl"}}, "mask": {"use": ["email"]}, "max_bad": 1, "holdout": 0}
        block |= {"unit_bytes": unit_bytes, "workers": 1, "keep_rejected": keep}
        (tmp_path / f"{keep}.yaml").write_text(json.dumps({"name": keep, "seed": 1, "stages": {"clean": block}}))
        succeed("clean", f"{keep}.yaml", cwd=tmp_path)
        made[keep] = tmp_path / "runs" / keep / "clean/current"
    short, full = rejected(made["excerpt"], "s"), rejected(made["full"], "s")
    assert [{key: value for key, value in entry.items() if key != "text"} for entry in full] == short
    assert not any("text" in entry for entry in short)
    texts = {(entry["status"], entry["reason"]): entry.get("text") for entry in full}
    assert texts["filtered", "repeated_lines"] == filtered.replace("jane.doe@mail.org", "[EMAIL]")
    assert texts["filtered", "too_short"] == "too short"
    assert texts["duplicates", "exact"] == long
    assert len(texts["duplicates", "near"]) >= len(long) and texts["duplicates", "near"][:40] == long[:40]
    assert json.loads(texts["bad", "missing field"]) == {"body": "x" * 900}
    assert texts["bad", "malformed JSON"] is None  # it is a part of no record
    for name in ("report.json", "train/part-00000.parquet"):
        assert (made["excerpt"] / name).read_bytes() == (made["full"] / name).read_bytes()
