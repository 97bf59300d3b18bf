"""Every statistic against a plain reading of its definition."""

import collections
import random
import re

import numpy as np
import pytest

from pipeline.data.cleaning import text_statistics
from pipeline.data.cleaning.normal_form import normalise
from pipeline.data.cleaning.rules import Lines
from pipeline.data.cleaning.word_split import split_words

EN = (
    "The committee met on Tuesday to decide what should be done with the old bridge. Nobody had crossed it for years,"
    " and the river below had moved. "
)
ZH = "这座桥是一百年前修的，如今已经没有人走了。河水改了道，村里的人也搬到了别的地方，只有老人还记得它原来的样子。"


def words_of(text: str) -> list[str]:
    batch = split_words([text])
    return [batch.joined[first : first + length] for first, length in zip(batch.first, batch.length, strict=True)]


def repeated(items: list[str]) -> tuple[int, int]:
    seen, number, characters = set(), 0, 0
    for item in items:
        if item in seen:
            number, characters = number + 1, characters + len(item)
        seen.add(item)
    return number, characters


def plain(text: str) -> dict[str, float]:
    """Gopher's table A1 and FineWeb's rules as their published code has them, document by document."""
    words = words_of(text)
    found = {}
    # datatrove tells lines apart by their indentation, too
    paragraphs = [part.strip() for part in re.split(r"\n{2,}", text.strip())]
    lines = [line.strip() for line in re.split(r"\n+", text)]
    for name, items in (("paragraphs", paragraphs), ("lines", lines)):
        number, characters = repeated(items)
        found[f"dup_{name}"], found[f"dup_{name[:-1]}_chars"] = number / len(items), characters / len(text)
    for n in (2, 3, 4):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        found[f"top_{n}_gram"] = 0.0
        if grams:
            gram, times = collections.Counter(grams).most_common(1)[0]
            found[f"top_{n}_gram"] = len(gram) * times / len(text)
    for n in range(5, 11):
        seen, characters, at = set(), 0, 0
        while at < len(words) - n + 1:
            gram = tuple(words[at : at + n])
            if gram in seen:
                characters, at = characters + len("".join(gram)), at + n
            else:
                seen.add(gram)
                at += 1
        found[f"dup_{n}_grams"] = characters / len(text)
    kept = [line.strip() for line in text.splitlines() if len(line.split()) >= 3]
    if kept:
        found["short_lines"] = sum(len(line) <= 30 for line in kept) / len(kept)
        found["dup_kept_chars"] = repeated(kept)[1] / sum(map(len, kept))
        found["line_punctuation"] = sum(line.endswith((".", "!", "?", "。")) for line in kept) / len(kept)
        found["newlines"] = (len(kept) - 1) / sum(len(words_of(line)) for line in kept)
    found["bullet_lines"] = sum(line.lstrip().startswith(("-", "•")) for line in text.splitlines()) / len(
        text.splitlines()
    )
    found["ellipsis_lines"] = sum(line.rstrip().endswith(("...", "…")) for line in text.splitlines()) / len(
        text.splitlines()
    )
    found["hashes"] = text.count("#") / len(words)
    found["ellipses"] = (text.count("...") + text.count("…")) / len(words)
    found["alpha_words"] = sum(any(c.isalpha() for c in word) for word in words) / len(words)
    found["stop_words"] = len(set(words) & {"the", "be", "to", "of", "and", "that", "have", "with"})
    return found


def test_statistics_are_what_their_definitions_say():
    rng = random.Random(3)
    texts = []
    for _ in range(120):
        vocabulary = rng.choice(
            [
                "a b cc the of".split(),
                "the committee met to decide what should be done with that bridge and why".split(),
            ]
        )
        lines = []
        for _ in range(rng.randrange(1, 25)):
            line = " ".join(rng.choices(vocabulary, k=rng.randrange(1, 14))) + rng.choice(
                [".", "", "...", "!", "…", " #", '."']
            )
            lines.append(rng.choice([line, line, "- " + line, "  " + line, rng.choice(lines or [line])]))
        texts.append(normalise(rng.choice(["\n", "\n\n"]).join(lines)))
    texts += [EN, "one", EN * 4, f"{EN}\n\n{EN}\n{EN}"]
    texts = [text for text in map(normalise, texts) if text]
    values, _ = text_statistics.measure(
        split_words(texts), np.zeros(len(texts), bool), Lines(), np.full(len(texts), 30)
    )
    for text, row in zip(texts, values, strict=True):
        mine = dict(zip(text_statistics.NAMES, row.tolist(), strict=True))
        for name, value in plain(text).items():
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, text)


def test_statistics_do_not_depend_on_the_batch():
    texts = [normalise(text) for text in (EN, ZH, EN + ZH, "", "...", "a\n\nb\n\na", EN * 9, "。", "- x\n- x")]
    chinese = np.array([False, True, True, False, False, False, False, True, False])
    together, _ = text_statistics.measure(split_words(texts), chinese, Lines(), np.full(len(texts), 30))
    for index, text in enumerate(texts):
        alone, _ = text_statistics.measure(split_words([text]), chinese[index : index + 1], Lines(), np.full(1, 30))
        np.testing.assert_array_equal(alone[0], together[index])


def test_sentences_and_lines_of_c4():
    text = (
        'He said "no." Then he left! Mr. Smith stayed... and slept.\nPlease enable JavaScript to go on\nshort line\nWe'
        " use cookies on this page.\nOne more. {"
    )
    values, kept = text_statistics.measure(split_words([text]), np.zeros(1, bool), Lines(), np.full(1, 30))
    named = dict(zip(text_statistics.NAMES, values[0].tolist(), strict=True))
    assert (
        kept.tolist() == [True, False, False, False, True]
        and named["curly_brackets"] == 1
        and named["sentences"] == 3 + 1
    )


ENDED = [
    "他说：“好。”",
    "她笑道：“真的吗？”",
    "「行こう」と彼は言った。",
    "「行こう」",
    "『走れメロス』",
    "他回答说“不去”",
    "新华社北京五月一日电（记者 王五）",
    "（完。）",
    "（他停了下来。）”",
    "他沉默了……",
    "他沉默了…",
    "“可是……”",
    "彼は黙った‥‥",
    "真好！",
    "真好！！！」",
    "什麼？",
    "完了｡",
    "以上です．",
    '他说:"好。"',
    "他问：‘谁？’",
]
OPEN = [
    "首页",
    "手机 电脑 相机",
    "第一章",
    "欢迎来到，",
    "他说：",
    "目录：",
    "登录 | 注册",
    "《红楼梦》",
    "【公告】",
    "价格 100 元",
    "东京都",
]


def ended(line: str) -> float:
    """FineWeb's share of lines that end as sentences do, of a text of this line alone."""
    lines = Lines(min_words=1, min_tokens_zh=1)
    values, _ = text_statistics.measure(split_words([line]), np.ones(1, bool), lines, np.full(1, 12))
    return values[0, text_statistics.NAMES.index("line_punctuation")]


def test_lines_end_in_chinese_and_japanese_as_they_do_in_english():
    """correctness 10: a quote or a bracket behind the stop, the form of Japanese without one, ellipses."""
    assert [line for line in ENDED if ended(line) != 1] == []
    assert [line for line in OPEN if ended(line) != 0] == []
    # what datatrove says of English stays: a stop, and nothing behind it
    assert [
        ended(line) for line in ("He left.", "Why?", 'He said "no."', "He said “no.”", "It was so…", "(see above)")
    ] == [1, 1, 0, 0, 0, 0]


def test_c4_and_fineweb_agree_on_where_a_chinese_line_ends():
    """correctness 10: what FineWeb counts as ended, C4's rule of terminal punctuation keeps, but for its ellipses."""
    lines = Lines(min_words=1, min_tokens_zh=1, terminal_punctuation=True)
    text = "\n".join([*ENDED, *OPEN])
    _, kept = text_statistics.measure(split_words([text]), np.ones(1, bool), lines, np.full(1, 12))
    gone = [line for line, keeping in zip(text.split("\n"), kept, strict=True) if not keeping]
    assert gone == [line for line in ENDED if line[-1] in "…‥"] + OPEN


def test_a_chinese_ellipsis_is_one():
    """correctness 10: Gopher counts ellipses; Chinese writes one with two signs, Japanese also with two dots."""
    texts = ["他想了很久……还是没有回答。", "他想了很久⋯⋯还是没有回答。", "彼は考えた‥‥答えなかった。"]
    batch = split_words(texts)
    values, _ = text_statistics.measure(batch, np.ones(3, bool), Lines(), np.full(3, 12))
    ellipses = values[:, text_statistics.NAMES.index("ellipses")] * np.diff(batch.words)
    np.testing.assert_allclose(ellipses, 1, rtol=1e-5)
