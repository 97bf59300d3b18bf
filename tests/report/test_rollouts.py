"""Responses token by token, from records that are complete and from damaged ones."""

import json
import math

import pytest
import reported_run
from html_page import Page

from pipeline.report.page import Options, page_of
from pipeline.report.rollouts import rollouts
from pipeline.report.run_folder import read_run


@pytest.fixture
def demo(tmp_path):
    return reported_run.write(tmp_path / "demo")


def file_of(demo):
    return demo / "ppo" / "current" / "logs" / "rollouts.jsonl"


def test_the_first_and_the_last_iteration(demo):
    [found] = rollouts(read_run(demo))
    assert found.stage == "ppo" and found.names == ["reward", "value", "kl", "advantage", "logprob"]
    assert [(row.step, row.stopped) for row in found.responses] == [
        (step, stopped) for step in (1, 20) for stopped in (True, False, True, True)
    ]
    first, last = found.responses[0].tokens, found.responses[4].tokens
    assert [token.numbers["kl"] for token in first] == [0.0, 0.04, -0.01]
    assert [token.shades["kl"] for token in first] == [0.0, 1.0, -0.5]  # square roots of shares of 0.04
    assert last[2].shades["reward"] == 1.0 and first[2].shades["reward"] == round(math.sqrt(0.1 / 2), 3)


def test_numbers_are_on_the_page(demo):
    page = Page(page_of(read_run(demo), Options()))
    assert ["Be", "0", "0.5", "0", "1", "-0.5"] in page.all_rows
    shades = [attributes for tag, attributes in page.tags if tag == "span" and attributes.get("class") == "shade"]
    assert len(shades) == 8 * 3 and "value 0.25" in shades[1]["title"] and "--kl:1.0;" in shades[1]["style"]
    choices = [attributes["value"] for tag, attributes in page.tags if tag == "input"]
    assert choices == ["reward", "value", "kl", "advantage"]


def test_an_algorithm_without_value_and_kl_has_no_columns_for_them(demo):
    rows = [{key: row[key] for key in row.keys() - {"value", "kl"}} for row in reported_run.rollouts()]
    file_of(demo).write_text(reported_run.lines(rows))
    [found] = rollouts(read_run(demo))
    assert found.names == ["reward", "advantage", "logprob"] and found.shaded == ["reward", "advantage"]
    page_of(read_run(demo), Options("zh"))


def test_what_a_tool_said_is_before_the_token_that_follows(demo):
    row = reported_run.rollouts()[0] | {"inserted": [[1, "42 o'clock"]]}
    file_of(demo).write_text(json.dumps(row))
    [found] = rollouts(read_run(demo))
    assert [token.inserted for token in found.responses[0].tokens] == ["", "42 o'clock", ""]
    assert "42 o'clock" in Page(page_of(read_run(demo), Options())).text


DAMAGED = [
    "",
    "{}\n[]\n3\nnull\n",
    '{"step": 1, "tokens": [], "reward": []}\n',
    '{"step": 1, "tokens": [1, 2], "reward": [0, 0]}\n',
    '{"step": "1", "tokens": ["a"]}\n{"step": 2, "tok',
    "\x00\x00\x00",
]


@pytest.mark.parametrize("text", DAMAGED)
def test_lines_without_a_response_are_skipped(demo, text):
    file_of(demo).write_text(text)
    run = read_run(demo)
    assert rollouts(run) == []
    page_of(run, Options())


def test_numbers_that_do_not_fit_their_tokens(demo):
    row = {"step": 3, "tokens": ["a", "b"], "reward": [1], "value": "x", "kl": [None, "y", 3], "score": "high"}
    file_of(demo).write_text(json.dumps(row | {"inserted": [[0], "x", [[], "z"]], "length": None}) + "\n")
    [found] = rollouts(read_run(demo))
    [response] = found.responses
    assert [token.numbers for token in response.tokens] == [
        {"reward": 1, "value": None, "kl": None},
        {"reward": None, "value": None, "kl": None},
    ]
    assert response.score is None and response.length == 2 and not response.stopped
    page_of(read_run(demo), Options())
