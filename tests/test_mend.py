"""Repair, masks and block lists: what they change, and above all what they leave alone."""

import json
import random
import string
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard
from harness import files_of, stage, succeed
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.block import Block, Phrases, blocked, phrases
from pipeline.data.mask import KINDS, Mask, masked
from pipeline.data.repair import Repair, repaired, unbroken
from pipeline.data.text import tokens
from pipeline.errors import UserError

ZH = (
    "今天我们来介绍一种新的方法：先把所有的文字读进来，然后一行一行地看，最后再决定要不要留下。这是很多人都在用的办法。"
)
FR = "L'été dernier, à Orléans, la fête a été très réussie ; c’est “la plus belle”, dit-on — voilà."

# ---- repair ----------------------------------------------------------------------------------------------------------


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
        assert unbroken(broken) == ZH


def test_utf8_read_as_gbk_is_mended_where_it_can_be():
    for text in (ZH, ZH[:30], ZH[3:40]):
        raw = text.encode()
        try:
            broken = raw.decode("gb18030")
        except UnicodeDecodeError:
            continue
        assert unbroken(broken) == text


def test_windows_1252_is_mended():
    assert (
        unbroken(FR.encode().decode("cp1252", "replace").replace("\ufffd", "\u009d")).startswith(
            "L'été dernier, à Orléans"
        )
        and unbroken("Itâ€™s") == "It’s"
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
    assert unbroken(text) == text


def test_full_width():
    assert repaired("ＡＢＣ１２３，ｏｋ！", Repair(full_width="letters")) == ("ABC123，ok！", ["full_width"])
    assert repaired("ＡＢＣ１２３，\u3000！", Repair(full_width="all"))[0] == "ABC123, !"
    assert repaired("abc，", Repair(full_width="letters")) == ("abc，", [])


def test_script_needs_its_library():
    pytest.importorskip("opencc")
    assert repaired("漢語和計算機", Repair(script="simplified")) == ("汉语和计算机", ["script"])


# ---- masks -----------------------------------------------------------------------------------------------------------

ALL = Mask(use=list(KINDS))


def identity_number(rng: random.Random) -> str:
    body = f"{rng.choice(['110101', '440305', '310115'])}{rng.randrange(1950, 2010)}{rng.randrange(1, 13):02d}{rng.randrange(1, 29):02d}{rng.randrange(1000):03d}"
    return body + "10X98765432"[sum(int(d) * (2 ** (17 - i) % 11) for i, d in enumerate(body)) % 11]


def card_number(rng: random.Random) -> str:
    body = rng.choice(["4", "51", "37", "62"])
    body += "".join(rng.choices(string.digits, k=15 - len(body)))
    return next(
        body + d
        for d in string.digits
        if sum(sum(divmod(int(c) * (2 - i % 2), 10)) for i, c in enumerate(body + d)) % 10 == 0
    )


def test_planted_data_is_found_in_both_languages():
    rng = random.Random(4)
    for _ in range(100):
        card = card_number(rng)
        planted = {
            "EMAIL": rng.choice(["a.b+c@mail.example.com", "li_wei99@qq.com"]),
            "IP": rng.choice(["8.8.8.8", "93.184.216.34", "2001:4860:4860::8888"]),
            "CARD": rng.choice(
                [
                    card,
                    " ".join(card[i : i + 4] for i in range(0, 16, 4)),
                    "-".join(card[i : i + 4] for i in range(0, 16, 4)),
                ]
            ),
            "ID_ZH": identity_number(rng),
            "MOBILE_ZH": rng.choice(["13800138000", "+86 139-1234-5678".replace("-", " "), "186 1234 5678"]),
            "PHONE": rng.choice(["+44 20 7946 0958", "(212) 555-0123", "010-82345678", "400-123-4567"]),
            "SECRET": rng.choice(
                [
                    "AKIAIOSFODNN7EXAMPLE",
                    "ghp_" + "a1B2" * 9,
                    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
                    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF123456_-x",
                ]
            ),
        }
        for before, after in (("Write to ", " today."), ("请联系", "，谢谢。"), ("电话：", "（张三）"), ("(", ")")):
            for kind, value in planted.items():
                assert masked(before + value + after, ALL) == (f"{before}[{kind}]{after}", {kind.lower(): 1}), (
                    kind,
                    value,
                )


def test_addresses_at_chinese_domains():
    """Mail at internationalised domains (RFC 6531), in running text without spaces, and their ASCII form."""
    for address in (
        "user@例子.中国",
        "user@12306票务.中国",
        "user.name+tag@例子.公司.cn",
        "li-wei@mail.例子.中国",
        "a@例子.com",
        "a@b.中国",
        "a@mail.shop.例子.中国",
        "a@中文网.中文网",
        "admin@xn--fsqu00a.xn--fiqs8s",
        "admin@例子.xn--fiqs8s",
    ):
        for before, after in (
            ("请发邮件到", "联系我们。"),
            ("Write to ", "."),
            ("<", ">"),
            ("邮箱：", "，谢谢"),
            ("", "\n"),
        ):
            if after == "联系我们。" and (address.isascii() or address[-1].isascii() or address == "a@b.中国"):
                before, after = "请发邮件到", "，联系我们。"
            assert masked(before + address + after, Mask(use=["email"])) == (f"{before}[EMAIL]{after}", {"email": 1})
    for text, wanted in (
        ("张三@例子.中国", "[EMAIL]"),
        ("联系人：欧阳小明@例子.公司.cn。", "联系人：[EMAIL]。"),
        (
            "请写信给张三@例子.网络，或 user@qq.com联系",
            "请写[EMAIL]，或 [EMAIL]联系",
        ),  # where a name begins, nothing says
        ("请写信给user@例子.中国.如有疑问.请访问公司.网站", "请写信给[EMAIL].如有疑问.请访问公司.网站"),
        ("请写信给user@例子.com.cn或user@mx.例子.中国", "请写信给[EMAIL]或[EMAIL]"),
    ):
        assert masked(text, Mask(use=["email"]))[0] == wanted


def test_chinese_text_around_an_address_stays():
    """Text stands before and behind an address without a space, and has dots of its own: names of files, sites,
    sentences that end in one."""
    for text in (
        "请发邮件至{}或访问www.example.com了解详情。",
        "{}下载file.zip",
        "客服邮箱{}官网taobao.com客服电话",
        "请发邮件至{}或访问https://www.example.com/关于我们.html了解详情",
        "邮箱{}网址www.例子.中国电话",
        "邮箱{}。网址：例子.中国",
        "{}，{}、{}；{}",
        "（{}）或“{}”，《{}》",
        "投稿请寄{}。来稿必复.谢谢.",
        "联系{}.谢谢",
        "联系{}.在线客服全天服务",
        "邮箱：{}.网站：www.example.com",
        "联系{}.中国区代理.公司地址北京",
        "联系{}.如有疑问.请访问公司.网站",
        "联系{}.如有疑问.www.example.com",
        "QQ邮箱{}转李四收.附件简历.doc",
        "发送到{}并抄送{}即可",
        "张三{}李四{}",
        "{}\n网店.中国\n公司.香港",
        "版本2.0请反馈至{}或加群123456",
        "邮箱：{}/{}",
        "简历.pdf发到{}主题写应聘.公司会回复",
    ):
        for address in ("info@example.com", "li_wei.99@vip.163.com", "a-b@mail.tsinghua.edu.cn", "x@uni.ac.uk"):
            found, counts = masked(text.format(*[address] * 4), Mask(use=["email"]))
            assert found == text.format(*["[EMAIL]"] * 4) and counts == {"email": text.count("{}")}, (text, address)


@pytest.mark.parametrize(
    "text",
    [
        "转发@张三.今天天气不错",
        "谢谢你@张三.在线等",
        "价格100元@北京.网站上",
        "转发@李四.中国队赢了",
        "单价3.5@数量.each",
        "附件report@最终版.docx",
        "@张三：你好。@李四.中国队赢了",
        "所有后缀为@qq.com的邮箱",
        "邮箱以@例子结尾",
        "价格@5.5元",
        "用户@主机",
        "单价3.5@数量.每箱",
        "meet @ 北京.",
        "In 1984 there were 1,234,567 people and 3.14159265358979 of them.",
        "2023-11-02 10:15:30",
        "ISBN 978-7-111-12345-6",
        "version 1.2.3.4",
        "127.0.0.1 and 192.168.1.1",
        "4111 1111 1111 1112",
        "110101199913011234",
        "订单号 20231102123456789",
        "12345678901",
        "user@localhost",
        "@name",
        "sk-short",
        "a::b::c",
        "12:30:45",
        "第 13 页 800 字 1380",
        "1.5.2.1.9",
        "圆周率是3.14159265358979323846",
    ],
)
def test_other_numbers_stay(text):
    assert masked(text, ALL) == (text, {})


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789 .-@:aAx（+86）中\n", max_size=80))
def test_masking_twice_changes_nothing_more(text):
    once, _ = masked(text, ALL)
    assert masked(once, ALL) == (once, {})


def test_a_card_with_numbers_beside_it():
    card = Mask(use=["card"])
    for text in (
        "4539148803436467 12/25",
        "4539 1488 0343 6467 12/25 cvv 123",
        "No 12 4539 1488 0343 6467",
        "卡号4539-1488-0343-6467 123",
        "4111 1111 1111 1111",
    ):
        found, counts = masked(text, card)
        assert counts == {"card": 1} and "6467" not in found and "1111" not in found, found
    for text in ("2012 2013 2014 2015 2016 2017", "4539 1488 0343 6468 12", "0000 0000 0000 0000 11"):
        assert masked(text, card) == (text, {})


def test_only_what_is_asked_for_and_in_the_form_asked_for():
    assert masked("a@b.org 8.8.8.8", Mask(use=["ip"], form="<|{}|>")) == ("a@b.org <|IP|>", {"ip": 1})


# ---- block lists -----------------------------------------------------------------------------------------------------


def test_phrases_match_words_and_characters():
    listed = Phrases(["click here", "casino", "六合彩", "qq群", "work-from home"])
    texts = [
        "CLICK  here! click here",
        "clicking here, casinos",
        "买六合彩加QQ群，六合彩",
        "Work from home at the casino",
        "",
    ]
    assert listed.count(tokens(texts)).tolist() == [1, 0, 2, 2, 0]


def test_lists_that_come_with_the_program_spare_prose():
    spam = "澳门葡京娱乐城官网，注册即送58元彩金，天天返水，加QQ群领取，诚信经营。"
    prose = [
        "赌博在许多国家是违法的，娱乐城关门之后，工人们去了别的城市。" + ZH,
        "The casino on the hill was built in 1923; click here and you see what is left of it.",
        FR,
    ]
    counts = phrases(("spam",)).count(tokens([spam, *prose]))
    assert counts[0] >= 3 and (counts[1:] < Block().min_words).all()


def test_addresses(tmp_path):
    path = tmp_path / "urls.txt"
    path.write_text("# remark\nexample.com\nhttps://www.other.org/ads/\n")
    files = (str(path), "spam")
    bad = [
        "http://example.com/x",
        "https://a.b.EXAMPLE.com:8080",
        "https://other.org/ads/1",
        "http://x.net/free-casino-games",
        "http://user@example.com/",
    ]
    good = ["https://notexample.com/", "https://other.org/news", "https://x.net/casinoroyale1967", "example.org", ""]
    assert [blocked(address, files) for address in bad + good] == [True] * 5 + [False] * 5
    with pytest.raises(UserError, match="does not exist"):
        phrases(("no/such/file",))


# ---- in the stage ----------------------------------------------------------------------------------------------------


def everything(folder: Path, **changes) -> Path:
    """A recipe with every step on, over a few documents for each."""
    rng = random.Random(8)
    signs, words = (
        [c for c in ZH if c not in "，。："],
        "river stone bridge water people town winter market story garden house letter road field".split(),
    )

    def english(number: int = 8) -> str:
        return "\n".join(
            f"{rng.choice(words).title()}"
            f" {' '.join(rng.choice(words) + rng.choice(['', 's', 'ed']) for _ in range(12))}, and the"
            f" {rng.choice(words)} that we have."
            for _ in range(number)
        )

    def chinese(number: int = 8) -> str:
        return "\n".join(
            "".join(rng.sample(signs, 25)) + "，" + "".join(rng.sample(signs, 8)) + "。" for _ in range(number)
        )

    rows = [
        {"text": text, "url": f"https://site{i}.org/{i}"}
        for i, text in enumerate([english() for _ in range(30)] + [chinese() for _ in range(30)])
    ]
    rows[3]["text"] += "\nPlease write to jane.doe@mail.org for the rest of it."
    rows[4]["text"] = "Please enable JavaScript to read it.\n" + rows[4]["text"]
    rows[35]["text"] += "\n请打电话给13800138000，谢谢大家的支持。"
    rows[36]["text"] = rows[36]["text"].encode().decode("latin-1")
    rows[5]["url"], rows[6]["url"] = "http://ads.bad.example/page", "https://x.org/online-casino"
    rows[7]["text"] += "\nThe online casino has free spins and a casino bonus for you."
    rows.append(
        {"text": "L'été dernier, à Orléans, la fête a été très réussie et les enfants ont chanté.\n" * 3, "url": ""}
    )
    rows.append({"text": "手机，电脑，" * 60})
    (folder / "data").mkdir(parents=True)
    (folder / "data/a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    (folder / "bad.txt").write_text("bad.example\n")
    block = {
        "sources": {"a": {"path": "data/a.jsonl"}},
        "holdout": 0.1,
        "unit_bytes": 6_000,
        "workers": 1,
        "dedup": {"near": None},
        "language": {"keep": ["en", "zh"], "min_confidence": 0.1},
        "rules": {"use": ["gopher_repetition", "gopher_quality", "c4", "fineweb"]},
        "repair": {"mojibake": True, "full_width": "letters"},
        "block": {"words": ["spam"], "urls": ["spam", "bad.txt"]},
        "mask": {"use": list(KINDS)},
        **changes,
    }
    (folder / "recipe.yaml").write_text(json.dumps({"name": "t", "stages": {"clean": block}}))
    return folder / "recipe.yaml"


def test_every_step_in_the_stage_killed_and_resumed(tmp_path):
    succeed("clean", everything(tmp_path / "a"), cwd=tmp_path / "a")
    whole = tmp_path / "a/runs/t/clean/current"
    report = json.loads((whole / "report.json").read_text())
    assert report["sources"]["a"]["filtered"] == {
        "blocked_url": 2,
        "blocked_words": 1,
        "language": 1,
        "repeated_ngrams": 1,
    }
    assert report["rules"]["changed"] == {
        "email": {"documents": 1, "times": 1},
        "lines": {"documents": 1, "times": 1},
        "mobile_zh": {"documents": 1, "times": 1},
        "mojibake": {"documents": 1, "times": 1},
    }
    assert report["rules"]["rejected"] == 5 and report["rules"]["languages"]["zh"]["documents"] == 31
    texts = {}
    for split in ("train", "heldout"):
        for path in (whole / split).glob("*.parquet"):
            for row in pyarrow.parquet.read_table(path).to_pylist():
                texts[row["text"]] = row["language"]
    assert len(texts) == 57 and sorted(texts.values()) == ["en"] * 27 + ["zh"] * 30
    assert sum("[EMAIL]" in text for text in texts) == sum("[MOBILE_ZH]" in text for text in texts) == 1 and not any(
        "JavaScript" in text or "Ã" in text for text in texts
    )
    code, text = stage("clean", everything(tmp_path / "b", unit_bytes=3_000), cwd=tmp_path / "b", fault="work:4")
    assert code == -9, text
    succeed("clean", tmp_path / "b/recipe.yaml", cwd=tmp_path / "b")
    assert files_of(whole) == files_of(tmp_path / "b/runs/t/clean/current")


def test_a_list_that_changes_makes_the_stage_stale(tmp_path):
    path = everything(tmp_path / "a")
    succeed("clean", path, cwd=tmp_path / "a")
    before = (tmp_path / "a/runs/t/clean/current").resolve().name
    (tmp_path / "a/bad.txt").write_text("site1.org\nbad.example\n")
    succeed("clean", path, cwd=tmp_path / "a")
    assert (tmp_path / "a/runs/t/clean/current").resolve().name != before
    (tmp_path / "a/bad.txt").unlink()
    code, text = stage("clean", path, cwd=tmp_path / "a")
    assert code == 2 and "block: bad.txt does not exist" in text


@pytest.mark.parametrize("form", ["{kind}", "{", "{0.nothing}", "{}{}"])
def test_a_form_that_cannot_be_written_is_refused(form):
    with pytest.raises(ValueError, match="no other field"):
        Mask(form=form)


def test_what_is_left_out_is_masked_in_the_report_too(tmp_path):
    """Too short, not JSON, without a text: none of them brings an address or a key into a report."""
    key = "AKIA" + "Q3EGRIYWLM7ZBNKD"
    rows = [
        json.dumps({"text": f"Mail jane.doe@mail.org, key {key}."}),
        "{" + f'"text": "jane.doe@mail.org {key}',
        json.dumps({"body": f"jane.doe@mail.org {key}"}),
    ]
    rows += [
        json.dumps(
            {
                "text": (
                    f"The {word} of the house at the river was painted green last year by its owner, who had bought it"
                    " from a miller's widow."
                )
            }
        )
        for word in ("door", "roof")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "r.yaml").write_text(
        "name: r\nstages:\n  clean: {sources: {web: {path: a.jsonl}}, mask: {use: [secret, email]}, filters:"
        " {min_tokens: 20}, max_bad: 0.9, holdout: 0, dedup: {near: ~}}\n"
    )
    code, said = stage("clean", "r.yaml", cwd=tmp_path)
    assert code == 0, said
    folder = tmp_path / "runs/r/clean/current"
    left = (
        zstandard.ZstdDecompressor()
        .stream_reader((folder / "rejected/web.jsonl.zst").read_bytes())
        .read()
        .decode()
        .splitlines()
    )
    assert len(left) == 3 and all("[EMAIL]" in line and "[SECRET]" in line for line in left)
    for text in ((folder / "report.json").read_text(), *left):
        assert key not in text and "jane.doe" not in text
