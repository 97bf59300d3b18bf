"""Clean: what it keeps and why, duplicates against a brute-force oracle, and equal bytes whatever the workers, the
cuts and the kills."""

import collections
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from cleaned import ledger, plain_tokens, published
from harness import files_of, stage, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from pipeline.core import artifact
from pipeline.data.cleaning import steps
from pipeline.data.cleaning.filters import Filters, garbled
from pipeline.data.cleaning.text_arrays import LOOSE, SUSPECT, code_points, looks, normalise, shingles, tokens
from pipeline.data.cleaning.work_units import cut
from pipeline.data.dedup.external_sort import components
from pipeline.data.dedup.minhash import near_duplicates
from pipeline.data.sources.sources import Source
from pipeline.data.tokens.documents import documents

EN = (
    "the of river water king stone light under over winter summer bread house market table letter number people morning"
    " evening garden".split()
)
HAN = "天地人山水火木金土日月星风雨雪春夏秋冬东西南北上下左右大小多少高低远近红黄蓝白黑书画琴棋诗酒花草鱼鸟虫马牛羊"
UNITS: list = []
LONG = [chr(0x4E00 + i) for i in range(2000)]


def english(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(EN) + str(rng.randrange(60)).replace("0", "") for _ in range(words)]


def chinese(rng: random.Random, characters: int) -> list[str]:
    return [rng.choice(LONG) for _ in range(characters)]


def corpus(folder: Path) -> dict:
    """Two sources, English and Chinese, with every kind of thing that must be left out; returns what was planted."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    en = [" ".join(english(rng, rng.randrange(40, 160))) + "." for _ in range(400)]
    zh = ["".join(chinese(rng, rng.randrange(60, 300))) + "。" for _ in range(300)]
    near = en[5].split()
    near[20] = "changed"
    rows = [{"text": text, "lang": "en"} for text in en]
    # exact twice (one once normalised), near once
    rows += [{"text": en[3]}, {"text": f"  {en[4]} \r\n"}, {"text": " ".join(near)}]
    rows += [
        {"text": "too short"},
        {"text": "1 + 2 = 3; " * 40},
        {"text": "Ã©tÃ© â€™ " + en[9] + "â€œ" * 30},
        {"text": "\n".join(["the same line again and again"] * 9)},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[100:100] = ["{broken", '{"text": "\\ud800 half a pair"}', '{"body": "no text"}', '{"text": null}']
    rng.shuffle(lines)
    (folder / "en.jsonl").write_text("\n".join(lines), encoding="utf-8")
    packed = gzip.compress(
        "".join(json.dumps({"t": text, "n": i}) + "\n" for i, text in enumerate([*zh, zh[0], zh[1]])).encode()
    )
    (folder / "zh.jsonl.gz").write_bytes(packed[:-4])
    return {
        "read": 400 + 3 + 4 + 4 + 302 + 1,
        "bad": {"malformed JSON": 1, "lone surrogate": 1, "missing field": 2},
        "bad_zh": {"truncated .gz data": 1},
        "filtered": {"too_short": 1, "few_letters": 1, "garbled": 1, "repeated_lines": 1},
        "exact": 4,
        "near": 1,
    }


def recipe(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    block = {
        "sources": {"en": {"path": "data/en.jsonl"}, "zh": {"path": "data/zh.jsonl.gz", "text": "{t}"}},
        "holdout": 0.1,
        "unit_bytes": 20_000,
        "workers": 1,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"name": "t", "seed": 3, "stages": {"clean": block}}))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory) -> tuple[Path, dict]:
    """One uninterrupted run with one worker."""
    folder = tmp_path_factory.mktemp("clean")
    planted = corpus(folder / "data")
    succeed("clean", recipe(folder), cwd=folder)
    for name, keys in (("en", {"path": f"{folder}/data/en.jsonl"}), ("zh", {"path": f"{folder}/data/zh.jsonl.gz"})):
        UNITS.extend(cut(Source(**keys), name, 20_000))
    return folder, planted


def texts_of(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    output = artifact.current(folder / "runs/t/clean")
    return {split: list(documents(output, split)) for split in ("train", "heldout")}


# ---- the account -----------------------------------------------------------------------------------------------------


def test_every_record_is_accounted_for(cleaned):
    folder, planted = cleaned
    report = json.loads((published(folder) / "report.json").read_text())
    total, en, zh = report["total"], report["sources"]["en"], report["sources"]["zh"]
    assert en["bad"] == planted["bad"] and zh["bad"] == planted["bad_zh"] and en["filtered"] == planted["filtered"]
    assert (total["read"], total["duplicates_exact"], total["duplicates_near"]) == (
        planted["read"],
        planted["exact"],
        planted["near"],
    )
    split = texts_of(folder)
    kept = sum(map(len, split.values()))
    rejected = ledger(folder, "en") + ledger(folder, "zh")
    assert (
        total["documents_out"] == kept == planted["read"] - len(rejected)
        and len(split["heldout"]) == total["heldout_documents"] > 20
    )
    assert total["bytes_out"] == sum(len(text.encode()) for part in split.values() for text, _, _ in part)
    for name, counts in (("en", en), ("zh", zh)):
        found = collections.Counter((entry["status"], entry["reason"]) for entry in ledger(folder, name))
        assert found == {
            (status, reason): number
            for status in ("bad", "filtered", "duplicates")
            for reason, number in counts[status].items()
        }
    assert (
        total["read"]
        == kept
        + total["bad_records"]
        + total["filtered_documents"]
        + total["duplicates_exact"]
        + total["duplicates_near"]
    )
    broken = next(entry for entry in rejected if entry["reason"] == "malformed JSON")
    assert (
        broken["excerpt"] == "{broken"
        and (folder / "data/en.jsonl").read_text().splitlines()[int(broken["place"].removeprefix("en.jsonl:")) - 1]
        == "{broken"
    )
    ids = {id for part in split.values() for _, _, id in part}
    assert all(entry["of"] in ids for entry in rejected if entry["status"] == "duplicates")
    metrics = artifact.current(folder / "runs/t/clean").metrics
    assert (
        metrics["by_source"] == report["sources"]
        and set(metrics["summary"]) == {"input", "output", "measure"}
        and metrics["heldout_bytes"] == total["heldout_bytes"]
    )


def test_order_is_that_of_the_sources_and_the_split_is_by_document(cleaned):
    folder, _ = cleaned
    split = texts_of(folder)
    wanted = [
        normalise(row["text"])
        for row in map(_row, (folder / "data/en.jsonl").read_text().splitlines())
        if row and isinstance(row.get("text"), str)
    ]
    position = {text: i for i, text in reversed(list(enumerate(wanted)))}
    for part in split.values():
        places = [position[text] for text, source, _ in part if source == "en"]
        assert [source for _, source, _ in part] == sorted(source for _, source, _ in part)
        assert len(places) == len(set(places))
    assert not {text for text, _, _ in split["train"]} & {text for text, _, _ in split["heldout"]}


def _row(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def test_the_split_does_not_move_when_a_source_is_added(cleaned, tmp_path):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    succeed("clean", recipe(tmp_path, sources={"en": {"path": "data/en.jsonl"}}), cwd=tmp_path)
    alone, together = texts_of(tmp_path), texts_of(folder)
    for part in ("train", "heldout"):
        assert [row for row in together[part] if row[1] == "en"] == alone[part]


# ---- equal bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, unit", [(2, 10_000), (1, 4 << 20)])
def test_workers_and_cuts_change_nothing(cleaned, tmp_path, workers, unit):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    succeed("clean", recipe(tmp_path, workers=workers, unit_bytes=unit), cwd=tmp_path)
    assert files_of(published(tmp_path)) == files_of(published(folder))


@pytest.mark.parametrize("fault", ["work:3", "save:5", "save:last", "publish:1", "publish:2"])
def test_killed_and_resumed_is_equal(cleaned, tmp_path, fault):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    path = recipe(tmp_path)
    if fault == "save:last":  # the held-out shard: every unit and the other shard are done
        fault = f"save:{len(UNITS) + 2}"
    code, text = stage("clean", path, cwd=tmp_path, fault=fault)
    assert code == -signal.SIGKILL, text
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("runs/t/clean/*/work/*/*/*.parquet")}
    succeed("clean", path, cwd=tmp_path)
    assert files_of(published(tmp_path)) == files_of(published(folder))
    assert fault != "work:3" or len(before) == 3


def test_killed_at_any_moment_with_two_workers_is_equal(cleaned, tmp_path):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    path = recipe(tmp_path, workers=2, unit_bytes=10_000)
    rng = random.Random(os.getpid())  # another moment in each run of the suite
    for _ in range(2):
        code, _ = stage("clean", path, cwd=tmp_path, kill_after=rng.uniform(0.1, 3))
        if code == 0:
            break
    succeed("clean", path, cwd=tmp_path)
    assert files_of(published(tmp_path)) == files_of(published(folder))


def test_run_as_a_script_with_workers_that_end_with_it(cleaned, tmp_path):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    script = ROOT / "pipeline/clean.py"
    command = [sys.executable, str(script), str(recipe(tmp_path, workers=2, unit_bytes=10_000))]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while (
        not list(tmp_path.glob("runs/t/clean/*/work/*/*/*.parquet")) and time.time() < deadline and child.poll() is None
    ):
        time.sleep(0.01)
    workers = _children(child.pid)
    child.kill()
    child.wait()
    assert workers
    while any(_alive(pid) for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if _alive(pid)]
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0
    assert files_of(published(tmp_path)) == files_of(published(folder))


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("limit", [57])
def test_limit_takes_the_first_records_whatever_the_cuts(cleaned, tmp_path, limit):
    folder, _ = cleaned
    kept = []
    for name, unit in (("a", 2_000), ("b", 4 << 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(folder / "data")
        sources = {"zh": {"path": "data/zh.jsonl.gz", "text": "t", "limit": limit}}
        succeed("clean", recipe(tmp_path / name, sources=sources, unit_bytes=unit, holdout=0), cwd=tmp_path / name)
        kept.append(files_of(published(tmp_path / name)))
    assert kept[0] == kept[1]
    assert json.loads(kept[0]["report.json"])["total"]["documents_in"] == limit


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sources": {}}, "sources"),
        ({"sources": {"a": {"path": "nosuch.jsonl"}}}, "sources.a: nosuch.jsonl does not exist"),
        ({"sources": {"a": {"path": "nosuch/*.jsonl"}}}, "sources.a: no file matches nosuch/*.jsonl"),
        ({"sources": {"a": {"path": "empty.jsonl"}}}, "empty.jsonl is empty"),
        ({"sources": {"a": {"path": "blank.jsonl"}}}, "sources.a: has no record"),
        (
            {"sources": {"a": {"path": "cut.json"}}},
            "sources.a: none of its 1 record is good; the first: cut.json:1: malformed JSON",
        ),
        (
            {"sources": {"a": {"path": "cut.jsonl.gz"}}},
            "none of its 1 record is good; the first: cut.jsonl.gz:1: truncated .gz data",
        ),
        ({"sources": {"a": {"path": "data/en.jsonl", "text": "body.x"}}}, "no field 'body.x'"),
        (
            {"sources": {"a": {"path": "data/en.jsonl", "where": {"lang": "xx"}}}},
            "has no record that `where` and `part` select",
        ),
        ({"sources": {"a": {"path": "data/en.jsonl", "pth": "x"}}}, "path"),
        (
            {"sources": {"a": {"path": "data/en.jsonl", "package": "x==1", "member": "y"}}},
            "exactly one of path, package and dataset",
        ),
        ({"sources": {"a": {"path": "gbk.txt"}}}, "gbk.txt: invalid UTF-8"),
        ({"sources": {"a": {"path": "gbk.txt"}}}, "if the text is not UTF-8, set encoding, such as encoding: gb18030"),
        (
            {"sources": {"a": {"path": "gbk.txt", "encoding": "ascii"}}},
            "the source says encoding: ascii, but its files",
        ),
        (
            {"sources": {"a": {"path": "gbk.txt", "encoding": "gb1803"}}},
            "'gb1803' is not an encoding that Python knows",
        ),
        ({"language": {"keep": ["en", "cn"]}}, "'cn' is no language that is detected"),
        ({"quality": {"min_score": 0.9}}, "min_score without a classifier does nothing"),
        ({"perplexity": {"max_en": 900}}, "max_en without a language model does nothing"),
        (
            {"max_bad": 0.001},
            "sources.en: 4 of 411 records are bad (1.0%, most often: missing field), more than max_bad 0.001",
        ),
        ({"filters": {"min_tokens": 9999}}, "sources.en: nothing is left of its 411 records (most often: too_short)"),
        ({"holdout": 0.9999}, "no document is left for train"),
        ({"holdout": 0.0001}, "no document is left for heldout"),
    ],
)
def test_a_mistake_is_one_sentence(cleaned, tmp_path, change, message):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "gbk.txt").write_bytes("今天我们来介绍一种新的方法".encode("gbk"))
    (tmp_path / "cut.json").write_text('[{"text": "a"')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:20])
    code, text = stage("clean", recipe(tmp_path, **change), cwd=tmp_path)
    sentences = [
        line
        for line in text.strip().splitlines()
        if not line.startswith("WARNING sources.zh: 1 file ends early (truncated .gz data)")
    ]
    assert code == 2 and len(sentences) == 1 and message in sentences[0] and sentences[0].startswith("error: "), text


def test_an_address_that_no_record_has_is_said(cleaned, tmp_path):
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    text = succeed("clean", recipe(tmp_path, dedup={"url": "adress"}), cwd=tmp_path)
    assert "WARNING dedup.url: 'adress' is in the first record of no source" in str(text)


def test_max_bad_can_be_raised_afterwards(cleaned, tmp_path):
    """It is no part of the result, so the work done so far is gone on with."""
    folder, _ = cleaned
    (tmp_path / "data").symlink_to(folder / "data")
    path = recipe(tmp_path)
    assert stage("clean", path, "clean.max_bad=0", cwd=tmp_path)[0] == 2
    succeed("clean", path, cwd=tmp_path)
    assert files_of(published(tmp_path)) == files_of(published(folder))


# ---- text ------------------------------------------------------------------------------------------------------------


@given(
    st.text(
        alphabet=st.one_of(
            st.characters(exclude_categories=["Cs"]), st.sampled_from("\r\n\t \u00a0\u3000\x00\x85\u2028e\u0301\ufeff")
        )
    )
)
def test_normal_form(text):
    once = normalise(text)
    assert normalise(once) == once and unicodedata.is_normalized("NFC", once)
    assert not re.search(r"[\r\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\u2028\u2029]|\n{3}|[ \t]\n", once)
    # what stood apart may combine when these are gone
    if "\ufeff" not in text and not any(unicodedata.category(c) == "Cc" for c in text):
        assert [c for c in once if c.isalnum()] == [c for c in unicodedata.normalize("NFC", text) if c.isalnum()]


def test_normalise_keeps_what_carries_meaning():
    assert normalise("\ufeffＡＢ，１\r\nx²\x00 \t\n\n\n\n家\u200d\n") == "ＡＢ，１\nx²\n\n家\u200d"
    assert normalise("e\u0301") == "é"


ANY = st.text(
    alphabet=st.one_of(
        st.sampled_from("aAéß 9.,\n中文字かな한글𠀀"), st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    )
)


@settings(max_examples=200, deadline=None)  # the first call builds tables
@given(st.lists(ANY, min_size=1, max_size=5))
def test_hashed_tokens_are_the_plain_tokens(texts):
    hashed, known = tokens(texts), {}
    for ours, again in zip(vars(hashed).values(), vars(tokens(texts, code_points(texts))).values(), strict=True):
        assert (ours == again).all()
    for i, text in enumerate(texts):
        expected = plain_tokens(text)
        found = hashed.hashes[hashed.starts[i] : hashed.starts[i + 1]].tolist()
        assert len(found) == len(expected), (text, expected)
        for token, value in zip(expected, found, strict=True):
            assert known.setdefault(token, value) == value
    assert len(set(known.values())) == len(known)


def plain_shingles(text: str) -> set:
    words = plain_tokens(text)
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def test_hashed_shingles_are_the_plain_shingles():
    rng = random.Random(1)
    texts = ["", "one", "中文"]
    for _ in range(60):
        texts.append(
            " ".join(rng.choices(EN, k=rng.randrange(60))) + "".join(rng.choices(HAN[:6], k=rng.randrange(30)))
        )
    hashes, starts = shingles(tokens(texts))
    for i, text in enumerate(texts):
        assert len(set(hashes[starts[i] : starts[i + 1]].tolist())) == len(plain_shingles(text))
    assert len(set(hashes.tolist())) == len(set().union(*map(plain_shingles, texts)))


def judge(raw: list[str], **bounds) -> list[str | None]:
    rows = [({"status": "ok"}, text) for text in raw]
    steps.judge(rows, steps.Steps(filters=Filters(**bounds)))
    return [row.get("reason") for row, _ in rows]


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
        garbled("锟斤拷" * 3) == 1
        and garbled("It\u00e2\u20ac\u2122s") > 0
        and garbled(english_text) == garbled(chinese_text) == garbled(french) == 0
    )


# ---- duplicates ------------------------------------------------------------------------------------------------------


def jaccard(a: str, b: str) -> float:
    a, b = plain_shingles(a), plain_shingles(b)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_near_duplicates_against_brute_force(language):
    """Planted edits of every size. Recall >= 0.95 at Jaccard >= 0.85, and nothing below 0.4 merged; the oracle is
    exact Jaccard over plain shingles."""
    rng = random.Random(11)
    make, join = (english, " ".join) if language == "en" else (chinese, "".join)
    texts, pairs = [], []
    for _ in range(400):
        base = make(rng, rng.randrange(80, 400))
        edited = list(base)
        for _ in range(rng.randrange(1, max(2, len(base) // 16))):
            edited[rng.randrange(len(edited))] = make(rng, 1)[0]
        if rng.random() < 0.3:
            edited = edited[: int(len(edited) * rng.uniform(0.4, 1))]
        pairs.append((len(texts), len(texts) + 1))
        texts += [join(base), join(edited)]
    labels = near_duplicates(texts)
    found = {pair: labels[pair[0]] == labels[pair[1]] for pair in pairs}
    exact = {pair: jaccard(texts[pair[0]], texts[pair[1]]) for pair in pairs}
    alike = [found[pair] for pair in pairs if exact[pair] >= 0.85]
    apart = [found[pair] for pair in pairs if exact[pair] < 0.4]
    assert len(alike) >= 40 and len(apart) >= 20, (len(alike), len(apart))
    assert np.mean(alike) >= 0.95 and not any(apart)
    for cluster in {tuple(np.flatnonzero(labels == label)) for label in set(labels.tolist())}:
        assert len(cluster) == 1 or cluster in found  # unrelated texts are never merged


@pytest.mark.parametrize("size, similarity", [(20, 0.6), (300, 0.4), (300, 0.7), (300, 0.95), (3000, 0.7)])
def test_signatures_estimate_as_theory_says(size, similarity):
    """Mean within four standard errors, deviation within a tenth of sqrt(s (1 - s) / 112), over 1,000 pairs of
    random sets: the functions are as good as independent random permutations."""
    from pipeline.data.dedup.minhash import signatures

    number, common = 1000, round(size * 2 * similarity / (1 + similarity))
    true = common / (2 * size - common)
    elements = np.random.default_rng(size).integers(0, 2**64, (number, 2 * size - common), dtype=np.uint64)
    a, b = elements[:, :size], np.concatenate((elements[:, :common], elements[:, size:]), axis=1)
    starts = np.arange(number + 1) * size
    found = (signatures(a.ravel(), starts) == signatures(b.ravel(), starts)).mean(1)
    deviation = np.sqrt(true * (1 - true) / 112)
    assert abs(found.mean() - true) < 4 * deviation / np.sqrt(number) and abs(found.std() / deviation - 1) < 0.1


@given(st.lists(st.text("abcXé漢σΣ \n0", max_size=80), min_size=1, max_size=5))
def test_a_token_has_one_hash_whatever_stands_beside_it(texts):
    """Also in a batch with a character beyond the first plane, which is looked at in another width, and with runs of
    more than 32 characters; different tokens have different ones."""
    together, wide = tokens(texts), tokens([*texts, "\U0001d49c" + "b" * 40])
    assert np.array_equal(together.hashes, wide.hashes[: len(together.hashes)])
    known = [token for text in texts for token in plain_tokens(text)]
    assert (
        len(set(together.hashes.tolist()))
        == len(set(known))
        == len(set(zip(known, together.hashes.tolist(), strict=True)))
    )


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(60)))
def test_clusters_do_not_depend_on_the_order(order):
    rng = random.Random(5)
    texts = []
    for _ in range(20):
        base = english(rng, 60)
        texts += [" ".join(base), " ".join([*base[:-1], "end"]), " ".join([*base[:-9], *english(rng, 9)])]
    groups = _groups(near_duplicates(texts), range(60))
    assert _groups(near_duplicates([texts[i] for i in order]), order) == groups


def _groups(labels: np.ndarray, names) -> set:
    found = collections.defaultdict(set)
    for name, label in zip(names, labels.tolist(), strict=True):
        found[label].add(name)
    return set(map(frozenset, found.values()))


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60))
def test_components_against_a_search(edges):
    labels = components(30, np.array([a for a, _ in edges], np.int64), np.array([b for _, b in edges], np.int64))
    near = collections.defaultdict(set)
    for a, b in edges:
        near[a].add(b)
        near[b].add(a)
    for node in range(30):
        seen, todo = {node}, [node]
        while todo:
            for other in near[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        assert labels[node] == min(seen)


ODD = [
    "a",
    "é",
    "e\u0301",
    " \n",
    "\n\n\n",
    "\r\n",
    "\x00",
    "\u3000\n",
    "Ã©",
    "â€™",
    "锟斤拷",
    "中",
    "\u1161",
    "\uac00\u11a8",
    "𠀀",
    "\ufffd",
    "\u00a0\n",
    "\u212b",
    "\t\n",
    " ",
    "\n",
]


@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=6).map("".join),
        min_size=1,
        max_size=4,
    )
)
def test_a_look_at_a_batch_misses_nothing(texts):
    """Texts that a look finds clean are not searched one by one: their normal form and their share of garbage must
    be the same."""
    for text, look in zip(texts, looks(texts, code_points(texts)), strict=True):
        assert normalise(text, look) == normalise(text)
        assert look & SUSPECT or garbled(text) == 0


def test_a_look_misses_no_character():
    """Tables are made from a third of the characters: of the others, none may have what a look is for."""
    every = [f"a{chr(point)}a" for point in range(1, 0x10000) if not 0xD800 <= point < 0xE000]
    for text, look in zip(every, looks(every, code_points(every)), strict=True):
        assert normalise(text, look) == normalise(text)
        assert look & SUSPECT or garbled(text) == 0
        assert look & LOOSE or not unicodedata.combining(text[1])
