"""Conversion between simplified and traditional Chinese leaves Japanese and Korean alone."""

import pytest

from pipeline.data.cleaning.text_repair import Repair, repair_text


def test_script_needs_its_library():
    pytest.importorskip("opencc")
    assert repair_text("漢語和計算機", Repair(script="simplified")) == ("汉语和计算机", ["script"])


JAPANESE = (
    "東京都の機関",
    "国際連合安全保障理事会の決議について、関係機関が発表した。詳細は次の頁を参照のこと。",
    "図書館利用案内\n開館時間 午前九時\n休館日 毎週月曜日及び祝日",
    "日本国憲法\n第九条 戦争放棄、戦力及び交戦権の否認",
    "鉄道会社は駅の売店を閉める。\n東京駅\n京都駅\n関西国際空港駅",
    "図書館 売店 鉄道 駅 円",  # no kana at all
    "東京の物件です。とても良い部屋です。\n和室有、駐車場有、在庫不明\n",
    "これは報告書についての説明です。\n有価証券報告書等不実記載和解金\n",
    "裁判所の判断を示した。\n不作為違法確認請求事件在外被爆者被告控訴\n",
)
KOREAN = (
    "大韓民國의 主權은 國民에게 있고, 모든 權力은 國民으로부터 나온다.",
    "韓國 中央日報 記事입니다.",
    "서울大學校",
    "한국어 문서입니다. 대한민국 헌법의 역사에 관하여.\n國會在位不信任有無和議",
)


@pytest.mark.parametrize("script", ["simplified", "traditional"])
def test_japanese_and_korean_keep_their_script(script):
    """correctness 11"""
    pytest.importorskip("opencc")
    for text in (*JAPANESE, *KOREAN):
        assert repair_text(text, Repair(script=script)) == (text, []), text


@pytest.mark.parametrize(
    ("script", "written", "wanted"),
    [
        ("simplified", "這個軟體的說明書，請你仔細閱讀。", "这个软体的说明书，请你仔细阅读。"),
        ("traditional", "这个软件的说明书，请你仔细阅读。", "這個軟件的說明書，請你仔細閱讀。"),
        ("simplified", "臺北市政府", "台北市政府"),
        ("simplified", "約翰・史密斯來過這裡。", "约翰・史密斯来过这里。"),
    ],
)
def test_chinese_is_converted_in_both_directions(script, written, wanted):
    """correctness 11: the fence around Japanese keeps no Chinese out."""
    pytest.importorskip("opencc")
    assert repair_text(written, Repair(script=script)) == (wanted, ["script"])


def test_mixed_pages_are_converted_in_their_chinese_parts():
    """correctness 11: a Japanese title or sentence in a Chinese page, a Chinese paragraph in a Japanese one, and pages
    of two halves."""
    pytest.importorskip("opencc")
    chinese = "這部電影講述了一個女孩的故事，大家都說很好看。"
    simple = "这部电影讲述了一个女孩的故事，大家都说很好看。"
    film, sentence = "千と千尋の神隠し", "東京都の関係機関が発表した内容は次の通りです。"
    for written, wanted in (
        (f"{chinese * 3}片名是《{film}》，導演獲獎。", f"{simple * 3}片名是《{film}》，导演获奖。"),
        (f"{chinese * 4}{sentence}{chinese}", f"{simple * 4}{sentence}{simple}"),
        (f"{sentence * 4}\n{chinese}\n{sentence}", f"{sentence * 4}\n{simple}\n{sentence}"),
        (f"{chinese}\n{sentence}\n関西国際空港\n", f"{simple}\n{sentence}\n関西国際空港\n"),
        (f"{KOREAN[0]}\n{chinese}", f"{KOREAN[0]}\n{simple}"),
    ):
        assert repair_text(written, Repair(script="simplified"))[0] == wanted
        assert repair_text(wanted, Repair(script="simplified"))[0] == wanted
    back = repair_text(f"{simple}\n{sentence}\n関西国際空港", Repair(script="traditional"))[0]
    assert back == f"{chinese}\n{sentence}\n関西国際空港"
