"""The basic filters keep prose of both languages and name what they drop."""

import random

from pipeline.data.cleaning.filters import Filters
from pipeline.data.cleaning.garbled_text import garbled_share
from pipeline.data.cleaning.outcomes import Document, Outcome
from pipeline.data.cleaning.steps import Steps, clean_batch


def judge(raw: list[str], **bounds) -> list[str | None]:
    documents = [Document(Outcome("f:1"), text) for text in raw]
    clean_batch(documents, Steps(filters=Filters(**bounds)))
    return [document.outcome.reason for document in documents]


def test_filters_keep_prose_and_name_what_they_drop():
    english_text = (
        "Call me a friend of the river. In the spring it rises to the second step of the old stone stairs, and the"
        " children of the town come to look at it, as they have always done; nobody remembers a year in which it did"
        " not, and nobody believes that there will be one."
    )
    chinese_text = (
        "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空。青山依旧在，几度夕阳红。白发渔樵江渚上，惯看秋月春风。"
        "一壶浊酒喜相逢。古今多少事，都付笑谈中。"
    )
    mixed_text = '今天我们介绍 Python 语言：print("hello") 会在屏幕上输出一行文字，许多人从这里开始学习编程。'
    code = "def add(a, b):\n    total = a + b\n    return total\n\n\nclass Reader:\n"
    code += "    def __init__(self, path):\n        self.path = path\n        self.opened = open(path)\n"
    french = (
        "L'été dernier, à Orléans, la fête a été très réussie ; les élèves ont chanté « à la claire fontaine », puis"
        " chacun est rentré chez soi."
    )
    assert judge([english_text, chinese_text, mixed_text, code, french]) == [None] * 5
    wrong = {
        "too_short": "好的，谢谢。",
        "few_letters": (
            "| 12.5 | 13.7 | -- | 99 |\n" * 2 + "| 1.15 | 3.71 | -- | 19 |\n" * 1 + " ".join(str(i) for i in range(40))
        ),
        "garbled": "".join(chinese_text.encode().decode("latin-1")),
        "long_words": "".join(
            random.Random(0).choice("ABCDEFabcdef") + ("+" if i % 60 == 59 else "") for i in range(3000)
        ),
        "repeated_lines": "\n".join(
            [english_text, "Share this page with your friends"] + ["Click here to subscribe to our letter today"] * 6
        ),
        "repeated_ngrams": "买一送一，限时优惠，欢迎来电咨询，" * 12 + chinese_text[:20],
    }
    assert judge(list(wrong.values())) == list(wrong)
    assert (
        judge(
            list(wrong.values()),
            min_tokens=1,
            min_letters=0,
            max_garbled=1,
            max_mean_word=1e9,
            max_repeated_lines=1,
            max_repeated_shingles=1,
        )
        == [None] * 6
    )
    assert (
        garbled_share("锟斤拷" * 3) == 1
        and garbled_share("It\u00e2\u20ac\u2122s") > 0
        and garbled_share(english_text) == garbled_share(chinese_text) == garbled_share(french) == 0
    )
