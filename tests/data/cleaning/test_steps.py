"""All steps of cleaning together, in a stage."""

import json
import random
from pathlib import Path

import pyarrow.parquet
import zstandard
from harness import files_of, stage, succeed

from pipeline.data.cleaning.pii import KINDS

ZH = (
    "今天我们来介绍一种新的方法：先把所有的文字读进来，然后一行一行地看，最后再决定要不要留下。这是很多人都在用的办法。"
)


def everything(folder: Path, **changes) -> Path:
    """A recipe with every step on, over a few documents for each."""
    rng = random.Random(8)
    signs, words = (
        [c for c in ZH if c not in "，。："],
        "river stone bridge water people town winter market story garden house letter road field".split(),
    )

    def english(number: int = 8) -> str:
        return "\n".join(
            f"{rng.choice(words).title()}"
            f" {' '.join(rng.choice(words) + rng.choice(['', 's', 'ed']) for _ in range(12))}, and the"
            f" {rng.choice(words)} that we have."
            for _ in range(number)
        )

    def chinese(number: int = 8) -> str:
        return "\n".join(
            "".join(rng.sample(signs, 25)) + "，" + "".join(rng.sample(signs, 8)) + "。" for _ in range(number)
        )

    rows = [
        {"text": text, "url": f"https://site{i}.org/{i}"}
        for i, text in enumerate([english() for _ in range(30)] + [chinese() for _ in range(30)])
    ]
    rows[3]["text"] += "\nPlease write to jane.doe@mail.org for the rest of it."
    rows[4]["text"] = "Please enable JavaScript to read it.\n" + rows[4]["text"]
    rows[35]["text"] += "\n请打电话给13800138000，谢谢大家的支持。"
    rows[36]["text"] = rows[36]["text"].encode().decode("latin-1")
    rows[5]["url"], rows[6]["url"] = "http://ads.bad.example/page", "https://x.org/online-casino"
    rows[7]["text"] += "\nThe online casino has free spins and a casino bonus for you."
    rows.append(
        {"text": "L'été dernier, à Orléans, la fête a été très réussie et les enfants ont chanté.\n" * 3, "url": ""}
    )
    rows.append({"text": "手机，电脑，" * 60})
    (folder / "data").mkdir(parents=True)
    (folder / "data/a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    (folder / "bad.txt").write_text("bad.example\n")
    block = {
        "sources": {"a": {"path": "data/a.jsonl"}},
        "holdout": 0.1,
        "unit_bytes": 6_000,
        "workers": 1,
        "dedup": {"near": None},
        "language": {"keep": ["en", "zh"], "min_confidence": 0.1},
        "rules": {"use": ["gopher_repetition", "gopher_quality", "c4", "fineweb"]},
        "repair": {"mojibake": True, "full_width": "letters"},
        "block": {"words": ["spam"], "urls": ["spam", "bad.txt"]},
        "mask": {"use": list(KINDS)},
        **changes,
    }
    (folder / "recipe.yaml").write_text(json.dumps({"name": "t", "stages": {"clean": block}}))
    return folder / "recipe.yaml"


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
