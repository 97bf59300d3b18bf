"""Judged answers as token rows and micro-batches: what kto learns from."""

import numpy as np
import torch

from pipeline.core.output import Output
from pipeline.core.seeds import derive
from pipeline.core.terminal import plural
from pipeline.data.chat.conversations import Labelled, load_labelled
from pipeline.data.chat.record_accounting import Ledger
from pipeline.data.chat.template import Chat
from pipeline.train.answer_rows import AnswerRow, answer_batch, usable_answers
from pipeline.train.finetune_config import FinetuneConfig
from pipeline.train.finetune_data import SPLITS, Arrays, Counts, Ragged, report_records, source_numbers
from pipeline.train.record_order import permutation
from pipeline.train.run_summary import Work


def encoded_answers(config: FinetuneConfig, chat: Chat, output: Output) -> tuple[Arrays, dict]:
    """Token rows of the judged answers of both splits: `ids` (prompt and answer, up to the end of the turn), `start`
    (index of the answer's first token), `label` (is it a good one), `source` (its number, see Ledger.names); writes
    report.json. For `encode_once`.

    An answer that is longer than sequence_length is dropped: what was judged is the complete one.
    """
    *splits, ledger = load_labelled(config.records(), config.holdout, config.decontaminate)
    arrays: Arrays = {}
    for split, answers in zip(SPLITS, splits, strict=True):
        arrays |= encode_answers(answers, split, chat, config.sequence_length, ledger)
    report_records(ledger, config, output)
    return arrays, {"rejected": ledger.rejected()}


def encode_answers(answers: list[Labelled], split: str, chat: Chat, sequence_length: int, ledger: Ledger) -> Arrays:
    encoded = chat.encode([answer.dialogue for answer in answers])
    rows, usable = usable_answers(encoded, answers, split, sequence_length, ledger)
    return {
        f"{split}.source": source_numbers(usable, ledger.names()),
        f"{split}.ids": Ragged.of([row.ids for row in rows], np.int32),
        f"{split}.start": np.array([row.start for row in rows], np.int64),
        f"{split}.label": np.array([answer.label for answer in usable], np.bool_),
    }


def answer_counts(arrays: Arrays, extra: dict, sets: dict[str, range]) -> Counts:
    """sets: of held-out answers."""
    return Counts("answer", len(arrays["train.start"]), len(sets[""]), extra["rejected"])


def answer_work(config: FinetuneConfig, arrays: Arrays, mismatched: bool) -> Work:
    """What the stage computes. mismatched: each step and evaluation also runs as many mismatched answers forward, and
    so does the reference."""
    lengths = arrays["train.ids"].lengths
    count, taken = len(lengths), config.steps * config.batch_size
    mean = float(lengths.mean())
    passes = 2 if mismatched else 1
    forward_tokens = passes * (mean * min(taken, count) + float(arrays["heldout.ids"].lengths.sum()))
    forward_tokens += mean * taken if mismatched else 0.0
    data = (
        f"{plural(config.steps, 'step', ',')} x {plural(config.batch_size, 'answer')} of at most"
        f" {config.sequence_length} tokens: {taken / count:.3g} epochs of {plural(count, 'answer', ',')}"
    )
    return Work(data, tokens=taken * mean, forward_tokens=forward_tokens)


def answer_row(arrays: Arrays, split: str, index: int) -> AnswerRow:
    return AnswerRow(arrays[f"{split}.ids"][index], int(arrays[f"{split}.start"][index]))


def labelled_batch(arrays: Arrays, pad_id: int, split: str, indices, length: int | None = None) -> dict:
    """A micro-batch of judged answers: inputs and labels [B, T], is_desirable [B]. length: T, by default that of the
    longest row."""
    batch = answer_batch([answer_row(arrays, split, index) for index in indices], pad_id, length)
    batch["weight"] = float(len(indices))
    batch["is_desirable"] = torch.from_numpy(np.asarray(arrays[f"{split}.label"][list(indices)]))
    return batch


# ---- prompts with another prompt's answer ----------------------------------------------------------------------------


def partners(seed: int, split: str, count: int) -> np.ndarray:
    """For each of `count` rows, the row whose answer it is paired with: the one before it in a random order of all,
    which is a function of (seed, split). Never itself, if there are several."""
    order = permutation(derive(seed, "mismatched", split), 0, count)
    result = np.empty(count, np.int64)
    result[order] = np.roll(order, 1)
    return result


def mismatched_row(arrays: Arrays, split: str, index: int, partner: int, most: int) -> AnswerRow:
    """The prompt of one row with the answer of another, cut to `most` tokens."""
    prompt, answer = answer_row(arrays, split, index), answer_row(arrays, split, partner)
    ids = np.concatenate([prompt.ids[: prompt.start], answer.ids[answer.start :]])
    return AnswerRow(ids[:most], prompt.start)
