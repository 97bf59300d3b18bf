"""Mojibake is undone, and right text left alone."""

import pytest

from pipeline.data.cleaning.mojibake import fix_mojibake

ZH = (
    "今天我们来介绍一种新的方法：先把所有的文字读进来，然后一行一行地看，最后再决定要不要留下。这是很多人都在用的办法。"
)
FR = "L'été dernier, à Orléans, la fête a été très réussie ; c’est “la plus belle”, dit-on — voilà."


@pytest.mark.parametrize(
    "broken",
    [
        ZH.encode().decode("latin-1"),
        ZH.encode("gbk").decode("latin-1"),
        ZH.encode().decode("gb18030", "strict") if len(ZH.encode()) % 2 == 0 else None,
    ],
)
def test_chinese_in_a_wrong_encoding_is_mended(broken):
    if broken is not None:
        assert fix_mojibake(broken) == ZH


def test_utf8_read_as_gbk_is_mended_where_it_can_be():
    for text in (ZH, ZH[:30], ZH[3:40]):
        raw = text.encode()
        try:
            broken = raw.decode("gb18030")
        except UnicodeDecodeError:
            continue
        assert fix_mojibake(broken) == text


def test_windows_1252_is_mended():
    assert (
        fix_mojibake(FR.encode().decode("cp1252", "replace").replace("\ufffd", "\u009d")).startswith(
            "L'été dernier, à Orléans"
        )
        and fix_mojibake("Itâ€™s") == "It’s"
    )


@pytest.mark.parametrize(
    "text",
    [
        ZH,
        FR,
        "Ö, Ü” und ß",
        "naïve café",
        "价格是 100 元",
        "饕餮魑魅魍魉",
        "鐨勫",
        "plain",
        "ÄÖÜ äöü ß",
        "¿Qué tal? ¡Bien!",
        "東京は日本の首都です。",
        "한국어",
        "Я люблю тебя",
        "滾滾長江東逝水，浪花淘盡英雄。",
    ],
)
def test_right_text_is_left_alone(text):
    assert fix_mojibake(text) == text
