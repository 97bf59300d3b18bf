"""Which document of a cluster is kept, and why the others are dropped."""

import collections
import json
import random
from pathlib import Path

import pyarrow.parquet
import pytest
from cleaned import ledger, published
from harness import stage, succeed
from word_corpus import words, write


def rows_of(folder: Path, split: str = "train") -> list[dict]:
    return [
        row
        for path in sorted((published(folder) / split).glob("*.parquet"))
        for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


def report_of(folder: Path) -> dict:
    return json.loads((published(folder) / "report.json").read_text())


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
        assert code == 2 and "stages.clean.dedup" in text and "set near: false, too, to keep copies" in text, text


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
