"""Block lists: phrases and addresses, included and of the user."""

import pytest
from every_step import everything
from harness import stage, succeed

from pipeline.core.errors import UserError
from pipeline.data.cleaning.blocklist import Block, is_blocked, load_phrases
from pipeline.data.cleaning.phrase_matcher import PhraseMatcher
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
