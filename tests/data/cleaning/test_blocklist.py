"""Block lists: phrases and addresses, included and of the user."""

import json
import random
from pathlib import Path

import pytest
from harness import stage, succeed

from pipeline.core.errors import UserError
from pipeline.data.cleaning.blocklist import Block, is_blocked, load_phrases
from pipeline.data.cleaning.phrase_matcher import PhraseMatcher
from pipeline.data.cleaning.pii import KINDS
from pipeline.data.cleaning.token_hashes import tokens

ZH = (
    "今天我们来介绍一种新的方法：先把所有的文字读进来，然后一行一行地看，最后再决定要不要留下。这是很多人都在用的办法。"
)
FR = "L'été dernier, à Orléans, la fête a été très réussie ; c’est “la plus belle”, dit-on — voilà."


def test_phrases_match_words_and_characters():
    listed = PhraseMatcher(["click here", "casino", "六合彩", "qq群", "work-from home"])
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
    counts = load_phrases(("spam",)).count(tokens([spam, *prose]))
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
    assert [is_blocked(address, files) for address in bad + good] == [True] * 5 + [False] * 5
    with pytest.raises(UserError, match="does not exist"):
        load_phrases(("no/such/file",))


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


def test_a_list_that_changes_makes_the_stage_stale(tmp_path):
    path = everything(tmp_path / "a")
    succeed("clean", path, cwd=tmp_path / "a")
    before = (tmp_path / "a/runs/t/clean/current").resolve().name
    (tmp_path / "a/bad.txt").write_text("site1.org\nbad.example\n")
    succeed("clean", path, cwd=tmp_path / "a")
    assert (tmp_path / "a/runs/t/clean/current").resolve().name != before
    (tmp_path / "a/bad.txt").unlink()
    code, text = stage("clean", path, cwd=tmp_path / "a")  # the published output counts as made from it (decision 83)
    assert code == 0 and "not on this machine: block" in text
    code, text = stage("clean", path, "clean.holdout=0.3", cwd=tmp_path / "a")
    assert code == 2 and "block: bad.txt does not exist" in text
