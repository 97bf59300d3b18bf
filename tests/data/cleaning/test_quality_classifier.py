"""The classifier and the language model that a recipe trains: right on what they were trained for, equal in any
batch, the same after a kill."""

import json
import math
import random
from pathlib import Path

import numpy as np
from harness import files_of, stage, succeed

from pipeline.data.cleaning import perplexity_model, quality_classifier
from pipeline.data.cleaning.token_hashes import tokens
from pipeline.data.sources.sources import Source

EN = (
    "the river bridge town people winter story market garden house old letter road field water stone night morning"
    " child teacher".split()
)
SPAM = "buy cheap pills casino bonus free click offer winner cash loan now best price order online deal".split()
ZH, ZH_SPAM = (
    "山水人家春天故事河流老师孩子早晨花园石头桥梁书信道路田野冬夜市集",
    "购买便宜彩票奖金免费点击优惠现金贷款现在最好价格在线下单注册",
)


def sentences(rng: random.Random, words, number: int, by: str) -> str:
    """Each word is followed by one of three of its own, so that there is an order to be learned."""
    at, found = rng.randrange(len(words)), []
    for _ in range(number):
        found.append(words[at])
        at = (at * 7 + rng.choice((1, 2, 5))) % len(words)
    return by.join(found)


def write(folder: Path, name: str, kinds: list, number: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = [sentences(rng, *rng.choice(kinds)) for _ in range(number)]
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    return texts


def examples(folder: Path) -> dict[str, Source]:
    folder.mkdir(parents=True, exist_ok=True)
    good, bad = [(EN, 60, " "), (list(ZH), 80, "")], [(SPAM, 60, " "), (list(ZH_SPAM), 80, "")]
    write(folder, "good", good, 300, 1)
    write(folder, "bad", bad, 300, 2)
    return {name: Source(path=f"{folder}/{name}.jsonl") for name in ("good", "bad")}


def test_the_classifier_tells_its_kinds_apart_in_both_languages(tmp_path):
    quality = quality_classifier.Quality(good=["good"], bad=["bad"])
    quality_classifier.train(examples(tmp_path), quality, tmp_path / "m")
    rng = random.Random(9)
    texts = [
        sentences(rng, words, 50, by)
        for words, by in ((EN, " "), (list(ZH), ""), (SPAM, " "), (list(ZH_SPAM), ""))
        for _ in range(20)
    ]
    found = quality_classifier.quality_scores(tokens(texts), tmp_path / "m")
    assert (found[:40] > 0.9).all() and (found[40:] < 0.1).all()
    assert quality_classifier.describe(tmp_path / "m") == {"examples": 600, "accuracy": 1.0, "auc": 1.0}
    # whatever the batch
    assert [
        float(quality_classifier.quality_scores(tokens([text]), tmp_path / "m")[0]) for text in texts
    ] == found.tolist()
    again = tmp_path / "again"
    quality_classifier.train(examples(tmp_path), quality, again)
    assert (again / "quality.npz").read_bytes() == (tmp_path / "m/quality.npz").read_bytes()


def test_perplexity_against_a_plain_model(tmp_path):
    perplexity_model.train(examples(tmp_path), perplexity_model.Perplexity(like=["good"]), tmp_path / "m")
    learned = [json.loads(line)["text"] for line in (tmp_path / "good.jsonl").read_text().splitlines()]
    grams: dict[tuple, int] = {}
    split = [text.split() if " " in text else list(text) for text in learned]
    for words in split:
        for i in range(len(words)):
            for n in (1, 2, 3):
                if i + 1 >= n:
                    grams[tuple(words[i + 1 - n : i + 1])] = grams.get(tuple(words[i + 1 - n : i + 1]), 0) + 1
    total, kinds = sum(map(len, split)), sum(len(gram) == 1 for gram in grams)

    def plain(words: list[str]) -> float:
        logs = 0.0
        for i, word in enumerate(words):
            value = 0.15 * (grams.get((word,), 0) + 0.5) / (total + 0.5 * (kinds + 1))
            for n, share in ((2, 0.35), (3, 0.5)):
                context = tuple(words[i + 1 - n : i]) if i + 1 >= n else ()
                if context and grams.get(context):
                    value += share * grams.get((*context, word), 0) / grams[context]
            logs -= math.log(value)
        return math.exp(logs / len(words))

    rng = random.Random(3)
    texts = [
        sentences(rng, EN, 40, " "),
        sentences(rng, list(ZH), 40, ""),
        " ".join(rng.sample(EN, 15)),
        sentences(rng, SPAM, 30, " "),
        "one",
    ]
    found = perplexity_model.perplexities(tokens([*texts, ""]), tmp_path / "m")
    np.testing.assert_allclose(
        found[:5], [plain(text.split() if " " in text or text == "one" else list(text)) for text in texts], rtol=1e-3
    )
    assert np.isnan(found[5]) and found[0] < found[2] < found[3]
    assert [float(perplexity_model.perplexities(tokens([text]), tmp_path / "m")[0]) for text in texts] == found[
        :5
    ].tolist()


def test_a_recipe_trains_and_applies_both(tmp_path):
    def recipe(folder: Path) -> Path:
        examples(folder)
        write(folder, "corpus", [(EN, 60, " "), (list(ZH), 80, ""), (SPAM, 60, " "), (list(ZH_SPAM), 80, "")], 200, 4)
        block = {
            "sources": {"a": {"path": "corpus.jsonl"}},
            "holdout": 0.1,
            "workers": 1,
            "unit_bytes": 9_000,
            "dedup": {"near": None},
            "filters": {"max_repeated_shingles": 1},
            "examples": {name: {"path": f"{name}.jsonl"} for name in ("good", "bad")},
            "quality": {"good": ["good"], "bad": ["bad"]},
            "perplexity": {"like": ["good"], "max_en": 100, "max_zh": 100},
        }
        (folder / "r.yaml").write_text(json.dumps({"name": "t", "stages": {"clean": block}}))
        return folder / "r.yaml"

    succeed("clean", recipe(tmp_path / "a"), cwd=tmp_path / "a")
    report = json.loads((tmp_path / "a/runs/t/clean/current/report.json").read_text())
    rules = report["rules"]["rules"]
    assert (
        60 < rules["low_quality"]["documents"] < 140
        and rules["low_quality"]["with"] == {"high_perplexity": rules["low_quality"]["documents"]}
        and rules["high_perplexity"]["alone"] == 0
    )
    assert (
        report["rules"]["models"]["quality"]["auc"] == 1 and "quality.min_score" in rules["low_quality"]["thresholds"]
    )
    code, text = stage("clean", recipe(tmp_path / "b"), cwd=tmp_path / "b", fault="work:2")
    assert code == -9, text
    succeed("clean", tmp_path / "b/r.yaml", cwd=tmp_path / "b")
    assert files_of(tmp_path / "a/runs/t/clean/current") == files_of(tmp_path / "b/runs/t/clean/current")
    code, text = stage(
        "clean", tmp_path / "b/r.yaml", 'clean.quality={"good": ["good"], "bad": ["worse"]}', cwd=tmp_path / "b"
    )
    assert code == 2 and "quality.bad: there is no example source 'worse'" in text
