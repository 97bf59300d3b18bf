"""All steps of cleaning together, in a stage."""

import json

import pyarrow.parquet
import zstandard
from every_step import everything
from harness import files_of, stage, succeed


def test_every_step_in_the_stage_killed_and_resumed(tmp_path):
    succeed("clean", everything(tmp_path / "a"), cwd=tmp_path / "a")
    whole = tmp_path / "a/runs/t/clean/current"
    report = json.loads((whole / "report.json").read_text())
    assert report["sources"]["a"]["filtered"] == {
        "blocked_url": 2,
        "blocked_words": 1,
        "language": 1,
        "repeated_ngrams": 1,
    }
    assert report["rules"]["changed"] == {
        "email": {"documents": 1, "times": 1},
        "lines": {"documents": 1, "times": 1},
        "mobile_zh": {"documents": 1, "times": 1},
        "mojibake": {"documents": 1, "times": 1},
    }
    assert report["rules"]["rejected"] == 5 and report["rules"]["languages"]["zh"]["documents"] == 31
    texts = {}
    for split in ("train", "heldout"):
        for path in (whole / split).glob("*.parquet"):
            for row in pyarrow.parquet.read_table(path).to_pylist():
                texts[row["text"]] = row["language"]
    assert len(texts) == 57 and sorted(texts.values()) == ["en"] * 27 + ["zh"] * 30
    assert sum("[EMAIL]" in text for text in texts) == sum("[MOBILE_ZH]" in text for text in texts) == 1 and not any(
        "JavaScript" in text or "Ã" in text for text in texts
    )
    code, text = stage("clean", everything(tmp_path / "b", unit_bytes=3_000), cwd=tmp_path / "b", fault="work:4")
    assert code == -9, text
    succeed("clean", tmp_path / "b/recipe.yaml", cwd=tmp_path / "b")
    assert files_of(whole) == files_of(tmp_path / "b/runs/t/clean/current")


def test_what_is_left_out_is_masked_in_the_report_too(tmp_path):
    """Too short, not JSON, without a text: none of them brings an address or a key into a report."""
    key = "AKIA" + "Q3EGRIYWLM7ZBNKD"
    rows = [
        json.dumps({"text": f"Mail jane.doe@mail.org, key {key}."}),
        "{" + f'"text": "jane.doe@mail.org {key}',
        json.dumps({"body": f"jane.doe@mail.org {key}"}),
    ]
    rows += [
        json.dumps(
            {
                "text": (
                    f"The {word} of the house at the river was painted green last year by its owner, who had bought it"
                    " from a miller's widow."
                )
            }
        )
        for word in ("door", "roof")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "r.yaml").write_text(
        "name: r\nstages:\n  clean: {sources: {web: {path: a.jsonl}}, mask: {use: [secret, email]}, filters:"
        " {min_tokens: 20}, max_bad: 0.9, holdout: 0, dedup: {near: ~}}\n"
    )
    code, said = stage("clean", "r.yaml", cwd=tmp_path)
    assert code == 0, said
    folder = tmp_path / "runs/r/clean/current"
    left = (
        zstandard.ZstdDecompressor()
        .stream_reader((folder / "rejected/web.jsonl.zst").read_bytes())
        .read()
        .decode()
        .splitlines()
    )
    assert len(left) == 3 and all("[EMAIL]" in line and "[SECRET]" in line for line in left)
    for text in ((folder / "report.json").read_text(), *left):
        assert key not in text and "jane.doe" not in text
