"""The published quality rules: words against spaCy's, every statistic against a plain reading of its definition, and
the rules' part of the ledger."""

import collections
import json
import random
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.cleaning import steps, text_statistics
from pipeline.data.cleaning.filters import Filters
from pipeline.data.cleaning.language import KNOWN, Language, detect
from pipeline.data.cleaning.rule_report import Rejections
from pipeline.data.cleaning.rules import GROUPS, Lines, Rules, Thresholds
from pipeline.data.cleaning.text_arrays import normalise
from pipeline.data.cleaning.word_split import analyse, word_hashes

EN = (
    "The committee met on Tuesday to decide what should be done with the old bridge. Nobody had crossed it for years,"
    " and the river below had moved. "
)
ZH = "这座桥是一百年前修的，如今已经没有人走了。河水改了道，村里的人也搬到了别的地方，只有老人还记得它原来的样子。"


def words_of(text: str) -> list[str]:
    batch = analyse([text])
    return [batch.joined[first : first + length] for first, length in zip(batch.first, batch.length, strict=True)]


# What spacy.blank("en") of spaCy 3.8.18 gives, without its tokens of white space.
SPACY = {
    '(see "foo-bar", e.g.) "Don\'t!" Mr. Smith\'s': [
        "(",
        "see",
        '"',
        "foo",
        "-",
        "bar",
        '"',
        ",",
        "e.g.",
        ")",
        '"',
        "Do",
        "n't",
        "!",
        '"',
        "Mr.",
        "Smith",
        "'s",
    ],
    "U.S.A. 3.5% well--then we'll $5.00 a.m. x=y": [
        "U.S.A.",
        "3.5",
        "%",
        "well",
        "--",
        "then",
        "we",
        "'ll",
        "$",
        "5.00",
        "a.m.",
        "x",
        "=",
        "y",
    ],
    'I said: "no." Then... he left.': ["I", "said", ":", '"', "no", ".", '"', "Then", "...", "he", "left", "."],
    "[1] {a} #tag @you & co": ["[", "1", "]", "{", "a", "}", "#", "tag", "@you", "&", "co"],
    "end.Next one,two 10-20 - -x": ["end", ".", "Next", "one", ",", "two", "10", "-", "20", "-", "-x"],
}


@pytest.mark.parametrize("text", SPACY)
def test_words_are_spacys(text):
    assert words_of(text) == SPACY[text]


def test_every_cjk_character_is_a_word():
    assert words_of("中文，好。 and 日本") == ["中", "文", "，", "好", "。", "and", "日", "本"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text(alphabet=st.sampled_from("aAbZ.é 9.,\n-'’\"…()[]:/%+$中文。！#~s tn"), max_size=60),
        min_size=1,
        max_size=4,
    )
)
@example(["", "A."])
@example(["", "'s"])
def test_words_cover_the_text_and_do_not_depend_on_the_batch(texts):
    texts = [normalise(text) for text in texts]
    batch = analyse(texts)
    for index, text in enumerate(texts):
        mine = slice(batch.words[index], batch.words[index + 1])
        found = [
            batch.joined[first : first + length]
            for first, length in zip(batch.first[mine], batch.length[mine], strict=True)
        ]
        assert "".join(found) == re.sub(r"\s", "", text) and found == words_of(text)
        assert (batch.hash[mine] == word_hashes(found)).all()


# ---- statistics against their definitions, in plain Python over the same words ---------------------------------------


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
    values, _ = text_statistics.measure(analyse(texts), np.zeros(len(texts), bool), Lines(), np.full(len(texts), 30))
    for text, row in zip(texts, values, strict=True):
        mine = dict(zip(text_statistics.NAMES, row.tolist(), strict=True))
        for name, value in plain(text).items():
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, text)


def test_statistics_do_not_depend_on_the_batch():
    texts = [normalise(text) for text in (EN, ZH, EN + ZH, "", "...", "a\n\nb\n\na", EN * 9, "。", "- x\n- x")]
    chinese = np.array([False, True, True, False, False, False, False, True, False])
    together, _ = text_statistics.measure(analyse(texts), chinese, Lines(), np.full(len(texts), 30))
    for index, text in enumerate(texts):
        alone, _ = text_statistics.measure(analyse([text]), chinese[index : index + 1], Lines(), np.full(1, 30))
        np.testing.assert_array_equal(alone[0], together[index])


def test_sentences_and_lines_of_c4():
    text = (
        'He said "no." Then he left! Mr. Smith stayed... and slept.\nPlease enable JavaScript to go on\nshort line\nWe'
        " use cookies on this page.\nOne more. {"
    )
    values, kept = text_statistics.measure(analyse([text]), np.zeros(1, bool), Lines(), np.full(1, 30))
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
    values, _ = text_statistics.measure(analyse([line]), np.ones(1, bool), lines, np.full(1, 12))
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
    _, kept = text_statistics.measure(analyse([text]), np.ones(1, bool), lines, np.full(1, 12))
    gone = [line for line, keeping in zip(text.split("\n"), kept, strict=True) if not keeping]
    assert gone == [line for line in ENDED if line[-1] in "…‥"] + OPEN


def test_news_and_dialogue_in_chinese_are_kept():
    """correctness 10: a news item of one paragraph that ends in a bracket, and classical dialogue."""
    news = "记者从市水务局了解到，这座大桥将于明年春天开始维修，工期约为六个月。其间行人可以从下游的渡口过河，渡船每半个小时一班，不收费用。"
    item = f"{news}\n市民可以拨打热线了解详情，也可以到现场询问工作人员，他们会一直在那里等候大家的到来（记者 王五）"
    talk = [
        f"{who}道：“{what}”"
        for who in ("玄德", "孔明", "关公", "张飞")
        for what in ("此计甚妙，只是要走得快些。", "天下大事，分久必合，合久必分！", "我与你同去，如何？")
    ]
    rng = random.Random(4)
    rng.shuffle(talk)
    rules = Rules(use=["fineweb"])
    for text in (item, "\n".join(talk)):
        row = judged([text], rules=rules)[0]
        assert "min_line_punctuation" not in reasons_of(row, rules), reasons_of(row, rules)
    menu = "\n".join(["首页", "新闻中心", "产品介绍", "联系我们", "登录 | 注册", "网站地图"] * 3)
    assert "min_line_punctuation" in reasons_of(judged([menu], rules=rules)[0], rules)


def test_a_chinese_ellipsis_is_one():
    """correctness 10: Gopher counts ellipses; Chinese writes one with two signs, Japanese also with two dots."""
    texts = ["他想了很久……还是没有回答。", "他想了很久⋯⋯还是没有回答。", "彼は考えた‥‥答えなかった。"]
    batch = analyse(texts)
    values, _ = text_statistics.measure(batch, np.ones(3, bool), Lines(), np.full(3, 12))
    ellipses = values[:, text_statistics.NAMES.index("ellipses")] * np.diff(batch.words)
    np.testing.assert_allclose(ellipses, 1, rtol=1e-5)


# ---- the rules as a stage has them -----------------------------------------------------------------------------------


def judged(texts: list[str], **blocks) -> list[dict]:
    rows = [({"status": "ok"}, text) for text in texts]
    steps.judge(rows, steps.Steps(**blocks))
    return [row for row, _ in rows]


def article(rng: random.Random, base: str, number: int) -> str:
    """Prose whose sentences differ: words of `base` in another order each."""
    if base is ZH:
        signs = [c for c in ZH if c not in "，。"]
        return "\n".join(
            "".join(rng.sample(signs, 30)) + "，" + "".join(rng.sample(signs, 9)) + "。" for _ in range(number)
        )
    words = base.replace(",", "").replace(".", "").lower().split()
    return "\n".join(
        f"{rng.choice(words).title()} "
        + " ".join(rng.choice(words) + rng.choice(["s", "ed", "ing", ""]) for _ in range(14))
        + f", {rng.choice(words)} the {rng.choice(words)}."
        for _ in range(number)
    )


def test_prose_of_both_languages_passes_and_junk_does_not():
    rng = random.Random(1)
    rules = Rules(use=list(GROUPS))
    assert [row.get("reason") for row in judged([article(rng, EN, 9), article(rng, ZH, 9)], rules=rules)] == [
        None,
        None,
    ]
    junk = {
        "min_stop_words": (
            "，".join(
                rng.choices(["手机", "电脑", "相机", "耳机", "键盘", "鼠标", "冰箱", "空调", "沙发", "台灯"], k=200)
            )
            + "。"
        ),
        "max_top_2_gram": "买它 " * 200,
        "max_newlines": "\n".join(f"1{i} 手机 {i} 元" for i in range(60)),
        "max_curly_brackets": article(rng, EN, 9) + "\nif (x) { return the thing; }",
    }
    for key, text in junk.items():
        row = judged([text], rules=rules, filters=Filters(max_repeated_shingles=1))[0]
        assert row["status"] == "filtered" and key in reasons_of(row, rules), (key, reasons_of(row, rules))


def reasons_of(row: dict, rules: Rules, filters: Filters = Filters()) -> list[str]:
    names = [name for name, _ in steps.reasons(steps.Steps(rules=rules, filters=filters))]
    return [name for bit, name in enumerate(names) if row["failed"] >> bit & 1]


def test_each_rule_can_be_turned_off_and_moved():
    text = article(random.Random(2), EN, 9) + "\nif (x) { return the thing; }"
    assert judged([text], rules=Rules(use=["c4"]))[0]["reason"] == "max_curly_brackets"
    assert judged([text], rules=Rules(use=["c4"], en=Thresholds(max_curly_brackets=None)))[0]["status"] == "ok"
    assert judged([text], rules=Rules(use=["fineweb"]))[0]["status"] == "ok"
    assert judged([text], rules=Rules(use=["gopher_quality"], en=Thresholds(min_words=500)))[0]["reason"] == "min_words"


def test_lines_are_taken_out_and_the_rest_stays():
    good = article(random.Random(2), EN, 9)
    row = judged(
        [f"Please enable javascript to see this page\n\n{good}\n\nMenu\n\nThe end of it all[1] is here."],
        rules=Rules(use=["c4"]),
    )[0]
    assert row["text"] == f"{good}\n\nThe end of it all is here."


def test_known_languages_are_the_detectors():
    import eldc

    assert sorted(KNOWN) == sorted(eldc.LANGUAGES)


def test_languages_are_named_and_kept():
    french = (
        "L'été dernier, à Orléans, la fête a été très réussie ; les élèves ont chanté et chacun est rentré chez soi"
        " avant la nuit."
    )
    codes, scores = detect([EN, ZH, french, "夫天地者，萬物之逆旅也；光陰者，百代之過客也。", ""])
    assert codes == ["en", "zh", "fr", "zh", "und"] and (scores[:4] > 0.7).all() and scores[4] == 0
    rows = judged([EN, ZH, french], language=Language(keep=["en", "zh"]))
    assert [(row.get("reason"), row["language"], row["kind"]) for row in rows] == [
        (None, "en", 0),
        (None, "zh", 1),
        ("language", "fr", 2),
    ]
    assert judged([EN], language=Language(keep=["en"], min_confidence=0.999))[0]["reason"] == "uncertain_language"


# ---- the ledger of the rules -----------------------------------------------------------------------------------------


def outcome(rows: list[dict]):
    import pyarrow

    kinds = {
        "failed": pyarrow.int64(),
        "kind": pyarrow.int8(),
        "bytes": pyarrow.int64(),
        "statistics": pyarrow.binary(),
    }
    return pyarrow.table(
        {
            key: pyarrow.array([row.get(key) for row in rows], kinds.get(key, pyarrow.string()))
            for key in (
                "place",
                "id",
                "excerpt",
                "bytes",
                "language",
                "kind",
                "statistics",
                "failed",
                "changed",
                "matched",
            )
        }
    )


def test_the_ledger_counts_overlaps_samples_and_what_other_thresholds_would_do():
    rng = random.Random(5)
    texts = [article(rng, base, rng.randrange(1, 12)) for base in (EN, ZH) for _ in range(40)] + [
        "too short",
        EN * 20,
        ZH * 20,
        "Ã©tÃ© " * 9,
    ]
    rules = Rules(use=list(GROUPS))
    rows = judged(texts, rules=rules)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        row.update(id=f"{number * 7919 % 997:032x}", place=f"f:{number}", bytes=len(text.encode()))
    rows.append({"id": None, "place": "f:x", "status": "bad"})
    reports = []
    for cuts in ([0, 85], [0, 13, 40, 85]):  # whatever the units, and their order
        found = Rejections(steps.Steps(rules=rules))
        for low, high in reversed(list(zip(cuts, cuts[1:], strict=False))):
            found.add("s", outcome(rows[low:high]))
        reports.append(found.report())
    assert reports[0] == reports[1]
    report = json.loads(json.dumps(reports[0]))
    assert report["documents"] == 84 and report["judged_as"] == {"en": 43, "zh": 41, "other": 0}
    failing = {
        name: [row for row in rows if "failed" in row and name in reasons_of(row, rules)] for name in report["rules"]
    }
    assert report["rejected"] == sum(row["status"] == "filtered" for row in rows)
    for name, entry in report["rules"].items():
        assert entry["documents"] == len(failing[name]) and entry["bytes"] == sum(row["bytes"] for row in failing[name])
        assert entry["alone"] == sum(len(reasons_of(row, rules)) == 1 for row in failing[name])
        assert entry["first"] == sum(row["reason"] == name for row in rows if row.get("reason"))
        assert [sample["id"] for sample in entry["samples"]] == sorted(row["id"] for row in failing[name])[:5]
        for other, number in entry["with"].items():
            assert number == sum(other in reasons_of(row, rules) for row in failing[name])
    # Another threshold, tried: the ledger said what it would do.
    entry = next(
        item for item in report["rules"]["min_sentences"]["thresholds"]["rules.en.min_sentences"] if item[0] == 10
    )
    again = judged(texts, rules=Rules(use=list(GROUPS), en=Thresholds(min_sentences=10)))
    english = [row for row in again if row["kind"] == 0]
    assert (
        entry[1]
        == sum("min_sentences" in reasons_of(row, rules) for row in english)
        > report["rules"]["min_sentences"]["first"]
    )
    assert entry[2] == sum(row["status"] == "filtered" for row in english)
