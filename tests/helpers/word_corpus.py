"""Corpora of random words, with duplicates, for tests of the whole cleaning stage."""

import json
import random
from pathlib import Path


def words(rng: random.Random, number: int) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(3, 9))) for _ in range(number)]


def write(folder: Path, sources: dict[str, list[dict]], **changes) -> Path:
    """A recipe over jsonl sources with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    block = {
        "sources": {name: {"path": f"{name}.jsonl"} for name in sources},
        "holdout": 0,
        "workers": 1,
        "unit_bytes": 20_000,
        **changes,
    }
    (folder / "recipe.yaml").write_text(json.dumps({"name": "t", "seed": 3, "stages": {"clean": block}}))
    return folder / "recipe.yaml"
