"""A recipe of stage clean with every step on."""

import json
import random
from pathlib import Path

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
