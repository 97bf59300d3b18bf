"""The quality rules compared with datatrove's: speed, equal decisions in English, and what is kept and rejected in
Chinese. A section of benchmarks/clean.py; alone:

    python benchmarks/rules.py [--peer VENV]

English: web pages, answers and encyclopedia paragraphs from packages, most of them with a random amount of noise
(menus, lists, repeated lines, code, notices), so that documents are on both sides of every threshold. Chinese:
answers, reviews and a novel unchanged, and five kinds of junk made from word lists. The thresholds were fitted on
manuals and on junk from other templates (docs/log.md). The texts are made in benchmarks/rules_corpus.py.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from clean_stage import ALL_RULES, NO_FILTERS, kept_by_datatrove, kept_by_us, rates, run_clean, run_datatrove  # noqa: E402
from rules_corpus import chinese, english  # noqa: E402

NO_DEDUP = {"exact": False, "near": None}


def rules(folder: Path, python: Path | None) -> dict[str, float]:
    """filter_ratio, agreement_en, kept_zh, junk_zh and more. python: of datatrove's environment, None to measure only
    us. CPU seconds of whole processes, reading and writing included."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = english_rules(folder, python)
    figures.update(chinese_rules(folder))
    return figures


def english_rules(folder: Path, python: Path | None) -> dict[str, float]:
    texts = english()
    file = _write(folder / "en.jsonl", texts)
    size = file.stat().st_size / 1e6
    keys = {"filters": NO_FILTERS, "rules": {"use": ALL_RULES}, "dedup": NO_DEDUP}
    ours, published = run_clean(folder / "ours-en", {"a": file}, **keys)
    kept = kept_by_us(published, "a", file)
    print(f"rules, ours: {rates(size, ours)}, kept {len(kept) / len(texts):.3f}", flush=True)
    figures = {"filter_mb_per_cpu_s": size / ours.cpu}
    if python is None:
        return figures
    theirs = run_datatrove(python, "peer_rules.py", str(file), str(folder / "peer-en"))
    kept_there = kept_by_datatrove(folder / "peer-en/out")
    figures["filter_ratio"] = theirs.cpu / ours.cpu
    figures["agreement_en"] = 1 - len(kept ^ kept_there) / len(texts)
    figures["peer_keeps_en"] = len(kept_there) / len(texts)
    print(
        f"rules, datatrove: {rates(size, theirs)}, kept {figures['peer_keeps_en']:.3f}; decisions equal"
        f" {figures['agreement_en']:.4f}",
        flush=True,
    )
    return figures


def chinese_rules(folder: Path) -> dict[str, float]:
    clean, junk = chinese()
    labelled = [("clean", text) for text in clean]
    for kind, texts in junk.items():
        labelled += [(kind, text) for text in texts]
    file = _write(folder / "zh.jsonl", [text for _, text in labelled])
    keys = {"rules": {"use": ALL_RULES}, "language": {"keep": ["zh"]}, "block": {"words": ["spam"]}, "dedup": NO_DEDUP}
    _, published = run_clean(folder / "ours-zh", {"a": file}, **keys)
    kept = kept_by_us(published, "a", file)
    is_kept: dict[str, list[bool]] = {}
    for index, (kind, _) in enumerate(labelled):
        is_kept.setdefault(kind, []).append(str(index) in kept)
    shares = [f"{kind} {sum(hits) / len(hits):.3f} of {len(hits)}" for kind, hits in is_kept.items()]
    print(f"rules, Chinese, share kept: {', '.join(shares)}", flush=True)
    clean_hits = is_kept.pop("clean")
    num_junk = sum(len(hits) for hits in is_kept.values())
    num_junk_kept = sum(sum(hits) for hits in is_kept.values())
    return {"kept_zh": sum(clean_hits) / len(clean_hits), "junk_zh": 1 - num_junk_kept / num_junk}


def _write(file: Path, texts: list[str]) -> Path:
    with open(file, "w", encoding="utf-8") as handle:
        for number, text in enumerate(texts):
            handle.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="datatrove's environment (benchmarks/clean.py makes it)")
    arguments = parser.parse_args()
    python = arguments.peer / "bin/python" if arguments.peer else None
    with tempfile.TemporaryDirectory() as scratch:
        figures = rules(Path(scratch), python)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
