"""Character sets of web pages: labels and tables of the WHATWG Encoding Standard, wrong declarations, damaged bytes
(correctness 8 and 26). Expected characters are those of the standard's published indexes."""

import json
import re

import pytest
from harness import succeed
from warc import record, response

from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import Record, read
from pipeline.data.sources.sources import Source

pytest.importorskip("webencodings")
pytest.importorskip("resiliparse")
from pipeline.data.sources.html_charset import charset_label, decode_page  # noqa: E402

# The first article of the Universal Declaration of Human Rights.
TEXTS = {
    "ja": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。人人有资格享有本宣言所载的一切权利和自由。",
    "tw": "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。人人有資格享有本宣言所載的一切權利和自由。",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "en": "All human beings are born “free” and equal – in dignity and rights. It’s a spirit of brotherhood… and a café’s.",
}
PLAIN = "All human beings are born free and equal in dignity and rights. "


def html(text: str, label: str = "", codec: str = "utf-8") -> bytes:
    meta = f'<meta charset="{label}">' if label else ""
    return f"<html><head>{meta}<title>t</title></head><body><p>{text}</p></body></html>".encode(codec)


@pytest.mark.parametrize(
    "label, codec, raw, text",
    [
        ("shift_jis", "cp932", b"\x87\x40\x8b\x9e\xfb\xfc\x81\x60", "①京髙～"),  # it is windows-31j
        ("Shift-JIS ", "cp932", b"\x5c\x7e\x80\xb1", "\\~\x80ｱ"),
        ("x-sjis", "cp932", b"\xf0\x40", "\ue000"),
        ("euc-jp", "euc_jp", b"\xad\xa1\xa1\xc1\xb5\xfe\x8e\xb1\x8f\xb0\xa1\xfc\xe2", "①～京ｱ丂髙"),
        ("iso-2022-jp", "iso2022_jp", b"\x1b$B5~-!\x1b(J\\~\x1b(I1\x1b(B\\~", "京①¥‾ｱ\\~"),
        ("gb2312", "gbk", b"\x80\x81\x40\x94\x39\xda\x33\xa6\xd9\xfe\x59\xa3\xa0", "€丂💩︐龴\u3000"),
        ("gb_2312-80", "gbk", b"\x88\x75", "坲"),
        ("chinese", "gbk", b"\xa8\xbf\xa8\xbc", "ǹḿ"),
        ("ks_c_5601-1987", "cp949", b"\x8c\x63\xb0\xa1", "똠가"),  # it is windows-949
        ("x-x-big5", "big5", b"\xa1\x45\xa1\xe3\xa2\x46\x88\x62\xc6\xe7", "‧～￠Ê̄ぁ"),
        ("big5-hkscs", "big5", b"\xa1\xc2\xa1\xf2\xfe\x40", "¯⊕鑂"),
        ("iso-8859-1", "cp1252", b"\x93caf\xe9\x94 \x80\x81", "“café” €\x81"),
        ("latin1", "cp1252", b"it\x92s", "it’s"),
        ("US-ASCII", "cp1252", b"\x99", "™"),
        ("iso-8859-9", "cp1254", b"\x80\xfd", "€ı"),  # it is windows-1254
        ("tis-620", "cp874", b"\x85\xa1\x81", "…ก\x81"),  # it is windows-874
        ("koi8-u", "koi8-u", b"\xae\xa4", "ўє"),
        ("windows-1255", "cp1255", b"\xca\xe0", "\u05baא"),
        ("iso-8859-8-i", "iso8859-8", b"\xe0", "א"),
        ("macintosh", "mac-roman", b"\x8e", "é"),
        ("hz-gb-2312", "hz", b"~{VPND~} a", "中文 a"),  # browsers refuse it, because of scripts
    ],
)
def test_bytes_are_what_the_tables_of_the_standard_say(label, codec, raw, text):
    """correctness 8"""
    language = {"cp932": "ja", "euc_jp": "ja", "iso2022_jp": "ja", "gbk": "zh", "cp949": "ko", "big5": "tw"}.get(codec)
    around = TEXTS[language] if language else PLAIN
    found = decode_page(around.encode(codec) + raw + b" .", label, html=False)
    assert found.text == around + text + " ." and found.replaced == 0


LEGACY = {
    "ja": ("shift_jis", "euc-jp", "iso-2022-jp"),
    "ko": ("euc-kr",),
    "zh": ("gbk", "gb18030"),
    "tw": ("big5",),
    "ru": ("windows-1251", "koi8-r"),
    "fr": ("windows-1252",),
    "en": ("windows-1252",),
}
CODECS = {"shift_jis": "cp932", "euc-kr": "cp949"}
WRONG = ("", "utf-8", "gb2312", "shift_jis", "euc-jp", "euc-kr", "iso-8859-1", "undefined", "utf-16", "x-user-defined")


@pytest.mark.parametrize("language", TEXTS)
def test_a_page_comes_out_right_whatever_it_declares(language):
    """correctness 8: Japanese, Korean and English pages with a wrong <meta> were published as Chinese. The bytes of a
    language in each of its encodings, with each declaration."""
    text = TEXTS[language] * 2
    for encoding in (*LEGACY[language], "utf-8"):
        for label in (encoding, *WRONG):
            raw = html(text, label, CODECS.get(encoding, encoding))
            for header in ("", label):
                found = decode_page(raw, header)
                assert text in found.text and found.replaced == 0, (encoding, label, header, found)
    if language == "zh":  # Traditional Chinese in Big5, called GB2312
        assert TEXTS["tw"] * 2 in decode_page(html(TEXTS["tw"] * 2, "gb2312", "big5")).text


MORE = {
    "zh": "本报讯：今天上午，记者从市政府获悉，新的地铁线路将于明年开通。“这是一件大事，”他说。",
    "tw": "臺灣的首都是臺北，人口約兩百五十萬，是全國的政治中心和文化中心。",
    "th": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทยและเป็นเมืองที่มีประชากรมากที่สุด",
    "el": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας και η μεγαλύτερη πόλη της.",
    "he": "ירושלים היא בירת מדינת ישראל והעיר הגדולה ביותר במדינה.",
    "ar": "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها.",
    "ru": "Москва это столица России, город федерального значения, административный центр.",
    "de": "Berlin ist die „Hauptstadt“. Die Straße ist schön, größer und älter – „wirklich“.",
    "fr": "Le cœur de la sœur bat ; une œuvre d’Œdipe — 5 € pour un café très bon.",
}


@pytest.mark.parametrize(
    "language, codec, label",
    [
        ("zh", "gbk", "big5"),  # both fit, and the wrong one is Chinese, too
        *(("tw", "big5", label) for label in ("", "gb2312", "gbk", "utf-8")),
        *(("th", "cp874", label) for label in ("", "gb2312", "euc-kr", "shift_jis", "big5", "iso-8859-1")),
        *(("el", "iso8859-7", label) for label in ("gb2312", "iso-8859-1")),
        *(("he", "cp1255", label) for label in ("gb2312", "iso-8859-1")),
        *(("ar", "cp1256", label) for label in ("shift_jis", "windows-1252")),
        *(("ru", "iso8859-5", label) for label in ("windows-1251", "iso-8859-1")),
        *(("de", "cp1252", label) for label in ("", "utf-8", "gb2312", "iso-8859-5", "windows-874")),
        *(("fr", "cp1252", label) for label in ("", "utf-8", "gb2312", "iso-8859-5", "windows-874")),
    ],
)
def test_other_languages_come_out_right_whatever_they_declare(language, codec, label):
    """correctness 8"""
    text = MORE[language] * 6
    raw = html(text, label, codec)
    for header in ("", label):
        found = decode_page(raw, header)
        assert text in found.text and found.replaced == 0, found


@pytest.mark.parametrize("language", ["zh", "ja", "ko"])
def test_utf_16_without_a_mark_is_found_where_ascii_is_scarce(language):
    """correctness 8: one byte in ten is a NUL, and some are on the other side (the character U+4E00)."""
    text = f"<title>t</title><p>{TEXTS[language] * 10}一一</p>"
    for codec in ("utf-16-le", "utf-16-be"):
        for header in ("", "utf-16", "utf-16le", "gbk"):
            assert decode_page(text.encode(codec), header).text == text, (codec, header)


@pytest.mark.parametrize("label", ["", "iso-8859-1"])
def test_lines_drawn_with_dashes_are_not_japanese(label):
    """correctness 8: a row of em dashes is 覧覧覧 in Shift_JIS."""
    text = f"{TEXTS['en']} {'—' * 60} {PLAIN}"
    assert decode_page(html(text, label, "cp1252")).text == html(text, label).decode()


def test_a_few_letters_are_windows_1252_and_no_rare_character_set():
    """correctness 8: ñ was ņ of ISO-8859-10."""
    assert "La mañana" in decode_page(html("La mañana es buena", "", "cp1252")).text


@pytest.mark.parametrize(
    "head, label",
    [
        (b"<meta charset=shift_jis>", "shift_jis"),
        (b"<META CHARSET = 'SHIFT_JIS' />", "shift_jis"),
        (b'<meta content="text/html; charset=x-sjis" http-equiv=Content-Type>', "shift_jis"),
        (b"<meta http-equiv='content-type' content='text/html;charset=\"ms_kanji\"'>", "shift_jis"),
        (b"<meta name=a content='charset=big5'><meta charset=shift_jis>", "shift_jis"),
        (b"<!-- <meta charset=big5> --><meta charset=shift_jis>", "shift_jis"),
        (b"<link title='<meta charset=big5>'><meta charset=shift_jis>", "shift_jis"),
        (b"<meta charset=undefined><meta charset=shift_jis>", "shift_jis"),
        (b"<metadata charset=big5><meta charset=shift_jis>", "shift_jis"),
        (b"<?xml version='1.0' encoding='shift_jis'?>", "shift_jis"),
        (b"<script>" + b"a<b; " * 600 + b"</script><meta charset=shift_jis>", "shift_jis"),
        (b"<meta charset=utf-16le>", "utf-8"),
        (b"<meta charset=x-user-defined>", "windows-1252"),
        (b"\xef\xbb\xbf<meta charset=shift_jis>", "utf-8"),
    ],
)
def test_the_declaration_of_a_page_is_found_as_browsers_find_it(head, label):
    """correctness 8. The text could be several encodings' (a single word), so that the declaration decides."""
    word = {"shift_jis": "テ", "utf-8": "テ", "windows-1252": "é"}[label]
    raw = head + b"<p>" + word.encode({"shift_jis": "cp932"}.get(label, label)) + b"</p>"
    found = decode_page(raw)
    assert (found.encoding, found.replaced) == (label, 0) and f"<p>{word}</p>" in found.text


def test_a_byte_order_mark_comes_before_the_header_and_the_header_before_the_page():
    """correctness 8"""
    text = html(TEXTS["zh"], "gb2312").decode()
    for codec, mark in (("utf-8-sig", b""), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        assert decode_page(mark + text.encode(codec), "shift_jis").text == text
    for codec in ("utf-16-le", "utf-16-be"):
        assert decode_page(text.encode(codec), codec).text == text
        assert decode_page(text.encode(codec)).text == text
    page = html("テ", "big5", "cp932")
    assert "テ" in decode_page(page, "shift_jis").text and "テ" not in decode_page(page).text


@pytest.mark.parametrize("language, encoding", [(key, name) for key, names in LEGACY.items() for name in names])
@pytest.mark.parametrize("damage", [b"\xff", b"\xff\xff", b"\x81<"])
def test_a_page_with_a_damaged_byte_is_not_another_languages(language, encoding, damage):
    """correctness 8: the declared character set that fits all but a few bytes is followed; before the damage and behind
    the next ASCII character all is right."""
    if encoding in ("windows-1252", "windows-1251", "koi8-r", "iso-2022-jp") or damage == b"\x81<":
        damage = b"\xff" if encoding == "iso-2022-jp" else b"\x98" if encoding == "windows-1251" else damage
    codec = CODECS.get(encoding, encoding)
    first, second = (f"<p>{TEXTS[language]}</p>".encode(codec) for _ in range(2))
    found = decode_page(f'<meta charset="{encoding}">'.encode() + first + damage + b"<br>" + second, "")
    assert found.encoding.replace("gb18030", "gbk") == encoding.replace("gb18030", "gbk")
    assert found.text.count(TEXTS[language]) == 2 and found.replaced <= 2
    if encoding in ("shift_jis", "euc-jp", "gbk", "gb18030", "euc-kr", "big5") and damage == b"\xff":
        assert found.replaced == 1 and found.text.count("\ufffd") == 1


@pytest.mark.parametrize("label", ["gb2312", "windows-1252", "big5", "shift_jis", ""])
@pytest.mark.parametrize("number", [10, 20, 37, 60, 100])
@pytest.mark.parametrize("damaged", ["，", "𠮷"])
def test_a_short_utf8_page_with_a_damaged_byte_is_utf8(label, number, damaged):
    """correctness 8: all bytes of the damaged character count as invalid, and with a wrong declaration a short page
    became another language's."""
    text = ("东部是世界上人口最多的地区之一" * 8)[:number]
    broken = bytearray(damaged.encode())
    broken[0] = 0xFF
    raw = text[:5].encode() + bytes(broken) + text[5:].encode()
    found = decode_page(f'<meta charset="{label}">'.encode() + raw)
    assert found.encoding == "utf-8" and found.replaced == len(broken) and found.text.endswith(text[5:])


def test_two_bytes_that_are_no_character_leave_the_pairs_behind_them():
    """correctness 8: as in browsers, so that a damaged second byte costs one character."""
    raw = bytearray(f'<meta charset="euc-kr">{TEXTS["ko"]}'.encode("cp949"))
    raw[raw.index("태".encode("cp949")) + 1] = 0xFF
    found = decode_page(bytes(raw))
    assert found.text.partition(">")[2] == TEXTS["ko"].replace("태", "\ufffd", 1) and found.replaced == 2


ODD = ["undefined", "idna", "punycode", "rot13", "hex", "zip", "unicode_escape", "utf-7", "utf-32", "none", "", "é"]
ODD += ["utf-8;", "\x00", "x" * 5000, "'", '"', "iso-8859-1'\"", "replacement", "iso-2022-cn", "mbcs", "oem", "utf8mb4"]


@pytest.mark.parametrize("label", ODD)
def test_no_label_ends_the_stage(label, tmp_path):
    """correctness 26: charset=undefined ended the stage on every retry."""
    meta = f'<meta http-equiv="Content-Type" content="text/html; charset={label}">'.encode()
    pages = [
        response(html(TEXTS["zh"], label)),
        response(html(TEXTS["zh"]), f"text/html; charset={label}"),
        response(TEXTS["zh"].encode("gbk"), f"text/plain; charset={label}"),
        response(meta + html(TEXTS["zh"], "", "gbk"), f'text/html; charset="{label}"'),
    ]
    (tmp_path / "a.warc").write_bytes(b"".join(record("response", page) for page in pages))
    found = list(read(Source(path=str(tmp_path / "a.warc")), "s"))
    assert [TEXTS["zh"] in item.fields["text"] for item in found] == [True] * 4


def test_the_charset_of_a_content_type():
    """correctness 8"""
    assert charset_label("text/html; charset=utf-8") == "utf-8"
    assert charset_label('text/html;CHARSET = "Shift_JIS"; x=y') == "Shift_JIS"
    assert charset_label("text/html; charset='big5'") == "big5"
    assert charset_label("text/html; charset=") == charset_label("text/html") == charset_label("") == ""


def test_replaced_bytes_are_counted_and_pages_of_no_character_set_are_bad(tmp_path):
    """correctness 8: a Chinese page with one bad byte is kept; the ledger counts the byte."""
    one, two = TEXTS["zh"].encode("gbk"), TEXTS["zh"].replace("人人", "人们").encode("gbk")
    noise = bytes(range(128, 256)) * 8
    pages = [
        html("", "gb2312").replace(b"<p>", b"<p>" + one[:40] + b"\xff<br>" + one[40:] + two),
        html(TEXTS["ja"] * 3, "utf-8"),
        html("", "utf-8").replace(b"<p>", b"<p>" + TEXTS["ru"].encode() * 3 + noise),
    ]
    data = b"".join(record("response", response(page), f"http://a.org/{at}") for at, page in enumerate(pages))
    (tmp_path / "a.warc").write_bytes(data)
    first, second, third = read(Source(path=str(tmp_path / "a.warc")), "s")
    assert isinstance(first, Record) and first.changed == {"replaced_bytes": 1} and second.changed == {}
    assert re.fullmatch("[^\ufffd]+\ufffd[^\ufffd]+", first.fields["text"])
    assert isinstance(third, Bad) and (third.reason, third.place) == ("in no known character set", "a.warc:3")
    clean = {"sources": {"a": {"path": "a.warc"}}, "holdout": 0, "max_bad": 0.5, "workers": 1}
    clean |= {"language": {"keep": ["zh", "ja"]}, "filters": {"max_repeated_shingles": 1}, "dedup": {"near": None}}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "t", "stages": {"clean": clean}}))
    succeed("clean", tmp_path / "r.yaml", cwd=tmp_path)
    report = json.loads((tmp_path / "runs/t/clean/current/report.json").read_text())
    assert report["sources"]["a"]["bad"] == {"in no known character set": 1}
    assert report["total"]["train_documents"] == 2
    assert report["rules"]["changed"] == {"replaced_bytes": {"documents": 1, "times": 1}}
