"""Cleaning and deduplication compared with datatrove 0.10.1, in one run on this machine.

    python benchmarks/clean.py                    everything: about ten minutes of CPU
    python benchmarks/clean.py --sections near    near duplicates only
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

from clean_stage import ALL_RULES, NO_FILTERS, kept_by_datatrove, kept_by_us, rates, run_clean, run_datatrove  # noqa: E402
from corpus import corpus  # noqa: E402
from rules import rules  # noqa: E402
from rules_corpus import with_noise  # noqa: E402

# without spacy datatrove's English MinHash does not start, without jieba its Chinese one
PEER = ("datatrove[io,processing]==0.10.1", "spacy==3.8.18", "jieba==0.42.1")
LANGUAGES = ("en", "zh")


def peer(folder: Path) -> Path:
    """The Python of datatrove's environment."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import datatrove, spacy, jieba"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEER], check=True)
    return python


def texts_of(files: dict[str, Path]) -> dict[str, Path]:
    """The files of the corpus without truth.json."""
    return {language: files[language] for language in LANGUAGES}


def megabytes(files: dict[str, Path]) -> float:
    return sum(file.stat().st_size for file in texts_of(files).values()) / 1e6


# ---- near duplicates -------------------------------------------------------------------------------------------------


def near(folder: Path, files: dict[str, Path], python: Path | None) -> dict[str, float]:
    """MinHash, 14 bands of 8 rows, 5-grams: our stage without filters compared with datatrove's four steps. A planted
    pair counts as merged if one or both of its documents were removed."""
    pairs = json.loads(files["truth"].read_text())
    size = megabytes(files)
    ours, published = run_clean(folder / "ours", texts_of(files), filters=NO_FILTERS)
    print(f"ours: {rates(size, ours)}, {ours.peak:.2f} GB", flush=True)
    figures = {"mb_per_cpu_s": size / ours.cpu}
    merged = dissimilar = 0
    for language in LANGUAGES:
        kept = kept_by_us(published, language, files[language])
        score = judged(pairs[language], kept, f"ours {language}")
        figures[f"recall_{language}"] = score["recall"]
        merged += score["merged"]
        dissimilar += score["dissimilar"]
    figures["false_merge"] = merged / dissimilar
    if python is None:
        return figures
    cpu = 0.0
    for language in LANGUAGES:
        output = folder / "peer" / language
        theirs = run_datatrove(python, "peer_near.py", language, str(files[language]), str(output))
        cpu += theirs.cpu
        part = files[language].stat().st_size / 1e6
        print(f"datatrove {language}: {rates(part, theirs)}, {theirs.peak:.2f} GB", flush=True)
        judged(pairs[language], kept_by_datatrove(output / "out"), f"datatrove {language}")
    figures["dedup_ratio"] = cpu / ours.cpu
    return figures


def judged(pairs: list, kept: set[str], label: str) -> dict:
    """Which planted pairs were merged. Returns recall (of pairs with J >= 0.8), and of those with J < 0.6 how many
    were merged and how many there are."""
    similarities, is_merged, num_lost = [], [], 0
    for a, b, similarity in pairs:
        num_kept = (a in kept) + (b in kept)
        similarities.append(similarity)
        is_merged.append(num_kept < 2)
        num_lost += num_kept == 0

    def between(low: float, high: float) -> list[bool]:
        """is_merged of the pairs with a similarity in [low, high)."""
        return [merged for merged, similarity in zip(is_merged, similarities, strict=True) if low <= similarity < high]

    similar, dissimilar = between(0.8, 2), between(0, 0.6)
    recall = sum(similar) / len(similar)
    shares = []
    for tenth in range(3, 10):
        hits = between(tenth / 10, (tenth + 1) / 10)
        shares.append(f"{tenth / 10:.1f}: {sum(hits) / max(1, len(hits)):.3f}")
    print(
        f"  {label}: recall {recall:.3f} of {len(similar)} pairs at J >= 0.8; {sum(dissimilar)} of {len(dissimilar)}"
        f" merged below 0.6; both removed {num_lost}; merged by J: {', '.join(shares)}"
    )
    return {"recall": recall, "merged": sum(dissimilar), "dissimilar": len(dissimilar)}


# ---- filters and near duplicates together ----------------------------------------------------------------------------


def whole(folder: Path, files: dict[str, Path], python: Path | None) -> dict[str, float]:
    """The steps that both have, one after the other, on a quarter of the English documents: all published rules,
    then near duplicates."""
    part = folder / "whole.jsonl"
    with open(files["en"], encoding="utf-8") as source, open(part, "w", encoding="utf-8") as target:
        for number, line in enumerate(source):
            if number % 4 == 0:
                target.write(line)
    size = part.stat().st_size / 1e6
    ours, published = run_clean(folder / "whole-ours", {"en": part}, filters=NO_FILTERS, rules={"use": ALL_RULES})
    total = json.loads((published / "report.json").read_text())["total"]
    print(f"whole, ours: {rates(size, ours)}, kept {total['documents_out']} of {total['read']}", flush=True)
    if python is None:
        return {}
    filtering = run_datatrove(python, "peer_rules.py", str(part), str(folder / "whole-rules"))
    filtered = next((folder / "whole-rules/out").glob("*.jsonl.gz"))
    deduplicating = run_datatrove(python, "peer_near.py", "en", str(filtered), str(folder / "whole-near"))
    cpu = filtering.cpu + deduplicating.cpu
    kept = kept_by_datatrove(folder / "whole-near/out")
    print(f"whole, datatrove: {cpu:.1f} CPU-s, {size / cpu:.2f} MB per CPU-s, kept {len(kept)}", flush=True)
    return {"whole_ratio": cpu / ours.cpu}


# ---- every step on, and memory ---------------------------------------------------------------------------------------


def memory(folder: Path, files: dict[str, Path]) -> dict[str, float]:
    """Every step on, two workers: MB per CPU-second, and peak memory summed over workers and parent, on the corpus
    and on one that is four times larger."""
    larger = corpus(folder / "corpus-4", times=5)  # planted copies are not multiplied: 3.9 times the bytes
    keys = every_step(folder / "everything", files)
    costs = []
    for name, corpus_files in (("1", files), ("4", larger)):
        cost, published = run_clean(folder / f"memory-{name}", texts_of(corpus_files), workers=2, **keys)
        total = json.loads((published / "report.json").read_text())["total"]
        costs.append(cost)
        print(
            f"every step on: {rates(megabytes(corpus_files), cost)}, {cost.wall:.0f} s, {cost.peak:.3f} GB;"
            f" {total['read']} read, {total['filtered_documents']} filtered, {total['duplicates_near']} near"
            f" duplicates, {total['documents_out']} kept",
            flush=True,
        )
    small, large = costs
    return {
        "peak_gb": small.peak,
        "peak_growth": large.peak / small.peak - 1,
        "all_mb_per_cpu_s": megabytes(files) / small.cpu,
    }


def every_step(folder: Path, files: dict[str, Path]) -> dict:
    """Keys of a stage with every step on. The examples of the two models are documents of the corpus, and the same
    with noise; the evaluation set is some of their paragraphs. The models' bounds and the language rule drop nothing
    that the other steps accept, so that deduplication has its full load."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random("everything")
    good = []
    for language in LANGUAGES:
        with open(files[language], encoding="utf-8") as handle:
            for number, line in zip(range(2000), handle, strict=False):
                if number % 2:
                    good.append(json.loads(line)["text"])
    _write_texts(folder / "good.jsonl", good)
    _write_texts(folder / "bad.jsonl", [with_noise(text, rng) for text in good])
    _write_texts(folder / "exam.jsonl", [text[200:320] for text in rng.sample(good, 200)])
    return {
        "repair": {"mojibake": True, "full_width": "letters"},
        "language": {"keep": ["en", "zh"], "min_confidence": 0},
        "filters": {},
        "rules": {"use": ALL_RULES},
        "block": {"words": ["spam"], "min_words": 3, "urls": ["spam"], "url": "{id}"},
        "mask": {"use": ["secret", "email", "ip", "id_zh", "card", "mobile_zh", "phone"]},
        "examples": {name: {"path": str(folder / f"{name}.jsonl")} for name in ("good", "bad")},
        "quality": {"good": ["good"], "bad": ["bad"], "min_score": 0},
        "perplexity": {"like": ["good"], "max_en": 1e9, "max_zh": 1e9},
        "decontaminate": {"sets": {"exam": {"path": str(folder / "exam.jsonl")}}},
        "dedup": {"url": "{id}", "lines": 8, "runs": 50},
    }


def _write_texts(file: Path, texts: list[str]) -> None:
    with open(file, "w", encoding="utf-8") as handle:
        for text in texts:
            handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


# ---- the program -----------------------------------------------------------------------------------------------------

SECTIONS = ("near", "rules", "whole", "memory")
# The figures that the last line begins with; the others give further detail.
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
    parser.add_argument("--alone", action="store_true", help="measure only us")
    parser.add_argument("--sections", nargs="*", default=SECTIONS, choices=SECTIONS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).absolute()
        python = None
        if not arguments.alone:
            python = peer(arguments.peer.absolute() if arguments.peer else folder / "peer-venv")
        files = corpus(folder / "corpus")
        print(f"corpus: {megabytes(files):.1f} MB", flush=True)
        began = time.time()
        figures: dict[str, float] = {}
        with tempfile.TemporaryDirectory(dir=folder) as runs_name:
            runs = Path(runs_name)
            if "near" in arguments.sections:
                figures.update(near(runs, files, python))
            if "rules" in arguments.sections:
                figures.update(rules(runs / "rules", python))
            if "whole" in arguments.sections:
                figures.update(whole(runs, files, python))
            if "memory" in arguments.sections:
                figures.update(memory(folder if arguments.folder else runs, files))
        print(
            f"took {time.time() - began:.0f} s after the corpus was made, load {os.getloadavg()[0]:.1f} at the end",
            flush=True,
        )
    ordered = [key for key in FIGURES if key in figures] + sorted(figures.keys() - set(FIGURES))
    print(json.dumps({key: round(figures[key], 4) for key in ordered}))


if __name__ == "__main__":
    main()
