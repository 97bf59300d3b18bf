"""Conversations as token rows and packed micro-batches: what sft learns from."""

import inspect

import numpy as np
import torch

from pipeline.core.errors import UserError
from pipeline.core.output import Output
from pipeline.data.chat.conversations import Conversation, load_conversations
from pipeline.data.chat.record_accounting import Ledger
from pipeline.data.chat.template import Chat, Encoded
from pipeline.train.chunked_loss import IGNORE
from pipeline.train.finetune_data import SPLITS, Arrays, Ragged, report_records, source_numbers
from pipeline.train.loss import next_token


def encoded_conversations(config, chat: Chat, output: Output) -> tuple[Arrays, dict]:
    """Token rows of the conversations of both splits: `ids`, `trained` (which of them carry loss), `source` (of each
    row, by its number in the recipe) and, if a record gives weights, `weights` (of each token in the loss); writes
    report.json. For `encode_once`.

    JSON: `rejected`; `conversations` of both splits, of which some may be several rows; and of each held-out row
    `starts` (index of the last answer's first token) and `answers` (rule and known answer).
    """
    *splits, ledger = load_conversations(config.records(), config.holdout, config.decontaminate)
    arrays: Arrays = {}
    extra: dict = {"conversations": {}}
    tokens, trained_tokens = {}, {}
    for split, conversations in zip(SPLITS, splits, strict=True):
        usable, rows = _encode(conversations, split, chat, config.sequence_length, config.too_long, ledger)
        encoded = [row for several in rows for row in several]
        ids = Ragged.of([row.ids for row in encoded], np.int32)
        trained = Ragged.of([row.trained for row in encoded], np.bool_)
        arrays[f"{split}.ids"], arrays[f"{split}.trained"] = ids, trained
        if any(row.weights is not None for row in encoded):
            weights = [row.trained if row.weights is None else row.weights for row in encoded]
            arrays[f"{split}.weights"] = Ragged.of(weights, np.float32)
        sources = source_numbers(usable, ledger.names())
        arrays[f"{split}.source"] = np.repeat(sources, [len(several) for several in rows])
        tokens[split], trained_tokens[split] = len(ids.values), int(trained.values.sum())
        of_sources = int((sources < len(config.sources)).sum())
        extra["conversations"][split] = of_sources or len(usable)
        if split == "heldout":
            extra["starts"] = [row.start for row in encoded]
            extra["answers"] = _known_answers(usable, rows)
    report_records(ledger, config, output, tokens=tokens, trained_tokens=trained_tokens)
    extra["rejected"] = ledger.rejected()
    return arrays, extra


def _known_answers(conversations: list[Conversation], rows: list[list[Encoded]]) -> list[list]:
    """[rule, known answer] of each row: a record gives that of its last answer."""
    known = []
    for conversation, several in zip(conversations, rows, strict=True):
        known += [[conversation.rule, None]] * (len(several) - 1)
        known.append([conversation.rule, conversation.answer])
    return known


def _encode(
    conversations: list[Conversation], split: str, chat: Chat, sequence_length: int, too_long: str, ledger: Ledger
) -> tuple[list[Conversation], list[list[Encoded]]]:
    """(conversations that can be used, the rows of each); the ledger counts why the others cannot."""
    rows: list[list[Encoded]] = []
    reasons: list[str | None] = []
    for conversation, encoded in zip(conversations, chat.rows([row.dialogue for row in conversations]), strict=True):
        if isinstance(encoded, str):
            reasons.append(encoded)
            continue
        fitting = fitting_rows(encoded, sequence_length, too_long)
        if isinstance(fitting, str):
            reasons.append(fitting)
            continue
        reasons.append(None)
        rows.append(fitting)
        entry = ledger.sources[conversation.source]
        if any(len(row.ids) > sequence_length for row in encoded):
            entry["truncated"] = entry.get("truncated", 0) + 1
        if len(fitting) > 1:
            entry["in_several_rows"] = entry.get("in_several_rows", 0) + 1
    return ledger.keep(conversations, split, reasons), rows


def fitting_rows(rows: list[Encoded], sequence_length: int, too_long: str) -> list[Encoded] | str:
    """The rows of a conversation, none longer than `sequence_length`, or the reason why it is dropped. too_long: as the
    key of stage sft."""
    if all(len(row.ids) <= sequence_length for row in rows):
        return rows
    if too_long == "drop":
        return "longer than sequence_length"
    cut = [row.cut(sequence_length) for row in rows]
    return [row for row in cut if row is not None] or "its answers begin after sequence_length"


def conversation_batch(
    arrays: Arrays, pad_id: int, split: str, rows: list[list[int]], length: int | None = None
) -> dict:
    """A micro-batch of packed rows. rows: the conversations of each. length: of all rows, by default that of the
    longest. Gives input_ids, position_ids that start at 0 in
    each conversation, and labels, already shifted; if records give weights, also those of the labels; and
    `conversations`, how many each row has.

    There is no attention mask: without one, transformers takes the borders of conversations from the positions
    (masking_utils.find_packed_sequence_indices). With a mask of ones, conversations would see each other. Padding at
    the end of a row has positions of its own and no labels.
    """
    all_ids, all_trained = arrays[f"{split}.ids"], arrays[f"{split}.trained"]
    if length is None:
        length = max(sum(len(all_ids[conversation]) for conversation in row) for row in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    labels = np.full((len(rows), length), IGNORE, np.int64)
    positions = np.zeros((len(rows), length), np.int64)
    all_weights = arrays.get(f"{split}.weights")
    label_weights = np.zeros((len(rows), length), np.float32)
    for number, row in enumerate(rows):
        start = 0
        for conversation in row:
            ids, trained = all_ids[conversation], all_trained[conversation]
            end = start + len(ids)
            input_ids[number, start:end] = ids
            positions[number, start:end] = np.arange(len(ids))
            labels[number, start : end - 1] = np.where(trained[1:], ids[1:], IGNORE)
            if all_weights is not None:
                label_weights[number, start : end - 1] = all_weights[conversation][1:]
            start = end
        positions[number, start:] = np.arange(length - start)
    inputs = {"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(positions), "use_cache": False}
    batch = {"inputs": inputs, "weight": float((labels != IGNORE).sum()), "labels": torch.from_numpy(labels)}
    batch["conversations"] = [len(row) for row in rows]
    if all_weights is not None:
        batch["weight"] = float(label_weights.sum(dtype=np.float64))
        batch["label_weights"] = torch.from_numpy(label_weights)
    return batch


def conversation_losses(outputs, batch: dict) -> torch.Tensor:
    """(loss, weight) of each conversation of a micro-batch, row by row: the loss in nats, summed over its answer tokens
    with their weights. Shape: [conversations, 2], fp32."""
    _, losses_BT, _ = next_token(outputs, batch["labels"])
    return conversation_sums(losses_BT, batch)


def weights_of(batch: dict) -> torch.Tensor:
    """The weight of each label of a micro-batch in the loss, [B, T]; 0 where there is none."""
    return batch.get("label_weights", (batch["labels"] != IGNORE).float())


def conversation_sums(losses_BT: torch.Tensor, batch: dict) -> torch.Tensor:
    """(loss, weight) of each conversation of a micro-batch from the losses of its tokens, [conversations, 2]."""
    weights_BT = weights_of(batch)
    numbers = []
    # Positions start at 0 in each conversation, and in the padding at a row's end.
    numbers_BT = (batch["inputs"]["position_ids"] == 0).cumsum(1) - 1
    for row, count in enumerate(batch["conversations"]):
        sums = torch.zeros(int(numbers_BT[row].max()) + 1, 2, device=losses_BT.device)
        sums.index_add_(0, numbers_BT[row], torch.stack([losses_BT[row] * weights_BT[row], weights_BT[row]], 1))
        numbers.append(sums[:count])
    return torch.cat(numbers)


def check_packing(model, token: int) -> None:
    """Raise UserError if this family lets conversations in one row see each other: recurrent state, or positions that
    are not read. token: any token of the vocabulary."""
    message = f"family {model.config.model_type} cannot keep conversations in one row apart; set packing: false"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(message)
    alone, positions = torch.full((1, 4), token), torch.arange(4)[None]
    other = (alone + 1) % model.config.vocab_size
    packed, packed_positions = torch.cat([other, alone], 1), torch.cat([positions, positions], 1)
    with torch.no_grad():
        expected = model(input_ids=alone, position_ids=positions, use_cache=False).logits
        logits = model(input_ids=packed, position_ids=packed_positions, use_cache=False).logits
    if not torch.allclose(expected, logits[:, 4:], atol=1e-3, rtol=1e-3):
        raise UserError(message)
