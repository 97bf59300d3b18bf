"""Supervised fine-tuning: a base model learns to answer, from conversations, with loss on the assistant's tokens alone.

    python pipeline/sft.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/sft.py recipes/llama-7b.yaml

Conversations are written with the tokenizer's own chat template and packed, several to a row; no conversation sees
another. Out: model/ (Hugging Face layout), report.json (what became of each record).
"""

import functools
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.intervals import shares, unchanged, warn
from pipeline.core.output import Output
from pipeline.core.plural import many
from pipeline.core.recipe import EXECUTION
from pipeline.data.chat.chat_sources import ChatSource
from pipeline.data.dedup.decontaminate import Decontaminate
from pipeline.train.config import Optimizer, TuningConfig

VERSION = 4
INPUTS = {"model": ("pretrain", "sft")}


class SftOptimizer(Optimizer):
    """AdamW for fine-tuning: a tenth of pretraining's learning rate and no decay towards zero."""

    lr: float = Field(2e-5, gt=0)
    """Peak learning rate; 2e-5 is usual for 1B to 10B parameters, small models take 1e-4 to 1e-3."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices."""


class Config(TuningConfig):
    """Supervised fine-tuning."""

    sources: dict[str, ChatSource]
    """Conversations by name."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets whose text must not be trained on."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of records, chosen by their own hash and so the same in every stage, that is only measured on."""
    packing: bool = True
    """Several conversations in a row, each with its own positions and attention. Without: one in a row, padded."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of a conversation longer than sequence_length: left out, or cut at its end."""
    optimizer: SftOptimizer = SftOptimizer()
    """AdamW."""
    max_prompts: Annotated[int, EXECUTION] = Field(64, ge=0)
    """Held-out prompts that are answered greedily at each evaluation; 0 for none."""
    max_new_tokens: Annotated[int, EXECUTION] = Field(64, ge=1)
    """Longest of these answers."""


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.core.chain import say
    from pipeline.core.seeds import derive
    from pipeline.models.build import load
    from pipeline.models.publish import publish
    from pipeline.train.engine import build
    from pipeline.train.finetune_data import (
        announce,
        chat_of,
        heldout_share,
        model_folder,
        permutation,
        shared,
        tokenizer_of,
    )
    from pipeline.train.loop import fit, share
    from pipeline.train.run_summary import Work

    folder = model_folder(inputs["model"])
    tokenizer = tokenizer_of(folder, config.sequence_length)
    chat = chat_of(tokenizer, config, output.stage)
    arrays, extra = shared(output, config, functools.partial(rows_of, config, chat, output))
    train, heldout = ({key: arrays[f"{split}.{key}"] for key in ("ids", "trained")} for split in ("train", "heldout"))

    model = load(folder)
    if config.packing:
        check_packing(model, chat.end_id)

    @functools.lru_cache(2)
    def packed(epoch: int) -> list[list[int]]:
        """Rows of an epoch, in the order in which they are taken: conversations are shuffled, packed, and the rows
        shuffled."""
        rows = pack(config, train["ids"].lengths, permutation(config.seed, epoch, len(train["ids"])))
        return [rows[row] for row in permutation(derive(config.seed, "rows"), epoch, len(rows))]

    rows_per_epoch = len(packed(0))
    epochs = config.steps * config.batch_size / rows_per_epoch
    kind = "packed rows" if config.packing else "conversations"
    work = Work(
        f"{many(config.steps, 'step', ',')} x {config.batch_size} {kind} of at most {config.sequence_length} tokens:"
        f" {epochs:.3g} epochs of {many(rows_per_epoch, 'row', ',')}",
        tokens=epochs * len(train["ids"].values),
    )
    text = announce(config, model, work)
    engine = build(model, loss, config)
    heldout_order = permutation(0, 0, len(heldout["ids"])) if config.packing else range(len(heldout["ids"]))
    for_heldout = pack(config, heldout["ids"].lengths, heldout_order)
    measured = [
        batch(heldout, [for_heldout[row] for row in rows], tokenizer.pad_token_id)
        for rows in heldout_share(len(for_heldout), config, engine)
    ]
    filled = float(train["ids"].lengths.sum() / (rows_per_epoch * config.sequence_length))
    say(
        f"{output.stage}: {many(len(train['ids']), 'conversation')} to train on in {many(rows_per_epoch, 'row')},"
        f" {filled:.0%} filled;"
        f" {len(heldout['ids'])} held out; {many(extra['rejected'], 'record')} left out (report.json says why)"
    )

    def batches(step: int) -> list[dict]:
        chosen = [
            [packed(index // rows_per_epoch)[index % rows_per_epoch] for index in indices]
            for indices in share(config, engine, step)
        ]
        return [batch(train, rows, tokenizer.pad_token_id) for rows in chosen]

    def evaluate() -> dict:
        return engine.evaluate(measured) | answers(engine, chat, heldout, extra, config)

    result = fit(engine, config, output, batches, evaluate=evaluate, text=text)
    weights = engine.consolidated()
    if output.is_main:
        publish(weights, engine.model.config, folder, output.path / "model")
    before, after = result["before"], result["after"]
    measures, nothing = headline(before, after, len(heldout["ids"]))
    return {
        **{
            f"heldout_{key}_{when}": value
            for when, found in (("before", before), ("after", after))
            for key, value in found.items()
            if key != "weight"
        },
        "warnings": warn(output.stage, nothing),
        "train_loss": result["last"]["loss"],
        "train_conversations": len(train["ids"]),
        "heldout_conversations": len(heldout["ids"]),
        "rejected": extra["rejected"],
        "packing_fill": filled,
        "epochs": epochs,
        "trained_tokens": result["weight"],
        "tokens_per_second": result["rate"],
        "summary": {
            "input": (
                f"{many(len(config.sources), 'source')},"
                f" {many(len(train['ids']) + len(heldout['ids']), 'conversation')}"
            ),
            "output": f"model/, {many(config.steps, 'step')}, {result['weight'] / 1e3:.0f}k answer tokens",
            "measure": ", ".join(measures),
        },
    }


def pack(config: Config, lengths, order) -> list[list[int]]:
    """Conversations of each row: as many as fit, or with packing: false one each, in `order`."""
    from pipeline.train.finetune_data import best_fit

    if config.packing:
        return best_fit(lengths, config.sequence_length, order)
    return [[int(conversation)] for conversation in order]


def headline(before: dict, after: dict, conversations: int) -> tuple[list[str], list[str]]:
    """(parts of the closing line, those of them that show nothing learned)."""
    loss = f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f} (n={conversations})"
    measures, nothing = [loss], [loss] if after["loss"] >= before["loss"] else []
    for key, count, words in (("eos_rate", "answered", "ends its turn"), ("rule", "checked", "right")):
        if key in after:
            part = f"{words} {shares(before[key], after[key], int(after[count]))}"
            measures.append(part)
            nothing += [part] if unchanged(before[key], after[key]) else []
    return measures, nothing


def rows_of(config: Config, chat, output: Output) -> tuple[dict, dict]:
    """Token rows of both splits; report.json. Runs on the main process."""
    import numpy as np

    from pipeline.data.chat.conversations import load_conversations
    from pipeline.data.chat.template import cut
    from pipeline.train.finetune_data import Ragged

    *splits, ledger = load_conversations(config.sources, config.holdout, config.decontaminate)
    arrays, extra = {}, {"tokens": {}, "trained_tokens": {}}
    for split, rows in zip(("train", "heldout"), splits, strict=True):
        encoded = chat.encode([row.messages for row in rows])
        reasons = []
        for index, found in enumerate(encoded):
            reason = found if isinstance(found, str) else None
            if reason is None and len(found.ids) > config.sequence_length:
                if config.too_long == "truncate" and any(found.trained[: config.sequence_length]):
                    encoded[index] = cut(found.ids[: config.sequence_length], found.trained[: config.sequence_length])
                    ledger.sources[rows[index].source]["truncated"] = (
                        ledger.sources[rows[index].source].get("truncated", 0) + 1
                    )
                else:
                    reason = (
                        "longer than sequence_length"
                        if config.too_long == "drop"
                        else "its answers begin after sequence_length"
                    )
            reasons.append(reason)
        kept = ledger.keep(rows, split, reasons)
        encoded = [found for found, reason in zip(encoded, reasons, strict=True) if reason is None]
        arrays[f"{split}.ids"] = Ragged.of([found.ids for found in encoded], np.int32)
        arrays[f"{split}.trained"] = Ragged.of([found.trained for found in encoded], np.bool_)
        extra["tokens"][split] = len(arrays[f"{split}.ids"].values)
        extra["trained_tokens"][split] = int(arrays[f"{split}.trained"].values.sum())
        if split == "heldout":
            extra["starts"] = [found.start for found in encoded]
            extra["answers"] = [[row.rule, row.answer] for row in kept]
    ledger.check(config.holdout)
    report = output.path / "report.json"
    write_json(report, {**ledger.report(), **{key: extra[key] for key in ("tokens", "trained_tokens")}})
    ledger.judge(config.max_bad, report)
    return arrays, extra | {"rejected": ledger.rejected()}


def batch(split: dict, rows: list[list[int]], pad_id: int) -> dict:
    """A micro-batch of packed rows: conversation ids of each -> input_ids, position_ids that begin anew with each
    conversation, shifted labels.

    There is no attention mask: transformers then reads the borders off the positions
    (masking_utils.find_packed_sequence_indices). With a mask of ones beside them, conversations would see each other.
    What fills a row up has positions of its own, and no labels.
    """
    import numpy as np
    import torch

    length = max(sum(len(split["ids"][index]) for index in row) for row in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    labels = np.full((len(rows), length), -100, np.int64)
    positions = np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            ids, trained = split["ids"][index], split["trained"][index]
            end = at + len(ids)
            input_ids[number, at:end] = ids
            positions[number, at:end] = np.arange(len(ids))
            labels[number, at : end - 1] = np.where(trained[1:], ids[1:], -100)
            at = end
        positions[number, at:] = np.arange(length - at)
    inputs = {"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(positions), "use_cache": False}
    return {"inputs": inputs, "weight": float((labels != -100).sum()), "labels": torch.from_numpy(labels)}


def loss(logits, batch: dict):
    from pipeline.train.loss import cross_entropy_sum

    return cross_entropy_sum(logits, batch["labels"]), {}


def check_packing(model, token: int) -> None:
    """Raise UserError if this family lets conversations in one row see each other (recurrent state, positions that
    are not read)."""
    import inspect

    import torch

    alone, positions = torch.full((1, 4), token), torch.arange(4)[None]
    different = torch.cat([(alone + 1) % model.config.vocab_size, alone], 1)
    message = f"family {model.config.model_type} cannot keep conversations in one row apart; set packing: false"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(message)
    with torch.no_grad():
        expected = model(input_ids=alone, position_ids=positions, use_cache=False).logits
        found = model(input_ids=different, position_ids=torch.cat([positions, positions], 1), use_cache=False).logits[
            :, 4:
        ]
    if not torch.allclose(expected, found, atol=1e-3, rtol=1e-3):
        raise UserError(message)


def answers(engine, chat, heldout: dict, extra: dict, config: Config) -> dict:
    """Greedy answers to held-out prompts: the share that end their turn, and the mean score by rule where the answer
    is known; `answered` and `checked` are the numbers of answers behind them."""
    from pipeline.rl.rollout import generate
    from pipeline.rl.rules import score
    from pipeline.train.distributed import all_reduce_sum
    from pipeline.train.finetune_data import permutation

    room = getattr(engine.model.config, "max_position_embeddings", None) or 1 << 30
    asked = [
        int(index)
        for index in permutation(0, 0, len(heldout["ids"]))
        if extra["starts"][index] + config.max_new_tokens <= room
    ]
    mine = asked[: config.max_prompts][engine.data_rank :: engine.data_world]
    ended, right, known = 0, 0.0, 0
    with engine.gathered():
        prompts = [heldout["ids"][index][: extra["starts"][index]].tolist() for index in mine]
        completions = generate(
            engine.model,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=0,
            stop_ids=[chat.end_id],
            pad_id=chat.tokenizer.pad_token_id,
            seeds=[0] * len(prompts),
        )
    for index, completion in zip(mine, completions, strict=True):
        ended += completion.stopped
        rule, answer = extra["answers"][index]
        if answer is not None:
            known += 1
            right += score(rule, chat.tokenizer.decode(completion.ids, skip_special_tokens=True), answer)
    ended, right, known, count = all_reduce_sum([float(ended), right, float(known), float(len(mine))])
    found = {"eos_rate": ended / count, "answered": count} if count else {}
    return found | ({"rule": right / known, "checked": known} if known else {})


if __name__ == "__main__":
    from pipeline.core.chain import main

    main("sft")
