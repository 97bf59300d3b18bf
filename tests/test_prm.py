"""Process reward models: what they learn, where the scores of steps are read, mistakes, and that a killed run ends as if
it had not been."""

import json
import random
import shutil

import numpy as np
import published_templates as published
import pytest
import torch
import tuned
from harness import files_of, stage, succeed
from transformers import AutoModelForTokenClassification, AutoTokenizer

from pipeline.core.config import PlannedInput
from pipeline.core.errors import UserError
from pipeline.core.intervals import wilson
from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat
from pipeline.models import build
from pipeline.prm import Config, accuracies, headline

STAGE = f"""
  prm:
    {{{tuned.COMMON}, steps: 30, optimizer: {{lr: 3e-3}}, sources: {{nouns: {{path: steps.jsonl}}}}}}
"""


def world(folder) -> None:
    tuned.copy_until("reward", folder)
    lines = [json.dumps(row, ensure_ascii=False) for row in tuned.stepped_rows()]
    (folder / "steps.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tiny.yaml").write_text(tuned.RECIPE + STAGE, encoding="utf-8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The world after an uninterrupted run."""
    folder = tmp_path_factory.mktemp("prm")
    world(folder)
    return folder, succeed("prm", "tiny.yaml", cwd=folder)


def test_what_is_learned(plain):
    folder, text = plain
    found = tuned.metrics(folder, "prm")
    low, high = found["heldout_accuracy_interval"]
    assert found["heldout_majority"] < low < found["heldout_accuracy_after"] <= high <= 1
    assert found["heldout_chain_accuracy_after"] > found["heldout_chain_accuracy_before"]
    assert found["heldout_loss_change_interval"][1] < 0 and found["warnings"] == []
    assert "held-out steps judged right" in text and "first wrong step found" in text
    report = json.loads((folder / "runs/tiny/prm/current/report.json").read_text())
    assert report["steps"]["heldout"] == found["heldout_judged_steps"]


def test_the_published_model_scores_steps(plain):
    """By transformers alone, and as the stage measured it: the share of held-out steps judged right."""
    folder = plain[0] / "runs/tiny/prm/current/model"
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "wrong", 1: "right"} and model.config.alma_step_separator == "\n"
    chat = Chat(AutoTokenizer.from_pretrained(folder))
    right = []
    for row in tuned.stepped_rows()[:80]:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": "\n".join(row["completions"])},
        ]
        pieces = [f"{step}\n" for step in row["completions"][:-1]] + row["completions"][-1:]
        (encoded,) = chat.steps([(Dialogue(messages), pieces)])
        with torch.no_grad():
            scores = model(torch.tensor([encoded.ids])).logits[0, list(encoded.ends)].softmax(-1)[:, 1]
        assert len(scores) == len(row["labels"])
        right += ((scores > 0.5) == torch.tensor(row["labels"])).tolist()
    assert np.mean(right) > 0.7, np.mean(right)


def test_the_rate_counts_judged_steps(plain, tmp_path):
    """Steps per second times seconds, against answers of three steps each."""
    shutil.copytree(plain[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    three = [json.dumps(row) for row in tuned.stepped_rows() if len(row["labels"]) == 3]
    (tmp_path / "three.jsonl").write_text("\n".join(three) + "\n")
    words = ["prm.sources.nouns.path=three.jsonl", "prm.steps=3"]
    succeed("prm", "tiny.yaml", *words, cwd=tmp_path)
    counts = [line["steps_per_second"] * line["seconds/step"] for line in tuned.lines(tmp_path, "prm") if "lr" in line]
    assert counts == pytest.approx([8 * 3] * 3, rel=0.02)
    found = tuned.metrics(tmp_path, "prm")
    assert found["steps_per_second"] > 0 and "answers_per_second" not in found


@pytest.mark.slow
def test_killed_and_resumed(plain, tmp_path):
    world(tmp_path)
    for fault in ("save:1", "work:6", "save:1", "publish:1"):
        code, text = stage("prm", "tiny.yaml", cwd=tmp_path, fault=fault)
        assert code == -9, f"did not reach {fault}: {text}"
    stage("prm", "tiny.yaml", cwd=tmp_path, kill_after=random.uniform(0.2, 2.5))
    succeed("prm", "tiny.yaml", cwd=tmp_path)
    expected, found = (files_of(where / "runs/tiny/prm/current") for where in (plain[0], tmp_path))
    assert expected == found


@pytest.mark.slow
def test_an_adapter_killed_twice_and_resumed(tmp_path):
    found = []
    words = ["prm.lora={rank: 4}", "prm.steps=6", "prm.optimizer.lr=1e-2"]
    for name, faults in (("alone", []), ("killed", ["work:3", "save:1"])):
        folder = tmp_path / name
        folder.mkdir()
        world(folder)
        for fault in faults:
            code, text = stage("prm", "tiny.yaml", *words, cwd=folder, fault=fault)
            assert code == -9, f"did not reach {fault}: {text}"
        succeed("prm", "tiny.yaml", *words, cwd=folder)
        found.append(files_of(folder / "runs/tiny/prm/current"))
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_adapter(plain, tmp_path):
    """Merged and published for peft: the same scores."""
    peft = pytest.importorskip("peft")
    world(tmp_path)
    words = ["prm.lora={rank: 8}", "prm.steps=6", "prm.optimizer.lr=1e-2"]
    succeed("prm", "tiny.yaml", *words, cwd=tmp_path)
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "runs/tiny/prm/current/model").eval()
    text = succeed("prm", "tiny.yaml", *words, "prm.lora.publish=adapter", cwd=tmp_path)
    assert "nothing was learned" in text or tuned.metrics(tmp_path, "prm")["warnings"] == []
    folder = tmp_path / "runs/tiny/prm/current/model"
    base = AutoModelForTokenClassification.from_pretrained(tmp_path / "runs/tiny/sft/current/model", num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    ids = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)


def test_it_is_refused_as_a_reward_model(plain):
    """As a stage by its kind, as a folder by its head; an answer has no score of its own."""
    folder = plain[0]
    with pytest.raises(UserError, match="scores tokens, as a process reward model does, and has no score for a whole"):
        build.load(folder / "runs/tiny/prm/current/model", head="judge")
    prompts = "sources: {nouns: {path: rows.jsonl, prompt: 'What is a {words} {noun}?'}}"
    keys = (
        f"{{{tuned.COMMON}, steps: 1, inputs: {{policy: sft, reward: prm}}, rollout: {{max_new_tokens: 4}}, {prompts}}}"
    )
    (folder / "ppo.yaml").write_text(f"{tuned.RECIPE}{STAGE}  ppo:\n    {keys}\n", encoding="utf-8")
    code, text = stage("ppo", "ppo.yaml", cwd=folder)
    assert code == 2 and "stage 'prm' is of kind prm, expected reward" in text and "Traceback" not in text, text


ROWS = tuned.stepped_rows()[:40]
STEPS = ["x is 4.", "  so y is 5 <|im_end|>", "answer: 9"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "deepseekv3", "gemma", "phi3"])
def test_where_steps_end(name):
    """In templates as their makers publish them: each step's tokens decode to the step, and the ids are those of the
    prompt and what follows. An added token that a step spells is text."""
    if name not in published.names():
        pytest.skip(f"TRL ships no {name}.jinja")
    chat = Chat(published.tokenizer(name))
    pieces = [f"{STEPS[0]}\n", f"{STEPS[1]}\n", STEPS[2]]
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "".join(pieces)}]
    (row,) = chat.steps([(Dialogue(messages), pieces)])
    begin = len(chat.prompt(messages[:1]))
    assert row.start == begin
    parts = []
    for end in row.ends:
        parts.append(chat.decode(row.ids[begin : end + 1]))
        begin = end + 1
    assert begin == len(row.ids)
    assert parts[0].endswith(pieces[0]) and parts[1] == pieces[1] and parts[2].startswith(pieces[2])
    assert row.ids[-1] in chat.end_ids and len(parts[2]) > len(pieces[2])
    traced = chat.traced_steps(Dialogue(messages), pieces)
    assert [place for place, weight in enumerate(traced.weights) if weight] == list(row.ends)


def test_mistakes_are_sentences(tmp_path):
    world(tmp_path)
    rows = [json.dumps(row) for row in tuned.stepped_rows()]
    bad = [
        {"prompt": "a?", "completions": ["1", "2"], "labels": [True]},
        {"prompt": "b?", "completions": ["1", " "], "labels": [True, False]},
        {"prompt": "c?", "completions": ["1"], "labels": ["maybe"]},
        {"prompt": "d?", "completions": "1", "labels": [True]},
        {"prompt": "e?", "completions": [], "labels": []},
    ]
    lines = [*rows[:40], *(json.dumps(row) for row in bad * 2)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "none.jsonl").write_text("\n".join(map(json.dumps, tuned.rows())) + "\n")
    for words, message in (
        (("prm.sources.nouns.path=bad.jsonl", "prm.max_bad=0.1"), "10 of 50 records cannot be used (20.0%)"),
        (("prm.sources.nouns.path=none.jsonl",), "no answer with judged steps among its fields"),
        (("prm.separator=''",), "steps that follow each other without a break"),
        (("prm.lora={targets: []}",), "an empty list names no layer, so that nothing would be trained"),
    ):
        code, text = stage("prm", "tiny.yaml", *words, cwd=tmp_path)
        assert code == 2 and message in text.replace("\n", " ") and "Traceback" not in text, text


def test_families_without_such_a_model_are_refused_before_anything_runs(tmp_path):
    for family, message in (("llama", None), ("olmo2", "a process reward model cannot be made of the family olmo2")):
        model = PlannedInput(family, folder=tuned.base(tmp_path / family, family=family))
        config = Config(kind="prm", sources={"s": {"path": "x"}}, steps=1, batch_size=2, sequence_length=64)
        if message is None:
            config.check_inputs({"model": model})
            continue
        with pytest.raises(UserError, match=message):
            config.check_inputs({"model": model})
        with pytest.raises(UserError, match=message):
            build.load(model.folder / "model", head="steps")


TRIMMED = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def test_steps_that_the_template_changes_are_refused_before_anything_runs(tmp_path):
    """As the stage writes them: with its separator, and white space at their ends included."""
    (tmp_path / "trimmed.jinja").write_text(TRIMMED)
    model = PlannedInput("llama", folder=tuned.base(tmp_path / "llama"))
    for ending, refused in (("", False), (" ", True)):
        rows = [dict(row, completions=[*row["completions"][:-1], row["completions"][-1] + ending]) for row in ROWS]
        (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = Config(
            kind="prm",
            sources={"s": {"path": str(tmp_path / "steps.jsonl")}},
            chat_template=str(tmp_path / "trimmed.jinja"),
            separator="\n\n",
            steps=1,
            batch_size=2,
            sequence_length=64,
        )
        if not refused:
            config.check_records({"model": model})
            continue
        with pytest.raises(UserError, match="white space at their ends included"):
            config.check_records({"model": model})


def test_accuracies_by_hand():
    """Rows are (loss, right, first wrong step found, right steps, steps)."""
    before = [[2.0, 1, 0, 2, 2], [3.0, 1, 0, 1, 4], [1.0, 0, 0, 0, 2]]
    after = [[1.0, 2, 1, 2, 2], [2.0, 3, 0, 1, 4], [1.0, 2, 1, 0, 2]]
    numbers = accuracies(before, after)
    assert numbers["judged_steps"] == 8 and numbers["majority"] == 5 / 8
    assert numbers["chain_accuracy_before"] == 0 and numbers["chain_accuracy_after"] == pytest.approx(2 / 3)
    low, high = numbers["accuracy_interval"]
    assert 0.75 <= low <= 7 / 8 <= high <= 1
    measures, nothing = headline(0.25, 7 / 8, numbers, 3)
    assert "25% -> 88%" in measures[0] and "one label for all: 62%" in measures[0] and not nothing
    numbers["accuracy_interval"] = [0.6, 0.9]
    perfect = accuracies(before, [[row[0], row[4], 1, *row[3:]] for row in after])
    assert perfect["accuracy_interval"] == list(wilson(1.0, 3)) and perfect["accuracy_interval"][0] < 0.5
    measures, nothing = headline(0.25, 7 / 8, numbers, 3)
    assert nothing == measures[:1]
