"""Held-out files by name (`evaluate`): measured on their own, against transformers alone; and nothing like them is
trained on."""

import json

import pytest
import torch
import tuned
from harness import stage, succeed

from pipeline.core.errors import UserError
from pipeline.sft import Config
from pipeline.train.finetune_data import heldout_sets, heldout_share


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def world(folder):
    """The usual rows, and two held-out files: some of them, and some of another kind."""
    tuned.world(folder)
    write(folder / "some.jsonl", tuned.rows()[::40])
    write(
        folder / "other.jsonl",
        [{"words": f"w{i}", "noun": "thing", "kind": "metal", "wrong": "plant"} for i in range(9)],
    )
    return folder


def evaluate(fields: str) -> str:
    return f"{{some: {{path: some.jsonl, {fields}}}, other: {{path: other.jsonl, {fields}}}}}"


def transformers_loss(folder, rows: list[dict]) -> float:
    """Mean loss per answer token of the base model, one conversation at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base/model")
    model = AutoModelForCausalLM.from_pretrained(folder / "base/model")
    total = count = 0
    for row in rows:
        messages = [
            {"role": "user", "content": f"What is a {row['words']} {row['noun']}?"},
            {"role": "assistant", "content": row["kind"]},
        ]
        made = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        labels = [
            token if kept else -100 for token, kept in zip(made["input_ids"], made["assistant_masks"], strict=True)
        ]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([made["input_ids"]]), labels=torch.tensor([labels])).loss
        number = sum(label != -100 for label in labels)
        total, count = total + float(loss) * number, count + number
    return total / count


@pytest.mark.parametrize("packing, holdout", [("true", "0"), ("false", "0.1")])
def test_each_file_is_measured_on_its_own(tmp_path, packing, holdout):
    folder = world(tmp_path)
    words = ["sft.steps=1", "sft.max_prompts=4", f"sft.packing={packing}", f"sft.holdout={holdout}"]
    text = succeed("sft", "tiny.yaml", *words, f"sft.evaluate={evaluate(tuned.CHAT)}", cwd=folder)
    found = tuned.metrics(folder, "sft")
    some, other = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in ("some", "other")
    )
    assert found["heldout_loss/some_before"] == pytest.approx(transformers_loss(folder, some), abs=1e-4)
    assert found["heldout_loss/other_before"] == pytest.approx(transformers_loss(folder, other), abs=1e-4)
    assert f"some {found['heldout_loss/some_before']:.3f} -> " in text and ", other 6.034 -> " in text
    report = json.loads((folder / "runs/tiny/sft/current/report.json").read_text())["sources"]
    assert report["evaluate.some"]["heldout"] == len(some) and report["evaluate.other"]["heldout"] == 9
    dropped = report["nouns"]["rejected"]
    assert dropped["duplicate"]["count"] == len(some)  # the same record is held out, not trained on
    if holdout == "0":
        assert report["nouns"]["heldout"] == 0 and found["heldout_conversations"] == len(some) + 9
        weights = [2 * len(some), 2 * 9]
        both = [found["heldout_loss/some_before"], found["heldout_loss/other_before"]]
        mean = sum(weight * loss for weight, loss in zip(weights, both, strict=True)) / sum(weights)
        assert found["heldout_loss_before"] == pytest.approx(mean, abs=1e-5)
    else:
        assert report["nouns"]["heldout"] == found["heldout_conversations"] > 50


def test_pairs_with_the_best_checkpoint_by_a_held_out_file(tmp_path):
    """Also that dpo has the reference of held-out files, and that the files' content is part of the identity."""
    folder = world(tmp_path)
    words = ["dpo.inputs.model=./base", "dpo.steps=6", f"dpo.evaluate={evaluate(tuned.PAIR)}"]
    words.append("dpo.best={metric: margin/other, every_steps: 2}")
    succeed("dpo", "tiny.yaml", *words, cwd=folder)
    found = tuned.metrics(folder, "dpo")
    assert found["heldout_margin/other_before"] == pytest.approx(0, abs=1e-6)
    assert found["heldout_margin/some_before"] == pytest.approx(0, abs=1e-6)
    margins = {
        line["step"]: line["heldout_margin/other"] for line in tuned.lines(folder, "dpo") if "heldout_loss" in line
    }
    del margins[0]
    assert found["best_step"] == max(margins, key=margins.get) and len(margins) == 3
    assert "up to date" in succeed("dpo", "tiny.yaml", *words, cwd=folder)
    write(folder / "other.jsonl", [{"words": "x", "noun": "thing", "kind": "metal", "wrong": "plant"}])
    assert "done in" in succeed("dpo", "tiny.yaml", *words, cwd=folder)


@pytest.mark.parametrize(
    "words, message",
    [
        (["sft.evaluate={some: {path: none.jsonl}}"], "none.jsonl does not exist"),
        (["sft.evaluate={some: {path: rows.jsonl}}"], "evaluate.some: none of its 792 records can be used"),
        (["sft.holdout=0"], "holdout: 0 leaves nothing to measure on"),
    ],
)
def test_mistakes_are_sentences(tmp_path, words, message):
    folder = world(tmp_path)
    code, text = stage("sft", "tiny.yaml", *words, cwd=folder)
    assert code == 2 and message in text and "Traceback" not in text, text


def test_too_few_rows_for_the_processes():
    config = Config(
        kind="sft",
        sources={"s": {"path": "x"}},
        batch_size=8,
        sequence_length=64,
        steps=1,
        evaluate={"few": {"path": "y"}},
    )

    class Engine:
        data_rank, data_world = 0, 4

    with pytest.raises(
        UserError, match="3 held-out rows cannot be shared by 4 processes; give evaluate.few more records"
    ):
        heldout_share(3, config, Engine(), "few")
    import numpy as np

    with pytest.raises(UserError, match="evaluate.few: none of its records is left"):
        heldout_sets(config, {"heldout.source": np.zeros(5, np.int32)}, 5)
