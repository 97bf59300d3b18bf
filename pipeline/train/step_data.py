"""Answers with judged steps as token rows and micro-batches: what prm learns from."""

import numpy as np
import torch

from pipeline.core.output import Output
from pipeline.core.terminal import plural
from pipeline.data.chat.conversations import Stepped, load_stepped
from pipeline.data.chat.record_accounting import Ledger
from pipeline.data.chat.template import Chat
from pipeline.train.answer_rows import AnswerRow, answer_batch, usable_answers
from pipeline.train.finetune_config import FinetuneConfig
from pipeline.train.finetune_data import SPLITS, Arrays, Counts, Ragged, report_records, source_numbers
from pipeline.train.run_summary import Work


def encoded_steps(config: FinetuneConfig, separator: str, chat: Chat, output: Output) -> tuple[Arrays, dict]:
    """Token rows of the answers of both splits: `ids` (prompt and answer, up to the end of the turn), `ends` (places of
    the last token of each step), `labels` (is the step right), `source` (its number, see Ledger.names); writes
    report.json. For `encode_once`.

    An answer that is longer than sequence_length is dropped, so that no answer loses its last steps.
    """
    *splits, ledger = load_stepped(config.records(), config.holdout, config.decontaminate)
    arrays: Arrays = {}
    steps = {}
    for split, answers in zip(SPLITS, splits, strict=True):
        arrays |= encode_steps(answers, split, chat, separator, config.sequence_length, ledger)
        steps[split] = len(arrays[f"{split}.ends"].values)
    report_records(ledger, config, output, steps=steps)
    return arrays, {"rejected": ledger.rejected()}


def encode_steps(
    answers: list[Stepped], split: str, chat: Chat, separator: str, sequence_length: int, ledger: Ledger
) -> Arrays:
    """separator: between the steps of an answer."""
    encoded = chat.steps([(answer.dialogue(separator), answer.pieces(separator)) for answer in answers])
    rows, usable = usable_answers(encoded, answers, split, sequence_length, ledger)
    return {
        f"{split}.source": source_numbers(usable, ledger.names()),
        f"{split}.ids": Ragged.of([row.ids for row in rows], np.int32),
        f"{split}.ends": Ragged.of([row.ends for row in rows], np.int64),
        f"{split}.labels": Ragged.of([answer.labels for answer in usable], np.bool_),
    }


def step_counts(arrays: Arrays, extra: dict, sets: dict[str, range]) -> Counts:
    """sets: of held-out answers."""
    return Counts("answer", len(arrays["train.ids"]), len(sets[""]), extra["rejected"])


def step_work(config: FinetuneConfig, arrays: Arrays) -> Work:
    """What the stage computes."""
    lengths = arrays["train.ids"].lengths
    count, taken = len(lengths), config.steps * config.batch_size
    data = (
        f"{plural(config.steps, 'step', ',')} x {plural(config.batch_size, 'answer')} of at most"
        f" {config.sequence_length} tokens: {taken / count:.3g} epochs of {plural(count, 'answer', ',')} with"
        f" {plural(len(arrays['train.ends'].values), 'judged step', ',')}"
    )
    return Work(data, tokens=taken * float(lengths.mean()))


def step_batch(arrays: Arrays, pad_id: int, split: str, indices: list[int], length: int | None = None) -> dict:
    """A micro-batch of B answers with S steps: inputs [B, T], `step_places` and `step_labels` [S] (loss_preference.py),
    and `steps`, how many each answer has. The loss is averaged over steps. length: T, by default that of the longest
    row."""
    rows = [AnswerRow(arrays[f"{split}.ids"][index], 1) for index in indices]
    batch = {"inputs": answer_batch(rows, pad_id, length)["inputs"]}
    width = batch["inputs"]["input_ids"].shape[1]
    places = [row * width + arrays[f"{split}.ends"][index] for row, index in enumerate(indices)]
    labels = [arrays[f"{split}.labels"][index] for index in indices]
    batch["step_places"] = torch.from_numpy(np.concatenate(places))
    batch["step_labels"] = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    batch["steps"] = [len(row) for row in labels]
    batch["weight"] = float(len(batch["step_labels"]))
    return batch
