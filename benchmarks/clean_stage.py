"""Running stage clean, and datatrove, on files of the benchmarks, and which documents each of them kept. Used by
benchmarks/clean.py and benchmarks/rules.py."""

import gzip
import json
import os
import sys
from pathlib import Path

from meter import Cost, measured

HERE = Path(__file__).parent
ALL_RULES = ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
# Bounds that no document crosses: the stage then reads, normalises, deduplicates and writes.
NO_FILTERS = {
    "min_tokens": 1,
    "min_letters": 0,
    "max_garbled": 1,
    "max_mean_word": 1e9,
    "max_repeated_lines": 1,
    "max_repeated_shingles": 1,
}


def one_thread() -> dict[str, str]:
    """The environment of a measured process."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run_clean(folder: Path, sources: dict[str, Path], workers: int = 1, **keys) -> tuple[Cost, Path]:
    """Run stage clean with further `keys`. Returns its cost and the folder that it published."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = {"sources": {}, "holdout": 0, "workers": workers}
    for name, path in sources.items():
        stage["sources"][name] = {"path": str(path)}
    stage.update(keys)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"name": "bench", "output": str(folder / "runs"), "stages": {"clean": stage}}))
    cost = measured([sys.executable, str(HERE.parent / "pipeline/clean.py"), str(recipe)], env=one_thread())
    return cost, folder / "runs/bench/clean/current"


def run_datatrove(python: Path, script: str, *arguments: str) -> Cost:
    """Run a script of this folder in datatrove's environment."""
    return measured([str(python), str(HERE / script), *arguments], env=one_thread())


def kept_by_us(published: Path, source: str, file: Path) -> set[str]:
    """Ids of the documents of a jsonl file that were kept: the places in rejected/ are line numbers."""
    import zstandard

    with open(file, encoding="utf-8") as handle:
        id_of_line = {number: json.loads(line)["id"] for number, line in enumerate(handle, 1)}
    with zstandard.open(published / "rejected" / f"{source}.jsonl.zst", "rt", encoding="utf-8") as handle:
        for line in handle:
            place = json.loads(line)["place"]
            id_of_line.pop(int(place.rpartition(":")[2]), None)
    return set(id_of_line.values())


def kept_by_datatrove(folder: Path) -> set[str]:
    """Ids of the documents that a script of datatrove wrote."""
    ids = set()
    for path in folder.glob("*.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            ids.update(json.loads(line)["id"] for line in handle)
    return ids


def rates(size: float, cost: Cost) -> str:
    """size: MB."""
    return f"{size:.1f} MB, {cost.cpu:.1f} CPU-s, {size / cost.cpu:.2f} MB per CPU-s"
