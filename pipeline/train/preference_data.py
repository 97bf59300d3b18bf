"""Pairs of answers as token rows and micro-batches: what reward and dpo learn from."""

import numpy as np
import torch

from pipeline.core.output import Output
from pipeline.core.terminal import plural
from pipeline.data.chat.conversations import Pair, load_pairs
from pipeline.data.chat.record_accounting import Ledger
from pipeline.data.chat.template import Chat, Encoded
from pipeline.train.answer_rows import AnswerRow, answer_batch
from pipeline.train.finetune_config import FinetuneConfig
from pipeline.train.finetune_data import SPLITS, Arrays, Counts, Ragged, report_records, source_numbers
from pipeline.train.run_summary import Work


def encoded_pairs(config: FinetuneConfig, chat: Chat, output: Output, margins: bool) -> tuple[Arrays, dict]:
    """Token rows of the pairs of both splits, as `encode_pairs` has them; writes report.json. For `encode_once`."""
    train, heldout, ledger = load_pairs(config.records(), config.holdout, config.decontaminate)
    arrays = encode_pairs(train, "train", chat, config.sequence_length, ledger, margins)
    arrays |= encode_pairs(heldout, "heldout", chat, config.sequence_length, ledger, margins)
    report_records(ledger, config, output)
    return arrays, {"rejected": ledger.rejected()}


def encode_pairs(
    pairs: list[Pair], split: str, chat: Chat, sequence_length: int, ledger: Ledger, margins: bool = True
) -> Arrays:
    """Token rows of pairs: `chosen` and `rejected` (prompt and answer, up to the end of the turn), `start` (index of
    the answer's first token), `margin`, `source` (its number, see Ledger.names).

    A pair that is longer than sequence_length is dropped: a truncated answer is not the answer that was compared.
    Without `margins` a pair that has one is dropped, because the stage's loss could not use it.
    """
    conversations = []
    for pair in pairs:
        conversations += pair.dialogues
    encoded = chat.encode(conversations)
    rows, reasons = [], []
    for pair, chosen, rejected in zip(pairs, encoded[::2], encoded[1::2], strict=True):
        reason = pair_problem(pair, chosen, rejected, sequence_length, margins)
        reasons.append(reason)
        if reason is None:
            rows.append((chosen.ids, rejected.ids, chosen.start))
    usable = ledger.keep(pairs, split, reasons)
    return {
        f"{split}.source": source_numbers(usable, ledger.names()),
        f"{split}.chosen": Ragged.of([chosen for chosen, _, _ in rows], np.int32),
        f"{split}.rejected": Ragged.of([rejected for _, rejected, _ in rows], np.int32),
        f"{split}.start": np.array([start for _, _, start in rows], np.int64),
        f"{split}.margin": np.array([pair.margin for pair in usable], np.float32),
    }


def pair_problem(
    pair: Pair, chosen: Encoded | str, rejected: Encoded | str, sequence_length: int, margins: bool
) -> str | None:
    """Why a pair cannot be learned from, or None. chosen, rejected: as the chat template encodes them, or why it
    cannot."""
    if isinstance(chosen, str):
        return chosen
    if isinstance(rejected, str):
        return rejected
    if pair.margin and not margins:
        return "has a margin, which this loss cannot use; give the source `ignore: [margin]`"
    if max(len(chosen.ids), len(rejected.ids)) > sequence_length:
        return "longer than sequence_length"
    if chosen.ids == rejected.ids:
        return "chosen and rejected are the same tokens"
    if chosen.ids[: chosen.start] != rejected.ids[: rejected.start]:
        return "the chat template writes its prompt differently for the two answers"
    return None


def pair_work(config: FinetuneConfig, arrays: Arrays, reference: bool = False) -> Work:
    """What a stage that learns from pairs computes. `reference`: each pair that is used is also run forward once with
    the weights that the stage starts from."""
    lengths = {split: arrays[f"{split}.chosen"].lengths + arrays[f"{split}.rejected"].lengths for split in SPLITS}
    count, taken = len(lengths["train"]), config.steps * config.batch_size
    mean = float(lengths["train"].mean())
    forward_tokens = 0.0
    if reference:
        forward_tokens = mean * min(taken, count) + float(lengths["heldout"].sum())
    data = (
        f"{plural(config.steps, 'step', ',')} x {plural(config.batch_size, 'pair')} of answers of at most"
        f" {config.sequence_length} tokens: {taken / count:.3g} epochs of {plural(count, 'pair', ',')}"
    )
    return Work(data, tokens=taken * mean, forward_tokens=forward_tokens)


def pair_rows(arrays: Arrays, split: str, indices) -> list[AnswerRow]:
    """Both answers of pairs: all chosen ones, then all rejected ones."""
    rows = []
    for answer in ("chosen", "rejected"):
        for index in indices:
            rows.append(AnswerRow(arrays[f"{split}.{answer}"][index], int(arrays[f"{split}.start"][index])))
    return rows


def pair_batch(arrays: Arrays, pad_id: int, split: str, indices, length: int | None = None) -> dict:
    """A micro-batch of pairs: inputs and labels [2B, T], chosen first; margin [B]. length: T, by default that of the
    longest row."""
    batch = answer_batch(pair_rows(arrays, split, indices), pad_id, length)
    batch["weight"] = float(len(indices))
    batch["margin"] = torch.from_numpy(np.asarray(arrays[f"{split}.margin"][list(indices)], np.float32))
    return batch


def pair_length(arrays: Arrays, split: str, index: int) -> int:
    """Tokens of the longer answer of a pair, with its prompt."""
    return max(len(arrays[f"{split}.chosen"][index]), len(arrays[f"{split}.rejected"][index]))


def pair_lengths(arrays: Arrays) -> np.ndarray:
    """`pair_length` of each pair to train on."""
    return np.maximum(arrays["train.chosen"].lengths, arrays["train.rejected"].lengths)


def pair_counts(arrays: Arrays, extra: dict, sets: dict[str, range]) -> Counts:
    """sets: of held-out pairs."""
    return Counts("pair", len(arrays["train.start"]), len(sets[""]), extra["rejected"])
