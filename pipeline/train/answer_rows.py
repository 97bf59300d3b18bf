"""Prompts with one answer each as padded micro-batches: what reward, prm, dpo and kto give to a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.chat.record_accounting import Ledger
from pipeline.data.chat.template import Encoded
from pipeline.train.chunked_loss import IGNORE


@dataclass(frozen=True)
class AnswerRow:
    """Token ids of a prompt and its answer, up to the end of the turn."""

    ids: np.ndarray
    start: int
    """Index of the answer's first token, at least 1."""


def answer_problem(encoded: Encoded | str, sequence_length: int) -> str | None:
    """Why an answer cannot be learned from, or None. encoded: as the chat template writes it, or why it cannot."""
    if isinstance(encoded, str):
        return encoded
    return "longer than sequence_length" if len(encoded.ids) > sequence_length else None


def usable_answers(encoded: list, answers: list, split: str, sequence_length: int, ledger: Ledger) -> tuple[list, list]:
    """(token rows, answers) of the answers that can be learned from; the ledger counts the others with their reasons.
    encoded: what Chat gives for each of `answers`."""
    reasons = [answer_problem(row, sequence_length) for row in encoded]
    rows = [row for row, reason in zip(encoded, reasons, strict=True) if reason is None]
    return rows, ledger.keep(answers, split, reasons)


def answer_batch(rows: Sequence[AnswerRow], pad_id: int, length: int | None = None) -> dict:
    """`inputs` [B, T] padded on the right, and `labels` [B, T] of the answers' tokens, already shifted. length: T, by
    default the longest row.

    There is no attention mask: a causal model sees padding on the right only from padding. Without one, attention
    takes its causal path, which computes half as much and needs no [T, T] mask.
    """
    if length is None:
        length = max(len(row.ids) for row in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    labels = np.full((len(rows), length), IGNORE, np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.ids)] = row.ids
        labels[number, row.start - 1 : len(row.ids) - 1] = row.ids[row.start :]
    inputs = {"input_ids": torch.from_numpy(input_ids), "use_cache": False}
    return {"inputs": inputs, "labels": torch.from_numpy(labels)}
