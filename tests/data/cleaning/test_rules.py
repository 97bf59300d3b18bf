"""The published quality rules as a stage applies them to prose and junk of both languages."""

import random

from judged_texts import ZH, article, judged

from pipeline.data.cleaning.filters import Filters
from pipeline.data.cleaning.rules import RULE_SETS, Rules, Thresholds
from pipeline.data.cleaning.steps import Steps, reasons

EN = (
    "The committee met on Tuesday to decide what should be done with the old bridge. Nobody had crossed it for years,"
    " and the river below had moved. "
)


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


def test_prose_of_both_languages_passes_and_junk_does_not():
    rng = random.Random(1)
    rules = Rules(use=list(RULE_SETS))
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
    names = [name for name, _ in reasons(Steps(rules=rules, filters=filters))]
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
