"""SFT: what it learns, that a killed run ends with the same files, and that ranks do not matter."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import tuned
from harness import launch, stage


def test_what_is_learned_and_measured():
    folder = tuned.plain()
    found = tuned.metrics(folder, "sft")
    assert found["heldout_loss_after"] < 0.3 < 3 < found["heldout_loss_before"]
    assert found["heldout_eos_rate_before"] < 0.5 < 0.9 < found["heldout_eos_rate_after"]
    assert found["heldout_rule_before"] == 0 and found["heldout_rule_after"] > 0.8
    low, high = found["heldout_loss_change_interval"]
    assert low < found["heldout_loss_after"] - found["heldout_loss_before"] < high < -2
    assert found["packing_fill"] > 0.9 and found["train_conversations"] + found["heldout_conversations"] == len(
        tuned.rows()
    )
    # the base model's loss, by transformers alone: its template, its mask, one conversation at a time
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.core.recipe import load
    from pipeline.data.chat.conversations import load_conversations

    os_path = os.getcwd()
    os.chdir(folder)
    try:
        config = load("tiny.yaml").stages["sft"]
        _, heldout, _ = load_conversations(config.sources, config.holdout)
    finally:
        os.chdir(os_path)
    for name, key in (("base", "heldout_loss_before"), ("runs/tiny/sft/current", "heldout_loss_after")):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder / name / "model"),
            AutoTokenizer.from_pretrained(folder / name / "model"),
        )
        total = count = 0
        for row in heldout:
            made = tokenizer.apply_chat_template(
                row.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            labels = torch.tensor(
                [
                    [
                        token if kept else -100
                        for token, kept in zip(made["input_ids"], made["assistant_masks"], strict=True)
                    ]
                ]
            )
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([made["input_ids"]]), labels=labels).loss
            total, count = total + float(loss) * int((labels != -100).sum()), count + int((labels != -100).sum())
        assert abs(total / count - found[key]) < 1e-4
    # what is published answers and ends its turn with transformers' own generate
    prompt = tokenizer.apply_chat_template(
        heldout[0].messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = tokenizer.decode(
        model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    )
    assert text.endswith("<|im_end|>")
    report = json.loads((folder / "runs/tiny/sft/current/report.json").read_text())
    assert (
        report["sources"]["nouns"]["train"] == found["train_conversations"]
        and report["trained_tokens"]["heldout"] == count
    )


def test_killed_at_every_step_and_resumed(tmp_path):
    text = tuned.killed_like_plain("sft", tmp_path, ["save:1", "work:6", "save:1", "publish:1", "publish:2"])
    assert "up to date" in text  # the last kill came after the rename


def test_killed_at_a_random_moment(tmp_path):
    moment = np.random.default_rng().uniform(0.2, 4)
    print(f"killed after {moment:.2f} s")
    tuned.killed_like_plain("sft", tmp_path, [], kill_after=moment)


TWO_RANKS = """
import sys
from pipeline.core.stage import run_stage
from pipeline.core.recipe import load
from pipeline.core import distributed
words = [f"{name}.{key}" for name in ("sft", "reward", "dpo") for key in ("steps=8", f"parallel.{sys.argv[1]}", "micro_batch=2", "run.processes=2")]
recipe = load("tiny.yaml", [*words, "reward.inputs.model=./learned", "dpo.inputs.model=./learned"])
for name in ("sft", "reward", "dpo"):
    run_stage(recipe, name)
    distributed.barrier()
distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero=1", "shard=full"])
def test_two_ranks_with_zero_like_one_process(layout, tmp_path):
    """The losses of the first eight steps and the evaluation before them, of all three stages, within 1e-5 of one
    process's."""
    tuned.copy_until("sft", tmp_path)
    shutil.copytree((tuned.plain() / "runs/tiny/sft/current").resolve(), tmp_path / "learned")
    (tmp_path / "two.py").write_text(TWO_RANKS)
    launch(2, "two.py", layout, cwd=tmp_path)
    for name in ("sft", "reward", "dpo"):
        one, two = (
            [line["loss"] for line in tuned.lines(where, name) if "loss" in line] for where in (tuned.plain(), tmp_path)
        )
        assert len(two) == 8
        np.testing.assert_allclose(two, one[:8], atol=1e-5, err_msg=name)
        one, two = (
            {
                key: value
                for key, value in tuned.metrics(where, name).items()
                if key.startswith("heldout_") and key.endswith("_before")
            }
            for where in (tuned.plain(), tmp_path)
        )
        assert one.keys() == two.keys() and len(one) >= 3
        np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-5, err_msg=name)


def test_long_conversations_are_counted_or_cut(tmp_path):
    tuned.copy_until("sft", tmp_path)
    long = [{"words": "very " * 40 + str(i), "noun": "cat", "kind": "animal"} for i in range(5)] + [
        {"words": f"w{i}", "noun": "x", "kind": "animal metal " * 40} for i in range(5)
    ]
    tuned.write_rows(tmp_path / "rows.jsonl", long)
    for how, rows, reason in (
        ("drop", 792, "longer than sequence_length"),
        ("truncate", 797, "its answers begin after sequence_length"),
    ):
        tuned.succeed("sft", "tiny.yaml", f"sft.too_long={how}", "sft.steps=1", "sft.max_prompts=0", cwd=tmp_path)
        entry = json.loads((tmp_path / "runs/tiny/sft/current/report.json").read_text())["sources"]["nouns"]
        assert (
            entry["train"]
            + entry["heldout"]
            + entry["rejected"].get("near duplicate of a held-out row", {"count": 0})["count"]
            == rows
        )
        assert entry["rejected"][reason]["first"] and entry.get("truncated", 0) == (rows - 792)


def test_without_packing_the_same_is_measured(tmp_path):
    tuned.copy_until("sft", tmp_path)
    tuned.succeed("sft", "tiny.yaml", "sft.packing=false", "sft.steps=1", "sft.max_prompts=0", cwd=tmp_path)
    assert (
        abs(
            tuned.metrics(tmp_path, "sft")["heldout_loss_before"]
            - tuned.metrics(tuned.plain(), "sft")["heldout_loss_before"]
        )
        < 1e-5
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["sft.sequence_length=128"], "sequence_length: 128 is more than the 64 positions"),
        (["sft.sources.nouns.path=none.jsonl"], "none.jsonl does not exist"),
        (["sft.sources.nouns.answer='{knid}'"], "no field 'knid'.*the record has words, noun, kind, wrong"),
        (["sft.sequence_length=8"], "none of its 792 records can be used: 7.. x longer than sequence_length"),
        (["sft.holdout=0"], "holdout: 0 leaves nothing to measure on"),
        (["sft.sources.nouns.messages=[{role: user, content: hi}]"], "none with role: assistant"),
        (["sft.sources.nouns.mesages=[]"], "unknown key stages.sft.sources.nouns.mesages; did you mean .messages.?"),
        (["sft.inputs.model=./nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_sentences(tmp_path_factory, words, message):
    code, text = stage("sft", "tiny.yaml", "--restart", *words, cwd=wrong_world(tmp_path_factory))
    assert code == 2 and re.search(message, text) and "Traceback" not in text, text


def test_a_source_that_loses_half_of_its_records_ends_the_stage(tmp_path):
    """correctness 2, 45: the bad answers of a KTO set are not learned, and the stage says how many they are."""
    tuned.copy_until("sft", tmp_path)
    rows = [
        {
            "messages": [{"role": "user", "content": f"What is a {row['words']} {row['noun']}?"}, {"role": "assistant", "content": row["kind" if good else "wrong"]}],
            "label": good,
        }
        for row in tuned.rows()[:200]
        for good in (True, False)
    ]  # fmt: skip
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["sft.sources={kto: {path: kto.jsonl}}", "sft.steps=1", "sft.max_prompts=0"]
    code, text = stage("sft", "tiny.yaml", *words, cwd=tmp_path)
    assert code == 2 and "Traceback" not in text, text
    assert re.search(
        r"sources.kto: 200 of 400 records cannot be used \(50.0%\), more than max_bad 0.05: 200 x `label` is false",
        text,
    )
    code, text = stage("sft", "tiny.yaml", *words, "sft.max_bad=0.5", cwd=tmp_path)
    assert code == 0, text
    assert (
        "WARNING sources.kto: 200 of 400 records (50%) dropped: `label` is false: a bad answer (first: kto.jsonl:2)"
        in text
    )
    report = json.loads((tmp_path / "runs/tiny/sft/current/report.json").read_text())["sources"]["kto"]
    assert (
        report["train"] + report["heldout"] == 200
        and report["rejected"]["`label` is false: a bad answer"]["count"] == 200
    )


def wrong_world(factory):
    folder = factory.getbasetemp() / "sft-mistakes"
    if not folder.exists():
        tuned.copy_until("sft", folder)
    return folder
