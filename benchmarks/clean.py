"""Cleaning and deduplication beside datatrove 0.10.1, in one run on this machine.

    python benchmarks/clean.py                    everything: about ten minutes of CPU
    python benchmarks/clean.py --sections near    near duplicates alone
    python benchmarks/clean.py --peer VENV        datatrove's environment, made there if it does not exist

Every figure is CPU seconds of whole processes, start, reading and writing included; the last line is one JSON object.
The corpus is that of benchmarks/corpus.py.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from corpus import corpus  # noqa: E402
from meter import Cost, measured  # noqa: E402
from rules import rules, soiled  # noqa: E402

# without spacy datatrove's English MinHash does not start, without jieba its Chinese one
PEER = ("datatrove[io,processing]==0.10.1", "spacy==3.8.18", "jieba==0.42.1")
# Bounds that no document crosses: the stage then reads, normalises, deduplicates and writes.
NO_FILTERS = {
    "min_tokens": 1,
    "min_letters": 0,
    "max_garbled": 1,
    "max_mean_word": 1e9,
    "max_repeated_lines": 1,
    "max_repeated_shingles": 1,
}
LANGUAGES = ("en", "zh")


def peer(folder: Path) -> Path:
    """The Python of datatrove's environment."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import datatrove, spacy, jieba"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEER], check=True)
    return python


def clean(folder: Path, sources: dict[str, Path], workers: int, **block) -> tuple[Cost, Path]:
    """Run our stage; returns its cost and the folder that it published."""
    recipe = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    stage = {
        "sources": {name: {"path": str(path)} for name, path in sources.items()},
        "holdout": 0,
        "workers": workers,
        **block,
    }
    recipe.write_text(json.dumps({"name": "bench", "output": str(folder / "runs"), "stages": {"clean": stage}}))
    cost = measured(
        [sys.executable, str(HERE.parent / "pipeline/clean.py"), str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return cost, folder / "runs/bench/clean/current"


def megabytes(files: dict[str, Path]) -> float:
    return sum(files[name].stat().st_size for name in LANGUAGES) / 1e6


# ---- near duplicates -------------------------------------------------------------------------------------------------


def near(folder: Path, files: dict[str, Path], python: Path | None) -> dict:
    """MinHash, 14 bands of 8 rows, 5-grams: our stage without filters beside datatrove's four steps. A pair is found
    if one of it, and not both, was removed."""
    truth, found = json.loads(files["truth"].read_text()), {}
    size = megabytes(files)
    ours, published = clean(folder / "ours", {name: files[name] for name in LANGUAGES}, 1, filters=NO_FILTERS)
    found["mb_per_cpu_s"] = size / ours.cpu
    print(
        f"ours: {size:.1f} MB, {ours.cpu:.1f} CPU-s, {ours.peak:.2f} GB, {size / ours.cpu:.2f} MB per CPU-s", flush=True
    )
    merged = total = 0
    for name in LANGUAGES:
        score = judged(truth[name], kept_by_us(published, name, files[name]), name, "ours")
        found[f"recall_{name}"] = score["recall"]
        merged, total = merged + score["merged"], total + score["low"]
    found["false_merge"] = merged / total
    if python:
        spent = 0.0
        for name in LANGUAGES:
            cost = measured(
                [str(python), str(HERE / "peer_near.py"), name, str(files[name]), str(folder / "peer" / name)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            spent += cost.cpu
            part = files[name].stat().st_size / 1e6
            print(
                f"datatrove {name}: {part:.1f} MB, {cost.cpu:.1f} CPU-s, {cost.peak:.2f} GB, {part / cost.cpu:.2f} MB"
                " per CPU-s",
                flush=True,
            )
            judged(truth[name], kept_by_datatrove(folder / "peer" / name / "out"), name, "datatrove")
        found["dedup_ratio"] = spent / ours.cpu
    return found


def kept_by_us(published: Path, name: str, file: Path) -> set[str]:
    """Ids of the corpus that were kept: places in the ledger of rejected records name lines."""
    import zstandard

    with open(file, encoding="utf-8") as handle:
        ids = [json.loads(line)["id"] for line in handle]
    rejected = (
        zstandard.ZstdDecompressor()
        .stream_reader((published / "rejected" / f"{name}.jsonl.zst").read_bytes())
        .read()
        .decode()
    )
    for line in rejected.splitlines():
        ids[int(json.loads(line)["place"].rpartition(":")[2]) - 1] = ""
    return set(ids) - {""}


def kept_by_datatrove(folder: Path) -> set[str]:
    import gzip

    return {
        json.loads(line)["id"] for path in folder.glob("*.jsonl.gz") for line in gzip.open(path, "rt", encoding="utf-8")
    }


def judged(pairs: list, kept: set[str], name: str, who: str) -> dict:
    planted = [(similarity, (a in kept) + (b in kept)) for a, b, similarity in pairs]
    high = [number < 2 for similarity, number in planted if similarity >= 0.8]
    low = [number < 2 for similarity, number in planted if similarity < 0.6]
    bins = ", ".join(
        f"{begin / 10:.1f}: {sum(hits) / max(1, len(hits)):.3f}"
        for begin in range(3, 10)
        for hits in [[number < 2 for similarity, number in planted if begin / 10 <= similarity < (begin + 1) / 10]]
    )
    print(
        f"  {who} {name}: recall {sum(high) / len(high):.3f} of {len(high)} pairs at J >= 0.8; {sum(low)} of {len(low)}"
        f" merged below 0.6; both gone {sum(n == 0 for _, n in planted)}; found by J: {bins}"
    )
    return {"recall": sum(high) / len(high), "merged": sum(low), "low": len(low)}


# ---- everything, and memory ------------------------------------------------------------------------------------------


def everything(folder: Path, files: dict[str, Path]) -> dict:
    """The blocks of a stage with every step on. Examples of the two models: documents of the corpus, and the same
    soiled; the evaluation set: some of its paragraphs. Their bounds and the language rule let pass what the other
    steps do, so that deduplication has its full load."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, good = random.Random("everything"), []
    for name in LANGUAGES:
        with open(files[name], encoding="utf-8") as handle:
            good += [json.loads(line)["text"] for number, line in zip(range(2000), handle, strict=False) if number % 2]
    parts = {
        "good": good,
        "bad": [soiled(text, rng) for text in good],
        "exam": [text[200:320] for text in rng.sample(good, 200)],
    }
    for name, texts in parts.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
        )
    return {
        "repair": {"mojibake": True, "full_width": "letters"},
        "language": {"keep": ["en", "zh"], "min_confidence": 0},
        "filters": {},
        "rules": {"use": ["gopher_repetition", "gopher_quality", "c4", "fineweb"]},
        "block": {"words": ["spam"], "min_words": 3, "urls": ["spam"], "url": "{id}"},
        "mask": {"use": ["secret", "email", "ip", "id_zh", "card", "mobile_zh", "phone"]},
        "examples": {name: {"path": str(folder / f"{name}.jsonl")} for name in ("good", "bad")},
        "quality": {"good": ["good"], "bad": ["bad"], "min_score": 0},
        "perplexity": {"like": ["good"], "max_en": 1e9, "max_zh": 1e9},
        "decontaminate": {"sets": {"exam": {"path": str(folder / "exam.jsonl")}}},
        "dedup": {"url": "{id}", "lines": 8, "runs": 50},
    }


def memory(folder: Path, files: dict[str, Path]) -> dict:
    """Every step on, two workers: MB per CPU-second, and peak memory summed over workers and parent, on the corpus
    and on one that is four times larger."""
    larger, found = corpus(folder / "corpus-4", times=5), {}  # planted copies are not multiplied: 3.9 times the bytes
    block = everything(folder / "everything", files)
    for name, texts in (("1", files), ("4", larger)):
        cost, published = clean(
            folder / f"memory-{name}", {language: texts[language] for language in LANGUAGES}, 2, **block
        )
        total = json.loads((published / "report.json").read_text())["total"]
        found[name] = cost
        print(
            f"every step on: {megabytes(texts):.0f} MB, {cost.cpu:.1f} CPU-s, {megabytes(texts) / cost.cpu:.2f} MB per"
            f" CPU-s, {cost.wall:.0f} s, {cost.peak:.3f} GB; {total['read']} read, {total['filtered_documents']}"
            f" filtered, {total['duplicates_near']} near duplicates, {total['documents_out']} kept",
            flush=True,
        )
    return {
        "peak_gb": found["1"].peak,
        "peak_growth": found["4"].peak / found["1"].peak - 1,
        "all_mb_per_cpu_s": megabytes(files) / found["1"].cpu,
    }


# ---- filters and near duplicates together ----------------------------------------------------------------------------


def whole(folder: Path, files: dict[str, Path], python: Path | None) -> dict:
    """The steps that both have, one after the other, on a quarter of the English documents: all published rules,
    then near duplicates."""
    part = folder / "whole.jsonl"
    with open(files["en"], encoding="utf-8") as handle:
        part.write_text("".join(line for number, line in enumerate(handle) if number % 4 == 0), encoding="utf-8")
    size = part.stat().st_size / 1e6
    ours, published = clean(
        folder / "whole-ours",
        {"en": part},
        1,
        filters=NO_FILTERS,
        rules={"use": ["gopher_repetition", "gopher_quality", "c4", "fineweb"]},
    )
    total = json.loads((published / "report.json").read_text())["total"]
    print(
        f"whole, ours: {size:.1f} MB, {ours.cpu:.1f} CPU-s, {size / ours.cpu:.2f} MB per CPU-s, kept"
        f" {total['documents_out']} of {total['read']}",
        flush=True,
    )
    if not python:
        return {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rules = measured(
        [str(python), str(HERE / "peer_rules.py"), str(part), str(folder / "whole-rules")], env=environment
    )
    left = next((folder / "whole-rules/out").glob("*.jsonl.gz"))
    near = measured(
        [str(python), str(HERE / "peer_near.py"), "en", str(left), str(folder / "whole-near")], env=environment
    )
    cpu, kept = rules.cpu + near.cpu, len(kept_by_datatrove(folder / "whole-near/out"))
    print(f"whole, datatrove: {cpu:.1f} CPU-s, {size / cpu:.2f} MB per CPU-s, kept {kept}", flush=True)
    return {"whole_ratio": cpu / ours.cpu}


SECTIONS = ("near", "rules", "whole", "memory")
# The figures that the last line begins with; those that it has beside them say more about the same.
FIGURES = (
    "dedup_ratio",
    "filter_ratio",
    "whole_ratio",
    "mb_per_cpu_s",
    "recall_en",
    "recall_zh",
    "false_merge",
    "agreement_en",
    "kept_zh",
    "junk_zh",
    "peak_gb",
    "peak_growth",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; by default a folder that is deleted at the end")
    parser.add_argument("--peer", type=Path, help="environment of datatrove; by default one below --folder")
    parser.add_argument("--alone", action="store_true", help="measure us only")
    parser.add_argument("--sections", nargs="*", default=SECTIONS, choices=SECTIONS)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (words.folder or Path(scratch)).absolute()
        python = None if words.alone else peer(words.peer.absolute() if words.peer else folder / "peer-venv")
        files = corpus(folder / "corpus")
        print(f"corpus: {megabytes(files):.1f} MB", flush=True)
        found: dict = {}
        began = time.time()
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            if "near" in words.sections:
                found.update(near(Path(runs), files, python))
            if "rules" in words.sections:
                found.update(rules(Path(runs) / "rules", python))
            if "whole" in words.sections:
                found.update(whole(Path(runs), files, python))
            if "memory" in words.sections:
                found.update(memory(folder if words.folder else Path(runs), files))
        print(
            f"took {time.time() - began:.0f} s after the corpus was made, load {os.getloadavg()[0]:.1f} at the end",
            flush=True,
        )
        print(
            json.dumps(
                {
                    key: round(found[key], 4)
                    for key in sorted(
                        found, key=lambda key: (FIGURES.index(key) if key in FIGURES else len(FIGURES), key)
                    )
                }
            )
        )


if __name__ == "__main__":
    main()
