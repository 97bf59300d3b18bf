"""SFT, reward and DPO against TRL's trainers: on the same rows and weights, equal loss and equal gradients. One
file, for TRL takes seconds to import."""

import copy

import numpy as np
import pytest
import torch
import tuned

from pipeline.data.chat.conversations import Pair
from pipeline.data.chat.record_accounting import Ledger
from pipeline.data.chat.template import Chat
from pipeline.models import build
from pipeline.train.finetune_data import Ragged
from pipeline.train.loss import token_logprobs
from pipeline.train.loss_preference import answer_lengths, answer_logprobs, bradley_terry, dpo, ipo
from pipeline.train.preference_data import encode_pairs, pair_batch

TOLERANCE = 1e-5  # absolute, fp32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder of the model, tokenizer, chat)."""
    folder = tuned.base(tmp_path_factory.mktemp("oracle"), length=128) / "model"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return folder, tokenizer, Chat(tokenizer)


def conversations() -> list[list[dict]]:
    """Of different lengths and numbers of turns, with a system message and Chinese."""
    found = []
    for index, row in enumerate(tuned.rows()[:9]):
        turns = [{"role": "system", "content": "很短"}] if index % 3 == 0 else []
        for _ in range(1 + index % 2):
            turns += [
                {"role": "user", "content": f"What is a {row['words']} {row['noun']}?"},
                {"role": "assistant", "content": f"A {row['kind']}." * (1 + index % 4)},
            ]
        found.append(turns)
    return found


def pairs(chat):
    rows = [
        Pair(
            id=str(i),
            source="s",
            place="",
            content="",
            prompt=[{"role": "user", "content": f"{row['words']} {row['noun']}"}],
            chosen={"role": "assistant", "content": row["kind"] * (1 + i % 3)},
            rejected={"role": "assistant", "content": row["wrong"]},
            margin=0.1 * i,
        )
        for i, row in enumerate(tuned.rows()[:6])
    ]
    ledger = Ledger()
    ledger.sources["s"] = {"records": 6, "rejected": {}, "train": 0, "heldout": 0}
    arrays = encode_pairs(rows, "train", chat, 64, ledger)
    assert len(arrays["train.start"]) == 6
    return arrays


def options(folder, kind, **changes):
    import trl

    keys = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
    }
    return getattr(trl, kind)(**keys, max_length=128, **changes)


def batch_of(trainer):
    """The trainer's own collated rows, in the order of its data set."""
    trainer.model.train()  # else its numbers are booked as an evaluation's
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(model, loss, trainer_model, trainer_loss):
    loss.backward()
    trainer_loss.backward()
    assert abs(loss.item() - trainer_loss.item()) < TOLERANCE
    ours, theirs = gradients(model), gradients(trainer_model)
    assert set(ours) == set(theirs) and ours
    for name, gradient in ours.items():
        assert float(gradient.abs().max()) > 0 or "norm" in name, name
        torch.testing.assert_close(
            gradient, theirs[name], atol=TOLERANCE, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_sft(tiny, tmp_path):
    """Packed rows of ours against TRL's padded ones: the same answers' tokens, none of them seeing another
    conversation."""
    from datasets import Dataset
    from trl import SFTTrainer

    from pipeline.train.conversation_data import conversation_batch
    from pipeline.train.finetune_data import best_fit
    from pipeline.train.loss import cross_entropy_sum

    folder, tokenizer, chat = tiny
    theirs = build.load(folder)
    data = Dataset.from_list([{"messages": messages} for messages in conversations()])
    trainer = SFTTrainer(
        theirs,
        args=options(tmp_path, "SFTConfig", assistant_only_loss=True),
        train_dataset=data,
        processing_class=tokenizer,
    )
    inputs = batch_of(trainer)

    encoded = [row for (row,) in chat.rows(conversations())]
    arrays = {
        "train.ids": Ragged.of([row.ids for row in encoded], np.int32),
        "train.trained": Ragged.of([row.trained for row in encoded], np.bool_),
    }
    rows = best_fit(arrays["train.ids"].lengths, 96, np.arange(len(encoded)))
    assert len(rows) < len(encoded) and sorted(index for row in rows for index in row) == list(range(len(encoded)))
    ours = build.load(folder)
    made = conversation_batch(arrays, tokenizer.pad_token_id, "train", rows)
    assert made["weight"] == float((inputs["labels"][:, 1:] != -100).sum())
    compare(
        ours,
        cross_entropy_sum(ours(**made["inputs"]).logits, made["labels"]) / made["weight"],
        theirs,
        trainer.compute_loss(theirs, inputs),
    )


@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_reward(tiny, tmp_path, centering):
    from datasets import Dataset
    from trl import RewardTrainer

    folder, tokenizer, chat = tiny
    arrays = pairs(chat)
    ours = build.load(folder, head="reward", seed=2)
    ours.config.pad_token_id = tokenizer.pad_token_id
    theirs = copy.deepcopy(ours)
    data = Dataset.from_list(
        [
            {
                "chosen_ids": arrays["train.chosen"][i].tolist(),
                "rejected_ids": arrays["train.rejected"][i].tolist(),
                "margin": float(arrays["train.margin"][i]),
            }
            for i in range(6)
        ]
    )
    trainer = RewardTrainer(
        theirs,
        args=options(tmp_path, "RewardConfig", center_rewards_coefficient=centering or None),
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = pair_batch(arrays, tokenizer.pad_token_id, "train", range(6))
    loss, metrics = bradley_terry(ours(**batch["inputs"]).logits.squeeze(-1), batch["margin"], centering)
    compare(ours, loss / 6, theirs, trainer.compute_loss(theirs, batch_of(trainer)))
    assert abs(float(metrics["accuracy"]) / 6 - trainer._metrics["train"]["accuracy"][-1]) < 1e-6


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo(tiny, tmp_path, kind):
    from datasets import Dataset
    from trl import DPOTrainer

    folder, tokenizer, chat = tiny
    arrays = pairs(chat)
    reference, ours = build.load(folder), build.load(folder)
    torch.manual_seed(0)
    with torch.no_grad():  # a policy that has left its reference
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = copy.deepcopy(ours)
    starts = arrays["train.start"]
    examples = [
        {
            "prompt_ids": arrays["train.chosen"][i][: starts[i]].tolist(),
            "chosen_ids": arrays["train.chosen"][i][starts[i] :].tolist(),
            "rejected_ids": arrays["train.rejected"][i][starts[i] :].tolist(),
        }
        for i in range(6)
    ]
    theirs.train()
    # the trainer wants a data set of texts; its collator gets our rows
    words = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(
        theirs,
        ref_model=copy.deepcopy(reference),
        args=options(tmp_path, "DPOConfig", beta=0.3, loss_type=[kind]),
        train_dataset=words,
        processing_class=tokenizer,
    )
    batch = pair_batch(arrays, tokenizer.pad_token_id, "train", range(6))
    with torch.no_grad():
        frozen = token_logprobs(reference(**batch["inputs"]).logits, batch["labels"]).sum(-1)
    logps = answer_logprobs(ours(**batch["inputs"]).logits, batch)
    if kind == "ipo":
        loss, metrics = ipo(logps, frozen, answer_lengths(batch), beta=0.3)
    else:
        loss, metrics = dpo(logps, frozen, beta=0.3)
    compare(ours, loss / 6, theirs, trainer.compute_loss(theirs, trainer.data_collator(examples)))
    if kind == "ipo":  # TRL's margins are of sums, ours of the averages that the loss reads
        return
    for key, name in (
        ("rewards/margins", "margin"),
        ("rewards/chosen", "reward_chosen"),
        ("logps/rejected", "logp_rejected"),
        ("rewards/accuracies", "accuracy"),
    ):
        assert abs(float(metrics[name]) / 6 - trainer._metrics["train"][key][-1]) < 1e-4, key


def test_our_rows_are_trls(tiny, tmp_path):
    """TRL's own tokenisation of a pair, up to the end of the turn (it also counts the newline after it, which no
    model is asked for)."""
    from datasets import Dataset
    from trl import DPOTrainer

    folder, tokenizer, chat = tiny
    rows = [
        {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [{"role": "assistant", "content": "no 不"}]}
        for turns in conversations()
    ]
    trainer = DPOTrainer(
        build.load(folder),
        ref_model=build.load(folder),
        args=options(tmp_path, "DPOConfig"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        ours = chat.encode([row["prompt"] + row["chosen"]])[0]
        assert theirs["prompt_ids"] == ours.ids[: ours.start] == chat.prompt(row["prompt"])
        assert theirs["chosen_ids"] == ours.ids[ours.start :] + newline
