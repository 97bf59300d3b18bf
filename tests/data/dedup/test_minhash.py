"""Duplicates over all sources: which stay, what is repeated inside documents, memory by parts, earlier outputs, and
intermediates that were lost or damaged."""

import collections
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from cleaned import ledger, plain_tokens, published
from harness import files_of, stage, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from word_corpus import words, write

from pipeline.data.cleaning import unit_files
from pipeline.data.cleaning.process_pool import Pool
from pipeline.data.dedup import exact_substring, external_sort
from pipeline.data.dedup.minhash import Near, join

LONG = [chr(0x4E00 + i) for i in range(2000)]


def rows_of(folder: Path, split: str = "train") -> list[dict]:
    return [
        row
        for path in sorted((published(folder) / split).glob("*.parquet"))
        for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


def report_of(folder: Path) -> dict:
    return json.loads((published(folder) / "report.json").read_text())


# ---- which one stays -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families() -> dict[str, list[dict]]:
    """Twelve texts in both sources: the same, a longer near duplicate, and one that is alone; with addresses."""
    rng = random.Random(1)
    a, b = [], []
    for i in range(12):
        text = words(rng, 120)
        a.append({"text": " ".join(text), "url": f"https://www.Example.org/{i}/"})
        b.append({"text": " ".join([*text, *words(rng, 6)]), "url": f"http://example.org/other{i}"})
        b.append({"text": " ".join(text) + " ", "url": "x"})
        a.append({"text": " ".join(words(rng, 80)), "url": f"example.org/{i}#part"})
    return {"a": a, "b": b}


@pytest.mark.parametrize(
    "dedup, wanted",
    [
        ({"keep": "first"}, {"a": 24}),
        ({"keep": "longest"}, {"a": 12, "b": 12}),
        ({"prefer": ["b"], "keep": "longest"}, {"a": 12, "b": 12}),
        ({"near": False}, {"total": 36}),
        ({"near": False, "exact": False}, {"total": 48}),
        ({"near": False, "exact": False, "url": "url"}, {"total": 25}),  # a: 12 addresses, b: 12 and `x`
    ],
)
def test_which_document_of_a_cluster_stays(families, tmp_path, dedup, wanted):
    succeed("clean", write(tmp_path, families, dedup=dedup), cwd=tmp_path)
    kept, report = rows_of(tmp_path), report_of(tmp_path)
    sources = collections.Counter(row["source"] for row in kept)
    assert wanted.get("total", len(kept)) == len(kept)
    assert all(sources[name] == number for name, number in wanted.items() if name != "total"), sources
    total = report["total"]
    left_out = total["duplicates_exact"] + total["duplicates_near"] + total["duplicates_url"]
    assert total["read"] == 48 == len(kept) + left_out and left_out == len(ledger(tmp_path, "a")) + len(
        ledger(tmp_path, "b")
    )
    ids = {row["id"] for row in kept}
    assert all(entry["of"] in ids for name in "ab" for entry in ledger(tmp_path, name))
    if "keep" in dedup:
        assert sorted(collections.Counter(row["cluster"] for row in kept).items()) == [(1, 12), (3, 12)]


def test_copies_that_were_to_stay_are_not_called_exact(tmp_path):
    """Equal texts at one address, without `exact`: a kept one that is not the first goes by its address alone."""
    text = " ".join(words(random.Random(5), 60))
    sources = {name: [{"text": text, "url": "x.org", "n": name}] for name in "ab"}
    for prefer in "ab":
        dedup = {"near": False, "exact": False, "url": "url", "prefer": [prefer]}
        succeed("clean", write(tmp_path, sources, dedup=dedup), cwd=tmp_path)
        total = report_of(tmp_path)["total"]
        assert (total["duplicates_url"], total["duplicates_exact"], total["train_documents"]) == (1, 0, 1)


def test_copies_cannot_stay_where_what_is_nearly_alike_goes(families, tmp_path):
    for dedup in ({"exact": False}, {"exact": False, "near": {"similarity": 0.9}}):
        code, text = stage("clean", write(tmp_path, families, dedup=dedup), cwd=tmp_path)
        assert code == 2 and "stages.clean.dedup" in text and "give near: false, too, to keep copies" in text, text


def test_upsampling_by_cluster_size_writes_copies_and_counts_them(families, tmp_path):
    succeed("clean", write(tmp_path, families, dedup={"upsample": {2: 2, 3: 4}}), cwd=tmp_path)
    kept, total = rows_of(tmp_path), report_of(tmp_path)["total"]
    assert collections.Counter(row["cluster"] for row in kept) == {1: 12, 3: 48}
    assert (total["train_documents"], total["train_copies"]) == (24, 36) and len(kept) == 60
    assert all(
        number == 4 for id, number in collections.Counter(row["id"] for row in kept if row["cluster"] == 3).items()
    )


def test_an_earlier_output_is_compared_with(families, tmp_path):
    """New shards against all that was processed before: what was published stays published, and only new texts come
    out."""
    succeed("clean", write(tmp_path / "one", {"a": families["a"]}, holdout=0.2), cwd=tmp_path / "one")
    before = rows_of(tmp_path / "one") + rows_of(tmp_path / "one", "heldout")
    fresh = [{"text": " ".join(words(random.Random(9), 90)), "url": "new"}]
    path = write(
        tmp_path / "two", {"b": families["b"] + fresh}, inputs={"earlier": str(published(tmp_path / "one").resolve())}
    )
    succeed("clean", path, cwd=tmp_path / "two")
    assert [row["text"] for row in rows_of(tmp_path / "two")] == [fresh[0]["text"]]
    assert {entry["of"] for entry in ledger(tmp_path / "two", "b")} <= {row["id"] for row in before}
    total = report_of(tmp_path / "two")["total"]
    assert (total["read"], total["duplicates_exact"], total["duplicates_near"], total["train_documents"]) == (
        25,
        12,
        12,
        1,
    )


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


def test_the_best_of_a_cluster_by_the_classifier_stays(tmp_path):
    """Near duplicates of which one has more of what the good examples are made of; its score decides, not its id,
    length or place."""
    rng = random.Random(6)
    good, bad = words(rng, 60), words(rng, 60)
    examples = {
        name: [{"text": " ".join(rng.choices(vocabulary, k=60))} for _ in range(60)]
        for name, vocabulary in (("good", good), ("bad", bad))
    }
    rows = []
    for i in range(16):
        base = words(rng, 150)
        better, worse = " ".join([*base, *rng.choices(good, k=8)]), " ".join([*base, *rng.choices(bad, k=10)])
        rows += [{"text": text} for text in ((better, worse) if i % 2 else (worse, better))]
    for name, texts in examples.items():
        tmp_path.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    block = {
        "examples": {name: {"path": f"{name}.jsonl"} for name in examples},
        "quality": {"good": ["good"], "bad": ["bad"], "min_score": 0},
    }
    succeed("clean", write(tmp_path, {"a": rows}, dedup={"keep": "quality"}, **block), cwd=tmp_path)
    assert sorted(row["text"] for row in rows_of(tmp_path)) == sorted(
        rows[2 * i + (1 - i % 2)]["text"] for i in range(16)
    )
    code, text = stage("clean", write(tmp_path / "none", {"a": rows}, dedup={"keep": "quality"}), cwd=tmp_path / "none")
    assert code == 2 and "no classifier is trained" in text


# ---- repeated text ---------------------------------------------------------------------------------------------------


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
        exact_substring.Piece(path, np.arange(30), np.arange(i * 30, i * 30 + 30)) for i, path in enumerate(paths)
    ]
    with Pool(1) as pool:
        edited = exact_substring.edit(pieces, pool, tmp_path / "work" / "repeats", None, length)
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


# ---- memory ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=300), st.integers(1, 50))
def test_rows_come_together_by_key_in_parts(tmp_path_factory, values, size):
    keys = np.array(values, np.uint64) * np.uint64(0x0539_1234_5678_9ABC)
    rows = np.column_stack((keys, np.arange(len(keys), dtype=np.uint64)))
    before, external_sort.PARTITION = external_sort.PARTITION, 256
    try:
        parts = list(
            external_sort.together(
                (rows[i : i + size] for i in range(0, len(rows), size)),
                len(rows),
                tmp_path_factory.mktemp("parts") / "x",
            )
        )
    finally:
        external_sort.PARTITION = before
    seen: set = set()
    last = -1
    for part in parts:
        mine = set(part[:, 0].tolist())
        assert not mine & seen and min(mine) > last  # all of a key in one part, parts in the order of keys
        seen, last = seen | mine, max(mine)
        for key in mine:
            assert (np.diff(part[part[:, 0] == key, 1].astype(np.int64)) > 0).all()
    assert sum(map(len, parts)) == len(rows)


def test_near_duplicates_in_parts_are_those_in_one(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    table = rng.integers(0, 2**32, (3000, 112), dtype=np.uint32)
    for i in range(0, 2000, 4):  # chains of three that share most places
        table[i + 1] = np.where(rng.random(112) < 0.9, table[i], table[i + 1])
        table[i + 2] = np.where(rng.random(112) < 0.85, table[i + 1], table[i + 2])
    found = []
    for size in (32 << 20, 1 << 12):
        monkeypatch.setattr(external_sort, "PARTITION", size)
        labels = np.arange(3000)
        join(labels, table, np.arange(3000), np.ones(3000, bool), Near(), tmp_path / "bands")
        found.append(labels)
    assert np.array_equal(*found) and 400 < (found[0] != np.arange(3000)).sum() < 1100


# ---- lost and damaged ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(families, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    succeed("clean", write(folder, families, unit_bytes=4000), cwd=folder)
    return folder


@pytest.mark.parametrize("harm", ["missing", "cut", "flipped", "foreign"])
def test_a_lost_or_damaged_unit_is_made_again(families, whole, tmp_path, harm):
    """After a kill behind the last unit; never read as an empty one."""
    path = write(tmp_path / "harmed", families, unit_bytes=4000)
    assert stage("clean", path, "clean.max_bad=1", cwd=path.parent, fault="publish:1")[0] == -9
    units = sorted(path.parent.glob("runs/t/clean/*/work/units-*/*/*.parquet"))
    assert len(units) > 4
    for shard in path.parent.glob("runs/t/clean/*/train/*"):
        shard.unlink()
    raw = units[2].read_bytes()
    if harm == "missing":
        units[2].unlink()
    elif harm == "foreign":
        units[2].write_bytes(units[3].read_bytes())
    else:
        units[2].write_bytes(
            raw[: len(raw) // 2] if harm == "cut" else raw[:3000] + bytes([raw[3000] ^ 1]) + raw[3001:]
        )
    text = succeed("clean", path, cwd=path.parent)
    assert "it is made again" in text and units[2].name in text
    assert files_of(published(path.parent)) == files_of(published(whole))


def test_a_full_disk_is_one_sentence_and_the_work_goes_on(tmp_path):
    """The whole stage on a file system of half a megabyte, which is then made larger: every unit that was done is
    still there and not made again."""
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here without being root")
    rng = random.Random(5)
    rows = {"a": [{"text": " ".join(words(rng, 300))} for _ in range(240)]}  # half a megabyte
    whole = tmp_path / "whole"
    succeed("clean", write(whole, rows), cwd=whole)
    path = write(tmp_path / "full", rows, workers=2)
    (path.parent / "runs").mkdir()
    script = f"""
        mount -t tmpfs -o size=500k none runs
        run() {{ {sys.executable} {ROOT}/pipeline/clean.py {path.name}; }}
        run 2> said; echo $? > code
        stat -c '%n %Y %i' runs/t/clean/*/work/units-*/a/*.parquet > before
        mount -o remount,size=20m runs
        ALMA_FAULT=publish:1 run; stat -c '%n %Y %i' runs/t/clean/*/work/units-*/a/*.parquet > after
        run && cp -rL runs/t/clean/current published
    """
    answer = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=path.parent, capture_output=True, text=True, timeout=200
    )
    assert answer.returncode == 0, answer.stderr
    said = (path.parent / "said").read_text()
    assert (
        (path.parent / "code").read_text() == "2\n"
        and "No space left on device" in said
        and "run the same command again" in said
        and "Traceback" not in said
    )
    before, after = (set((path.parent / name).read_text().splitlines()) for name in ("before", "after"))
    assert len(before) >= 5 and before < after
    assert files_of(path.parent / "published") == files_of(published(whole))


def test_a_kill_loses_the_units_in_flight_and_no_more(families, tmp_path):
    """What was done before a kill has the same inode afterwards; with one worker one unit is in flight."""
    path = write(tmp_path, families, unit_bytes=4000)

    def done() -> dict[str, int]:
        return {str(file): file.stat().st_ino for file in tmp_path.glob("runs/t/clean/*/work/units-*/*/*.parquet")}

    assert stage("clean", path, cwd=tmp_path, fault="work:4")[0] == -9
    before = done()
    assert stage("clean", path, cwd=tmp_path, fault="publish:1")[0] == -9
    after = done()
    assert len(before) == 4 < len(after) and all(after[name] == inode for name, inode in before.items())


# ---- evaluation sets -------------------------------------------------------------------------------------------------


def plain_contaminated(text: str, items: list[str], words: int = 13, characters: int = 20) -> bool:
    """By sets of tuples, one window after the other."""

    def chinese(run) -> bool:
        return sum("\u4e00" <= token <= "\u9fff" for token in run) * 2 > len(run)

    def runs(known: list[str]) -> set:
        return {
            tuple(known[i : i + n])
            for n in (words, characters)
            for i in range(len(known) - n + 1)
            if chinese(known[i : i + n]) == (n == characters)
        }

    known = plain_tokens(text)
    for item in items:
        asked = plain_tokens(item)
        if runs(asked):
            if runs(asked) & runs(known):
                return True
        elif len(asked) >= 8 and any(known[i : i + len(asked)] == asked for i in range(len(known))):
            return True
    return False


def test_evaluation_text_is_found_as_by_sets_of_tuples(tmp_path):
    from pipeline.data.dedup.decontaminate import Decontaminate, contaminated

    rng = random.Random(4)
    vocabulary = words(rng, 400)
    items = [" ".join(rng.choices(vocabulary, k=rng.randrange(3, 40))) for _ in range(60)] + [
        "".join(rng.choices(LONG, k=rng.randrange(5, 60))) for _ in range(60)
    ]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps({"q": item}) + "\n" for item in items))
    texts = []
    for i in range(100):
        item = plain_tokens(items[rng.randrange(120)])
        at = rng.randrange(len(item))
        taken = item[at : at + rng.randrange(5, 30)] if i % 3 else item
        own = rng.choices(vocabulary, k=30) if i % 2 else rng.choices(LONG, k=30)
        texts.append(" ".join([*own, *taken, *rng.choices(vocabulary, k=10)]))
    wanted = Decontaminate(sets={"exam": {"path": str(tmp_path / "exam.jsonl"), "text": "q"}})
    found, report = contaminated(texts, wanted)
    expected = [plain_contaminated(text, items) for text in texts]
    assert [match is not None for match in found] == expected and 20 < sum(expected) < 95


def test_decontamination_in_cleaning_is_counted_by_set(tmp_path):
    rng = random.Random(5)
    questions = [" ".join(words(rng, 25)) for _ in range(20)]
    exam_zh = ["".join(rng.choices(LONG, k=40)) for _ in range(20)]
    rows = [{"text": " ".join(words(rng, 60))} for _ in range(50)]
    rows += [
        {"text": " ".join(words(rng, 30)) + "\n" + questions[i] + " " + " ".join(words(rng, 30))} for i in range(5)
    ]
    rows += [
        {"text": "".join(rng.choices(LONG, k=60)) + exam_zh[0][5:30] + "".join(rng.choices(LONG, k=60))}
        for _ in range(3)
    ]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in questions))
    (tmp_path / "exam_zh.txt").write_text("\n".join(exam_zh))
    block = {
        "sets": {
            "exam": {"path": "exam.jsonl", "text": "q"},
            "exam_zh": {"path": "exam_zh.txt", "sample_by": "line"},
            "clean": {"path": "exam.jsonl", "text": "none {q}", "limit": 1},
        }
    }
    block["sets"]["clean"] = {"path": "other.jsonl"}
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": " ".join(words(rng, 30))}) + "\n")
    path = write(tmp_path, {"a": rows}, decontaminate=block)
    succeed("clean", path, cwd=tmp_path)
    report = report_of(tmp_path)
    assert report["sources"]["a"]["filtered"] == {"contaminated": 8} and report["total"]["train_documents"] == 50
    found = {
        name: (entry["documents"], entry["items_found"], entry["items"])
        for name, entry in report["decontamination"].items()
    }
    assert found == {"exam": (5, 5, 20), "exam_zh": (3, 1, 20), "clean": (0, 0, 1)}
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": rows[0]["text"]}) + "\n")  # another set is another result
    assert (
        "up to date" not in succeed("clean", path, cwd=tmp_path)
        and report_of(tmp_path)["decontamination"]["clean"]["documents"] == 1
    )


def test_decontamination_of_conversations(tmp_path):
    from pipeline.data.chat.chat_sources import ChatSource
    from pipeline.data.chat.conversations import load_conversations
    from pipeline.data.dedup.decontaminate import Decontaminate

    rng = random.Random(6)
    rows = [{"q": " ".join(words(rng, 30)), "a": " ".join(words(rng, 5))} for _ in range(200)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exam.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(row["q"].split()[4:24])}) + "\n" for row in rows[:7])
    )
    source = {
        "chat": ChatSource(
            path=str(tmp_path / "chat.jsonl"),
            messages=[{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}],
        )
    }
    train, heldout, counted = load_conversations(
        source, 0.2, Decontaminate(sets={"exam": {"path": str(tmp_path / "exam.jsonl")}})
    )
    assert len(train) + len(heldout) == 193
    assert counted.sources["chat"]["rejected"]["has text of the evaluation set exam"]["count"] == 7


# ---- the proof on the user's own corpus ------------------------------------------------------------------------------


def test_the_theoretical_curve_against_simulation():
    from pipeline.checks.verify_dedup import chance

    rng = np.random.default_rng(0)
    for near in (Near(), Near(bands=5, rows=4, similarity=0.5), Near(similarity=0)):
        for similarity in (0.45, 0.65, 0.75):
            equal = rng.random((20000, near.bands, near.rows)) < similarity
            found = equal.all(2).any(1) & (equal.mean((1, 2)) >= near.similarity)
            assert abs(found.mean() - chance(similarity, near)) < 4 * np.sqrt(0.25 / 20000)


def test_verify_finds_what_is_planted_and_fails_below_the_bar(tmp_path, capsys):
    from pipeline.checks.verify_dedup import prove
    from pipeline.core.recipe import load

    rng = random.Random(7)
    sources = {
        "en": [{"text": " ".join(words(rng, rng.randrange(90, 200)))} for _ in range(150)],
        "zh": [{"text": "".join(rng.choices(LONG, k=150))} for _ in range(150)],
    }
    path = write(tmp_path, {name: rows for name, rows in sources.items()})
    block = json.loads(path.read_text())
    for name, source in block["stages"]["clean"]["sources"].items():
        source["path"] = str(tmp_path / f"{name}.jsonl")
    path.write_text(json.dumps(block))
    assert prove(load(str(path), []), None, pairs=100)
    assert "holds" in capsys.readouterr().out
    assert not prove(
        load(str(path), ["clean.dedup.near.bands=2", "clean.dedup.near.rows=20"]), None, pairs=100, recall=0.9
    )
    assert "FAILS" in capsys.readouterr().out
