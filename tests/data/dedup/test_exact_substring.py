"""Repeated lines and runs of tokens are removed, the first occurrence stays."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from cleaned import plain_tokens, published
from harness import files_of, stage, succeed
from word_corpus import words, write

from pipeline.data.cleaning import unit_files
from pipeline.data.cleaning.process_pool import Pool
from pipeline.data.dedup import exact_substring, external_sort

LONG = [chr(0x4E00 + i) for i in range(2000)]


def rows_of(folder: Path, split: str = "train") -> list[dict]:
    return [
        row
        for path in sorted((published(folder) / split).glob("*.parquet"))
        for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


def report_of(folder: Path) -> dict:
    return json.loads((published(folder) / "report.json").read_text())


def test_addresses_lines_and_runs_of_an_earlier_output_stood_before(tmp_path):
    """What the earlier output holds is what an oracle has seen before the first new document; it is not changed
    itself."""
    rng = random.Random(4)
    shared = [words(rng, 70) for _ in range(4)]
    footers = [" ".join(words(rng, 9)) for _ in range(3)]

    def document(i: int, new: bool) -> dict:
        text = (
            " ".join(words(rng, 40))
            + " "
            + " ".join(shared[i % 4])
            + " "
            + " ".join(words(rng, 40))
            + "\n"
            + footers[i % 3]
            + "\n"
            + " ".join(words(rng, 30))
        )
        return {"text": text, "url": f"https://example.org/{i if i % 5 or not new else 0}"}

    old, new = [document(i, False) for i in range(0, 9)], [document(i, True) for i in range(20, 40)]
    dedup = {"lines": 5, "runs": 50, "near": False, "url": "url"}
    succeed("clean", write(tmp_path / "one", {"z": old}, dedup=dedup), cwd=tmp_path / "one")
    before = [row["text"] for row in rows_of(tmp_path / "one")]
    inputs = {"earlier": str(published(tmp_path / "one").resolve())}
    succeed("clean", write(tmp_path / "two", {"a": new}, dedup=dedup, inputs=inputs), cwd=tmp_path / "two")
    # of the others the address is that of the first old one
    known = [row["text"] for i, row in zip(range(20, 40), new, strict=True) if i % 5]
    seen = {tuple(plain_tokens(line)) for text in before for line in text.split("\n")}
    without = ["\n".join(line for line in text.split("\n") if tuple(plain_tokens(line)) not in seen) for text in known]
    marks = plain_runs(before + without, 50)[len(before) :]
    expected = [
        [token for token, gone in zip(plain_tokens(text), mark, strict=True) if not gone]
        for text, mark in zip(without, marks, strict=True)
    ]
    found = rows_of(tmp_path / "two")
    assert [plain_tokens(row["text"]) for row in found] == expected and len(expected) == 16
    assert all(sum(mark) == 70 for mark in marks) and report_of(tmp_path / "two")["total"]["duplicates_url"] == 4
    assert [row["text"] for row in rows_of(tmp_path / "one")] == before
    succeed("clean", write(tmp_path / "bare", {"z": old}), cwd=tmp_path / "bare")
    inputs = {"earlier": str(published(tmp_path / "bare").resolve())}
    code, text = stage(
        "clean", write(tmp_path / "three", {"a": new}, dedup=dedup, inputs=inputs), cwd=tmp_path / "three"
    )
    assert code == 2 and "has no addresses to compare with" in text


def test_repeated_lines_go_and_bytes_reconcile(tmp_path):
    rng = random.Random(3)
    footer = " ".join(words(rng, 8))
    texts = ["\n".join([" ".join(words(rng, 30)), footer, "short", " ".join(words(rng, 30))]) for _ in range(40)]
    # nothing of its own
    texts.append("\n".join([footer, footer.upper(), *texts[0].split("\n")[3:], *texts[1].split("\n")[:1]]))
    texts.append(texts[7].split("\n")[0] + "\n" + " ".join(words(rng, 40)))
    succeed("clean", write(tmp_path, {"a": [{"text": text} for text in texts]}, dedup={"lines": 5}), cwd=tmp_path)
    seen: set = set()
    expected = []
    for text in texts:
        kept = []
        for line in text.split("\n"):
            key = tuple(plain_tokens(line))
            if len(key) < 5 or key not in seen:
                kept.append(line)
            seen.add(key)
        expected.append("\n".join(kept))
    expected = [text for text in expected if len(plain_tokens(text)) >= 20]
    assert [row["text"] for row in rows_of(tmp_path)] == expected and len(expected) == 41
    total = report_of(tmp_path)["total"]
    assert (total["repeated_text"], total["edited_documents"]) == (1, 40)
    assert total["train_bytes"] == sum(len(text.encode()) for text in expected)
    assert total["bytes_in"] == total["train_bytes"] + total["removed_bytes"] + len(texts[40].encode())


def plain_runs(texts: list[str], length: int) -> list[list[bool]]:
    """Which tokens stand in a run of `length` tokens that stood before; by a dictionary of all runs."""
    seen: set = set()
    found = []
    for text in texts:
        known = plain_tokens(text)
        gone = [False] * len(known)
        for i in range(len(known) - length + 1):
            run = tuple(known[i : i + length])
            if run in seen:
                gone[i : i + length] = [True] * length
            seen.add(run)
        found.append(gone)
    return found


@pytest.mark.parametrize("length, parts", [(50, False), (9, True)])
def test_repeated_runs_against_a_dictionary_of_all_runs(tmp_path, length, parts, monkeypatch):
    """Exactly the runs of at least `length` tokens, whatever stands between tokens, also when everything is sorted
    in many parts on disk."""
    if parts:
        monkeypatch.setattr(external_sort, "PARTITION", 1 << 10)
    rng = random.Random(length)
    pool_of = [words(rng, 3 * length) for _ in range(6)] + [rng.choices(LONG, k=3 * length) for _ in range(6)]
    texts = []
    for _ in range(120):
        pieces = []
        for _ in range(rng.randrange(1, 5)):
            source = rng.choice(pool_of)
            at, size = rng.randrange(len(source)), rng.randrange(length // 3, 2 * length)
            pieces += source[at : at + size] if rng.random() < 0.6 else words(rng, size)
        texts.append(
            "".join(piece + rng.choice([" ", ", ", "\n", "。" if len(piece) == 1 else " "]) for piece in pieces).strip()
        )
    rows = [pyarrow.table({"text": texts[i : i + 30]}) for i in range(0, 120, 30)]
    paths = [tmp_path / "work" / "units" / str(i) for i in range(4)]
    for path, table in zip(paths, rows, strict=True):
        unit_files.write(table, path)
    pieces = [
        exact_substring.UnitDocuments(path, np.arange(30), np.arange(i * 30, i * 30 + 30))
        for i, path in enumerate(paths)
    ]
    with Pool(1) as pool:
        edited = exact_substring.remove_repeats(pieces, pool, tmp_path / "work" / "repeats", None, length)
    found = [text for piece in edited for text in exact_substring.texts_of(piece)]
    expected = [
        [token for token, gone in zip(plain_tokens(text), marks, strict=True) if not gone]
        for text, marks in zip(texts, plain_runs(texts, length), strict=True)
    ]
    assert [plain_tokens(text) for text in found] == expected
    assert 20 < sum(sum(marks) > 0 for marks in plain_runs(texts, length)) < 120


def test_runs_in_the_stage_with_workers_and_kills(tmp_path):
    rng = random.Random(8)
    shared = [words(rng, 70) for _ in range(5)]
    rows = [{"text": " ".join(words(rng, 200) + shared[i % 5] + words(rng, 120))} for i in range(60)]
    folders = [tmp_path / name for name in ("one", "two", "killed")]
    for folder, workers, unit in zip(folders, (1, 2, 1), (20_000, 9_000, 20_000), strict=True):
        path = write(
            folder, {"a": rows}, dedup={"runs": 50, "lines": 4, "near": False}, workers=workers, unit_bytes=unit
        )
        if folder.name == "killed":
            for moment in (0.9, 1.3, 1.6):
                stage("clean", path, cwd=folder, kill_after=moment)
        succeed("clean", path, cwd=folder)
    assert files_of(published(folders[0])) == files_of(published(folders[1])) == files_of(published(folders[2]))
    assert report_of(folders[0])["total"]["edited_documents"] == 55
