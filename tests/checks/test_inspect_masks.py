"""`alma inspect masks`: of a stage and of a file, for people and for programs; and that stages refuse the rows that it
refuses."""

import json
import re

import pytest
import tuned
from harness import stage
from paths import ROOT
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.data.chat.template import Chat
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tuned.world(tmp_path_factory.mktemp("masks"))


def inspect(*words) -> str:
    return CliRunner().invoke(app, ["inspect", "masks", *map(str, words)], catch_exceptions=False).output


def test_rows_of_a_stage(world, monkeypatch):
    monkeypatch.chdir(world)
    text = inspect("tiny.yaml", "--rows", "1")
    assert "user │ What is a old red cat?\n" in text and "assistant │ ⟦animal<|im_end|>⟧\n" in text
    assert "nouns: the first 200 records: 200 give 200 rows" in text
    text = inspect("tiny.yaml", "reward", "reward.inputs.model=./base", "--rows", "1")
    assert "⟦⟧: the score is read here" in text and "assistant │ animal⟦<|im_end|>⟧" in text
    assert "chosen" in text and "rejected" in text
    rows = [json.loads(line) for line in inspect("tiny.yaml", "dpo", "dpo.inputs.model=./base", "--json").splitlines()]
    assert [row["row"] for row in rows] == ["chosen", "rejected"] * 2
    chat = Chat(load_tokenizer(world / "base/model"))
    asked = [{"role": "user", "content": "What is a old red cat?"}, {"role": "assistant", "content": "animal"}]
    encoded = chat.encode([asked])[0]
    assert rows[0]["ids"] == encoded.ids and rows[0]["loss"] == list(map(float, encoded.trained))


def test_what_a_stage_would_drop_is_counted(world, monkeypatch):
    monkeypatch.chdir(world)
    text = inspect("tiny.yaml", "sft.sequence_length=19", "--rows", "0")
    numbers = re.search(r"200 records: (\d+) give \1 rows;.*not used: (\d+) x longer than sequence_length", text)
    assert int(numbers[1]) + int(numbers[2]) == 200 and int(numbers[2]) > 20
    text = inspect("tiny.yaml", "sft.sequence_length=19", "sft.too_long=truncate", "--rows", "200")
    tokens = [int(count) for count in re.findall(r": (\d+) tokens, ", text)]
    assert max(tokens) == 19 and len(tokens) > int(numbers[1])


def test_a_file_with_any_tokenizer(world, tmp_path):
    asked = [{"role": "user", "content": "q"}]
    records = {
        "talk": {"messages": [*asked, {"role": "assistant", "content": "a"}]},
        "pair": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "steps": {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
        "prompt": {"prompt": "q"},
    }
    expected = {"talk": "⟦a<|im_end|>⟧", "pair": "⟦b<|im_end|>⟧", "steps": "a⟦⏎⟧b⟦<|im_end|>⟧", "prompt": "user │ q"}
    for name, record in records.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
        text = inspect("--model", world / "base", "--data", tmp_path / f"{name}.jsonl")
        assert expected[name] in text, text
    text = inspect("--model", world / "base", "--data", tmp_path / "talk.jsonl", "--chat-template", "zephyr")
    assert "⟦a<|eos|>⟧" in text, text


@pytest.mark.parametrize(
    "words, message",
    [
        (["tiny.yaml", "--model", "base"], "give a recipe, or --model and --data; the recipe says"),
        (["--model", "base"], "give a recipe, or --model and --data"),
        (["--model", "runs", "--data", "rows.jsonl"], "contains no tokenizer.json"),
        (["--model", "base", "--data", "rows.jsonl"], "no conversation among its fields"),
        (["tiny.yaml", "--source", "verbs"], "there is no such source; expected one of nouns"),
        (
            ["tiny.yaml", "pretrain"],
            "has no stage of kind sft or reward or prm or dpo or kto or ppo or grpo called 'pretrain'",
        ),
        ([ROOT / "recipes/quickstart.yaml"], "stage sft: the tokenizer of its model is not there yet; run the stage"),
        (["tiny.yaml", "sft.sequence_length=8"], "none of its first records can be used: 200 x longer than"),
    ],
)
def test_mistakes_are_sentences(world, monkeypatch, words, message):
    from pipeline.core.errors import UserError

    monkeypatch.chdir(world)
    with pytest.raises(UserError, match=message):
        inspect(*words)


TWICE = (
    "{{ bos_token + bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] +"
    " '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_stage_refuses_a_template_whose_masks_are_wrong(tmp_path):
    folder = tuned.world(tmp_path)
    (folder / "twice.jinja").write_text(TWICE)
    code, text = stage("sft", "tiny.yaml", "sft.chat_template=twice.jinja", cwd=folder)
    assert code == 2 and "Traceback" not in text, text
    assert "cannot be trained with: the chat template writes the beginning of text twice" in text


def test_a_record_without_a_prompt_is_rejected(tmp_path):
    """All of its tokens would carry loss, with a template that writes nothing in front of an answer."""
    tokenizer = load_tokenizer(tuned.base(tmp_path) / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    chat = Chat(tokenizer)
    answer = {"role": "assistant", "content": "a"}
    alone, asked = chat.rows([[answer], [{"role": "user", "content": "q"}, answer]])
    assert alone == "all of its tokens carry loss: there is no prompt that it answers"
    assert asked[0].trained[0] is False
