"""The page of `alma report`: what it says equals what the run recorded, it loads nothing, and nothing in a run's data
becomes markup."""

import json
import math
import re
import string

import pytest
import reported_run
from html_page import Page

from pipeline.report.compare import page_of_two
from pipeline.report.page import SECTIONS, Options, page_of
from pipeline.report.run_folder import read_run
from pipeline.report.words import WORDS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(reported_run.write(tmp_path_factory.mktemp("report") / "demo"))


@pytest.fixture(scope="module")
def page(run):
    return Page(page_of(run, Options(price=2.0, watts=300.0)))


def test_every_section_is_there_with_the_numbers_of_the_ledger(run, page):
    ids = [attributes.get("id") for tag, attributes in page.tags if tag == "section"]
    assert ids == list(SECTIONS) and page.open == []
    for name, stage in run.stages.items():
        row = page.rows[name]
        assert row[1] == "done" and row[5] == "12 s" and row[6].startswith("2026-05-01 10:00 UTC")
        assert row[4] == stage.metrics.get("summary", {}).get("measure", "")
    assert ["pretrain", "loss", "7", "3.1", ""] in page.all_rows  # before and after
    assert ["ppo", "reward", "0.5", "1.5", "1.25 – 1.75"] in page.all_rows
    assert ["ppo over pretrain", "75.0%", "60.0% – 87.5%", "", "40"] in page.all_rows
    assert ["ppo", "1.5", "1.25"] in page.all_rows
    # 12.5 s of 2 processes are 0.006944 process hours: at 2 an hour, and at 300 W
    assert ["pretrain", "12 s", "2", "0.006944", "1e+15", "1.50 GB", "0.01389", "0.002083 kWh"] in page.all_rows
    lineage = next(row for row in page.all_rows if row[0] == "pretrain" and "tokenizer ← tokenizer" in " ".join(row))
    assert "222222222222" in lineage[3] and "current" in lineage[3]


def test_curves_are_those_of_metrics_jsonl(run, page):
    rows = [row for row in reported_run.pretrain_rows() if "loss" in row]
    loss = page.curve("pretrain-loss", "loss")
    assert loss["x"] == [row["step"] for row in rows]
    assert loss["y"] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    heldout = page.curve("pretrain-loss", "heldout_loss")
    assert heldout["x"] == [0, 300] and heldout["y"][1] == 3.1
    assert page.curve("pretrain-loss", "spike")["x"] == [200]
    assert page.curve("pretrain-loss", "not applied")["x"] == [250]
    planned = page.curve("pretrain-lr", "planned by the recipe")
    assert planned["y"] == pytest.approx(page.curve("pretrain-lr", "lr")["y"], rel=1e-5)
    shapes = page.figures["plot-pretrain-loss"]["layout"]["shapes"]
    assert [shape["x0"] for shape in shapes if shape["type"] == "line"] == [120], "the resume is marked"
    assert "302 lines" in page.text and "1 lines could not be read" in page.text
    assert page.curve("ppo-reward", "reward")["y"] == pytest.approx([step / 10 for step in range(1, 21)])


def test_alarms_and_tasks_with_their_intervals(run, page):
    row = next(cells for cells in page.all_rows if cells[0] == "ppo" and "kl_growth" in cells[1])
    assert row[2:] == [" – 4", "5.7", "2", "7 – 12", "warn"] and "rise of the KL" in row[1]
    shapes = page.figures["plot-ppo-kl"]["layout"]["shapes"]
    assert [shape["x0"] for shape in shapes if shape["type"] == "line"] == [7, 12]
    assert ["assess", "kinds acc, 5 examples", "ppo", "0.25", "0.17 – 0.35", "", "100"] in page.all_rows
    assert ["assess", "refusals.harmful", "ppo", "0.5", "0.3 – 0.7", "", "32"] in page.all_rows


def test_figures_are_what_plotly_takes(page):
    import plotly.graph_objects as graph

    for figure in page.figures.values():
        graph.Figure(figure)  # raises ValueError for a key or a value that plotly does not know


def test_funnel_and_samples(page):
    for name, text in (("read", "200 · 100.0%"), ("rules", "35 · 17.5%"), ("held", "10 · 5.0%")):
        assert text in page.text, name
    assert "short <script>" in page.text and "the first" in page.text and "a.jsonl:3" in page.text
    assert ["few_letters", "filtered", "30"] in page.all_rows


def test_nothing_is_loaded_and_nothing_in_the_data_becomes_markup(page):
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:,"))
    assert [attributes.get("type", "javascript") for attributes, _ in page.scripts] == [
        "application/json",
        "text/plain",
        "javascript",
    ]
    assert page.text.count(reported_run.EVIL) >= 5, "it is shown as text"
    [policy] = [found["content"] for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("style-src")[0]


def numbers(cells: list[str]) -> list[str]:
    return re.findall(r"\d[\d.]*", " ".join(cells))


def test_a_page_in_chinese_has_the_same_numbers(run, page):
    chinese = Page(page_of(run, Options("zh", 2.0, 300.0)))
    assert len(chinese.all_rows) == len(page.all_rows)
    assert "这正常吗？" in chinese.text and "demo 训练报告" in chinese.text
    for name, row in page.rows.items():
        if "." not in name:  # a stage; the reasons of bands are sentences, whose numbers may be in another order
            assert numbers(chinese.rows[name]) == numbers(row)
        else:
            assert numbers(chinese.rows[name][2:4]) == numbers(row[2:4])


def test_both_languages_have_every_text_with_the_same_values():
    def fields(text: str) -> set:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    for key, (english, chinese) in WORDS.items():
        assert fields(english) == fields(chinese), key
        assert key == "verdict" or (english and chinese), key


def test_two_runs(run, tmp_path):
    other = reported_run.write(tmp_path / "other", lr=2e-3)
    (other / "assess" / "current").unlink()
    (other / "assess" / ("5" * 12) / "manifest.json").unlink()
    page = Page(page_of_two(run, read_run(other), Options()))
    assert "optimizer.lr: 0.001 -> 0.002" in page.rows["pretrain"][3]
    assert "same" in page.rows["clean"][3] and page.rows["assess"][1:3] == ["done", ""]
    for name in ("demo", "other"):
        assert len(page.curve("pretrain-loss", f"{name} loss")["x"]) == 300
    assert ["assess", "models.ppo.reward", "1.5", "", ""] in page.all_rows
    assert ["ppo", "reward_after", "1.5", "1.5", "+0"] in page.all_rows


def test_a_long_run_stays_small_and_shows_its_spike(tmp_path):
    root = tmp_path / "long"
    rows = reported_run.pretrain_rows(20_000, spike=15_678)
    config = reported_run.PRETRAIN | {"steps": 20_000}
    files = {"metrics.jsonl": reported_run.lines(rows)}
    reported_run.publish(root, reported_run.manifest("pretrain", "3", config, {}, {}), files)
    html = page_of(read_run(root), Options())
    page = Page(html)
    sizes = {len(text) for attributes, text in page.scripts if attributes.get("id") == "page-data"}
    assert max(sizes) < 400_000 and len(html) < 2_600_000
    loss = page.curve("pretrain-loss", "loss")
    assert len(loss["x"]) <= 800 and 15_678 in loss["x"] and (loss["x"][0], loss["x"][-1]) == (1, 20_000)
    highest = max(row["loss"] for row in rows if "loss" in row)
    assert max(loss["y"]) == pytest.approx(highest, rel=1e-5) and highest > 7.9
    assert page.curve("pretrain-loss", "spike")["x"] == [15_678]


def test_numbers_that_are_none(tmp_path):
    """A run that diverged logs null; its report is made all the same."""
    rows = [{"step": 1, "loss": None, "applied": False, "lr": 1e-3}, {"step": 2, "loss": 2.0, "lr": 1e-3}]
    root = tmp_path / "nan"
    files = {"metrics.jsonl": reported_run.lines(rows) + "null\n[]\n"}
    reported_run.publish(root, reported_run.manifest("sft", "3", {}, {"loss_after": math.nan}, {}), files)
    page = Page(page_of(read_run(root), Options()))
    assert page.curve("sft-loss", "loss")["y"] == [2.0] and "2 lines could not be read" in page.text
    assert json.dumps(page.figures, allow_nan=False)


@pytest.mark.parametrize(
    "text",
    [
        '{"when": "before"}\n{"prompt": "a", "when": "after"}\n',
        '{"when": "before", "prompt": "a"}\n{"prompt": "b"}\n{"when": "later", "prompt": ["c"]}\n',
        '{"sft": "x"}\n{"prompt": 3, "sft": null}\n',
        '[1]\n{"prompt": "a", "wh',
    ],
)
def test_samples_that_are_damaged(tmp_path, text):
    demo = reported_run.write(tmp_path / "demo")
    (demo / "ppo" / "current" / "samples.jsonl").write_text(text)
    Page(page_of(read_run(demo), Options()))
