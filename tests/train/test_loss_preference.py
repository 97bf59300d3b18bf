"""SFT, reward models, DPO and its relatives, and KTO against TRL's trainers: on the same rows and weights, equal loss and
equal gradients. One file, for TRL takes seconds to import."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import tuned
from tiny_engine import output_in

from pipeline.data.chat.conversations import Pair
from pipeline.data.chat.record_accounting import Ledger
from pipeline.data.chat.template import Chat
from pipeline.dpo import Config, objective
from pipeline.models import build
from pipeline.train.finetune_data import Ragged
from pipeline.train.loss import token_logprobs
from pipeline.train.loss_preference import answer_logprobs, bradley_terry
from pipeline.train.preference_data import encode_pairs, pair_batch
from pipeline.train.reference_logprobs import Cache

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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distillation(direction, temperature):
    """TRL's GKD, whose beta of 0 and 1 are the two directions; ours is multiplied by the temperature's square. A
    teacher with further tokens that the student has no logits for. And the formula in fp64."""
    from trl.experimental.gkd import GKDTrainer

    from pipeline.train.loss import divergence

    source = torch.Generator().manual_seed(0)
    ours = torch.randn(3, 7, 40, generator=source).mul(3).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    teacher = torch.randn(3, 7, 44, generator=source) * 3
    labels = torch.randint(0, 40, (3, 7), generator=source)
    labels[0, :4] = labels[2, 3:] = -100
    losses = divergence(ours, teacher, labels, direction, temperature)
    beta = {"forward": 0, "reverse": 1}[direction]
    expected = GKDTrainer.generalized_jsd_loss(theirs, teacher[..., :40], labels, beta, temperature, reduction="sum")
    assert losses[labels == -100].abs().sum() == 0
    torch.testing.assert_close(losses.sum(), expected * temperature**2, atol=TOLERANCE, rtol=1e-6)
    losses.sum().backward()
    (expected * temperature**2).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=TOLERANCE, rtol=0)
    student, known = ((values.detach().double() / temperature).softmax(-1) for values in (ours, teacher[..., :40]))
    first, second = (known, student) if direction == "forward" else (student, known)
    exact = (first * (first / second).log()).sum(-1) * temperature**2 * (labels != -100)
    torch.testing.assert_close(losses.double(), exact, atol=TOLERANCE, rtol=1e-5)


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


def test_steps(tiny):
    """TRL has had no trainer of process reward models since 1.13; its loss was that of transformers' models for tokens,
    with a label at the last token of each step. That loss, with places that are found by decoding prefixes, and the
    formula in fp64."""
    from pipeline.data.chat.conversations import Stepped
    from pipeline.train.loss_preference import read_steps, step_cross_entropy
    from pipeline.train.step_data import encode_steps, step_batch

    folder, tokenizer, chat = tiny
    answers = [
        Stepped(
            id=str(i),
            source="s",
            place="",
            content="",
            prompt=[{"role": "user", "content": f"{row['words']} {row['noun']}"}],
            steps=[f"{row['kind']} is {place}" for place in range(1 + i % 4)],
            labels=[(i + place) % 3 != 0 for place in range(1 + i % 4)],
        )
        for i, row in enumerate(tuned.rows()[:6])
    ]
    ledger = Ledger()
    ledger.sources["s"] = {"records": 6, "rejected": {}, "train": 0, "heldout": 0}
    arrays = encode_steps(answers, "train", chat, "\n", 64, ledger)
    ours = build.load(folder, head="steps", seed=2)
    torch.nn.init.normal_(ours.score.bias)
    theirs = copy.deepcopy(ours).train()
    batch = step_batch(arrays, tokenizer.pad_token_id, "train", range(6))
    loss, metrics = step_cross_entropy(ours.train()(**batch["inputs"]).logits, batch)

    labels = torch.full_like(batch["inputs"]["input_ids"], -100)
    for number, answer in enumerate(answers):
        ids = arrays["train.ids"][number].tolist()
        text = chat.decode(ids)
        for place, label in enumerate(answer.labels[:-1]):
            upto = text[: text.rindex("\n".join(answer.steps)) + len("\n".join(answer.steps[: place + 1])) + 1]
            labels[number, next(i for i in range(len(ids)) if chat.decode(ids[: i + 1]) == upto)] = int(label)
        labels[number, len(ids) - 1] = int(answer.labels[-1])
    count = int((labels != -100).sum())
    assert batch["weight"] == count == sum(len(answer.steps) for answer in answers)
    outputs = theirs(**batch["inputs"], labels=labels)
    compare(ours, loss / count, theirs, outputs.loss)
    logits = outputs.logits.detach()[labels != -100].double()
    truth = labels[labels != -100]
    exact = (logits.exp().sum(-1).log() - logits[torch.arange(count), truth]).mean()
    assert abs(float(loss) / count - float(exact)) < 1e-6
    right = logits.argmax(-1) == truth
    assert float(metrics["accuracy"]) == int(right.sum())
    rows = read_steps(ours(**batch["inputs"]).logits.detach(), batch)
    assert rows[:, 0].sum().item() == pytest.approx(float(loss), abs=1e-5) and rows[:, 4].sum() == count
    at = 0
    for row, answer in zip(rows.tolist(), answers, strict=True):
        judged = logits.argmax(-1)[at : at + len(answer.labels)].tolist()
        first = [
            next((place for place, value in enumerate(values) if not value), None) for values in (judged, answer.labels)
        ]
        assert row[1:4] == [
            sum(j == int(t) for j, t in zip(judged, answer.labels, strict=True)),
            first[0] == first[1],
            sum(answer.labels),
        ]
        at += len(answer.labels)


def moved(folder):
    """(reference, a policy that has left it)."""
    reference, policy = build.load(folder), build.load(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return reference, policy


def examples_of(arrays) -> list[dict]:
    """Pairs as the collator of TRL's DPOTrainer takes them."""
    starts = arrays["train.start"]
    return [
        {
            "prompt_ids": arrays["train.chosen"][i][: starts[i]].tolist(),
            "chosen_ids": arrays["train.chosen"][i][starts[i] :].tolist(),
            "rejected_ids": arrays["train.rejected"][i][starts[i] :].tolist(),
        }
        for i in range(len(starts))
    ]


@pytest.fixture(scope="module")
def trainers(tiny, tmp_path_factory):
    """TRL's trainers on one model: a function (kind, options) -> trainer, and the reference."""
    from datasets import Dataset
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    folder, tokenizer, _ = tiny
    reference, policy = moved(folder)
    # the trainers want a data set of texts; their collators get our rows
    words = {"prompt": "a", "chosen": "b", "rejected": "c"}
    judged = [{"prompt": "a", "completion": "b", "label": index % 2 == 0} for index in range(8)]

    def trainer(kind: str, **changes):
        model, out = copy.deepcopy(policy).train(), tmp_path_factory.mktemp("trl")
        if kind in ("CPO", "ORPO"):
            config, made = (CPOConfig, CPOTrainer) if kind == "CPO" else (ORPOConfig, ORPOTrainer)
            keys = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
            args = config(output_dir=str(out), max_length=128, **keys, **changes)
            return made(model, args=args, train_dataset=Dataset.from_list([words]), processing_class=tokenizer)
        made, rows, frozen = DPOTrainer, [words], reference
        if kind == "KTO":  # the other way round, so that the KL estimate is above 0
            made, rows, frozen, model = KTOTrainer, judged, policy, copy.deepcopy(reference).train()
        return made(
            model,
            ref_model=copy.deepcopy(frozen),
            args=options(out, f"{kind}Config", **changes),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    return trainer, reference, policy


def ours_of(trainers, arrays, pad_id, **keys):
    """(our policy, its loss per pair, metrics) by the function that stage dpo trains with."""
    _, reference, policy = trainers
    ours = copy.deepcopy(policy)
    batch = pair_batch(arrays, pad_id, "train", range(len(arrays["train.start"])))
    with torch.no_grad():
        batch["reference"] = answer_logprobs(reference(**batch["inputs"]).logits, batch)
    loss, metrics = objective(Config(**KEYS, **keys))[0](ours(**batch["inputs"]).logits, batch)
    return ours, loss / len(arrays["train.start"]), metrics


KEYS = {"sources": {"s": {"path": "x"}}, "batch_size": 6, "sequence_length": 64, "steps": 1}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"loss": "sigmoid_norm"},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "ipo"},
        {"loss": "hinge"},
        {"loss": "apo_zero"},
        {"loss": "apo_down"},
        {"loss": {"hinge": 0.5, "apo_zero": 2.0, "ipo": 0.1}},
    ],
    ids=str,
)
def test_dpo(tiny, trainers, keys):
    arrays = pairs(tiny[2])
    losses = keys.get("loss", "sigmoid")
    losses = losses if isinstance(losses, dict) else {losses: 1.0}
    theirs = {"loss_type": list(losses), "loss_weights": list(losses.values())}
    trainer = trainers[0]("DPO", beta=0.3, label_smoothing=keys.get("label_smoothing", 0.0), **theirs)
    ours, loss, metrics = ours_of(trainers, arrays, tiny[1].pad_token_id, beta=0.3, **keys)
    compare(ours, loss, trainer.model, trainer.compute_loss(trainer.model, trainer.data_collator(examples_of(arrays))))
    if losses.keys() & {"ipo", "sigmoid_norm"}:  # TRL's margins are of sums, ours of the averages that the loss reads
        return
    for key, name in (
        ("rewards/margins", "margin"),
        ("rewards/chosen", "reward_chosen"),
        ("logps/rejected", "logp_rejected"),
        ("rewards/accuracies", "accuracy"),
    ):
        assert abs(float(metrics[name]) / 6 - trainer._metrics["train"][key][-1]) < 1e-4, key


def test_dpo_with_an_sft_term(tiny, trainers):
    """TRL averages the term over the tokens of a micro-batch, we over each answer first: equal in batches of one pair,
    over which TRL's gradients are accumulated here."""
    arrays = pairs(tiny[2])
    trainer = trainers[0]("DPO", beta=0.3, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])
    ours, loss, metrics = ours_of(trainers, arrays, tiny[1].pad_token_id, beta=0.3, loss={"sigmoid": 1.0, "sft": 0.2})
    parts = [trainer.compute_loss(trainer.model, trainer.data_collator([one])) for one in examples_of(arrays)]
    compare(ours, loss, trainer.model, sum(parts) / 6)
    assert float(metrics["loss_sigmoid"] + 0.2 * metrics["loss_sft"]) / 6 == pytest.approx(loss.item(), abs=1e-6)


def concatenated(arrays, pad_id: int) -> dict:
    """Pairs as TRL's CPO and ORPO trainers take them."""
    from torch.nn.utils.rnn import pad_sequence

    batch, starts = {}, arrays["train.start"]
    for kind in ("chosen", "rejected"):
        rows = [torch.tensor(arrays[f"train.{kind}"][i]).long() for i in range(len(starts))]
        labels = [row.clone() for row in rows]
        for row, start in zip(labels, starts, strict=True):
            row[: int(start)] = -100
        batch[f"{kind}_input_ids"] = pad_sequence(rows, batch_first=True, padding_value=pad_id)
        batch[f"{kind}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch[f"{kind}_attention_mask"] = mask
    return batch


def test_simpo(tiny, trainers):
    arrays = pairs(tiny[2])
    trainer = trainers[0]("CPO", loss_type="simpo", beta=2.0, simpo_gamma=0.7, cpo_alpha=0.0)
    ours, loss, metrics = ours_of(trainers, arrays, tiny[1].pad_token_id, loss="simpo", beta=2.0, gamma=0.7)
    batch = concatenated(arrays, tiny[1].pad_token_id)
    compare(ours, loss, trainer.model, trainer.compute_loss(trainer.model, batch))
    assert float(metrics["margin"]) / 6 == pytest.approx(
        trainer.get_batch_loss_metrics(trainer.model, batch)[1]["rewards/margins"], abs=1e-5
    )


def test_cdpo(tiny, trainers):
    """TRL's DPOTrainer ignores label_smoothing with `sigmoid`; its CPOTrainer has the formula, here of log ratios."""
    arrays = pairs(tiny[2])
    trainer = trainers[0]("CPO", loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    ours, loss, _ = ours_of(trainers, arrays, tiny[1].pad_token_id, beta=0.3, label_smoothing=0.2)
    batch = pair_batch(arrays, tiny[1].pad_token_id, "train", range(6))
    ratios = []
    for model in (trainer.model, trainers[1]):
        logits = model(**batch["inputs"]).logits
        logps = token_logprobs(logits, batch["labels"]).sum(-1)
        ratios.append(logps if model is trainer.model else logps.detach())
    chosen, rejected = (ratios[0] - ratios[1]).chunk(2)
    compare(ours, loss, trainer.model, trainer.cpo_loss(chosen, rejected)[0].mean())


def test_orpo(tiny, trainers):
    """TRL's odds ratio loss. Its cross-entropy counts the prompt's tokens too; the paper's (eq. 2) is of the answer, as
    here that of transformers, one answer at a time."""
    arrays = pairs(tiny[2])
    trainer = trainers[0]("ORPO", beta=0.3)
    ours, loss, _ = ours_of(trainers, arrays, tiny[1].pad_token_id, loss="orpo", beta=0.3)
    batch = concatenated(arrays, tiny[1].pad_token_id)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    odds = trainer.odds_ratio_loss(chosen, rejected)[0]
    answers = zip(batch["chosen_input_ids"], batch["chosen_labels"], strict=True)
    parts = [trainer.model(input_ids=ids[None], labels=labels[None]).loss for ids, labels in answers]
    compare(ours, loss, trainer.model, sum(parts) / 6 - odds.mean())


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto(tiny, trainers, kind):
    """With the mismatched answers that the stage makes, in three micro-batches; TRL's are in one, over which it takes
    the mean of the KL estimate."""
    from pipeline import kto
    from pipeline.data.chat.conversations import Labelled
    from pipeline.train import engine
    from pipeline.train.labelled_data import encode_answers, labelled_batch, partners

    answers = [
        Labelled(
            id=str(i),
            source="s",
            place="",
            content="",
            prompt=[{"role": "user", "content": f"{row['words']} {row['noun']}"}],
            answer={"role": "assistant", "content": row["kind"] * (1 + i % 3)},
            label=i % 3 != 1,
        )
        for i, row in enumerate(tuned.rows()[:6])
    ]
    ledger, pad_id = Ledger(), tiny[1].pad_token_id
    ledger.sources["s"] = {"records": 6, "rejected": {}, "train": 0, "heldout": 0}
    arrays = encode_answers(answers, "train", tiny[2], 64, ledger)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    trainer = trainers[0]("KTO", loss_type=kind, beta=0.3, **weights)
    ids = [arrays["train.ids"][i].tolist() for i in range(6)]
    starts, partner = arrays["train.start"].tolist(), partners(3, "train", 6)
    examples = [
        {
            "prompt_ids": ids[i][: starts[i]],
            "completion_ids": ids[i][starts[i] :],
            "KL_completion_ids": ids[partner[i]][starts[partner[i]] :],
            "label": bool(arrays["train.label"][i]),
        }
        for i in range(6)
    ]
    assert all(partner[i] != i for i in range(6))

    config = kto.Config(**KEYS, kind="kto", seed=3, precision="fp32", loss=kind, beta=0.3, **weights)
    loss_fn, _ = kto.objective(config)
    frozen = engine.build(copy.deepcopy(trainers[2]), loss_fn, config)
    ours = engine.build(copy.deepcopy(trainers[1]), loss_fn, config)
    cache, output = Cache(tmp := Path(tempfile.mkdtemp()), {}), output_in(tmp)
    table = kto.reference(frozen, config, arrays, "train", list(range(6)), pad_id, cache, output)
    parts = [[4, 0], [1, 5], [3, 2]]
    batches = [labelled_batch(arrays, pad_id, "train", part) for part in parts]
    for part, batch in zip(parts, batches, strict=True):
        batch["reference"] = table[part, 0]
    kto.baseline(ours, config, arrays, {"train": table}, pad_id)("train", parts, batches)
    sums = [loss_fn(ours.model(**batch["inputs"]).logits, batch) for batch in batches]
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    compare(ours.model, sum(loss for loss, _ in sums) / 6, trainer.model, theirs)
    for key, name in (
        ("kl", "kl"),
        ("rewards/margins", "margin"),
        ("rewards/chosen", "reward_desirable"),
        ("rewards/rejected", "reward_undesirable"),
    ):
        found = sum(float(metrics[name]) for _, metrics in sums) / 6
        assert found == pytest.approx(trainer._metrics["train"][key][-1], abs=1e-4), key
    assert (float(batches[0]["kl"]) > 0.05) == (kind == "kto"), batches[0]["kl"]


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
