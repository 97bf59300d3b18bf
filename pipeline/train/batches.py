"""Packed rows as pretraining reads them: which rows a run has, their batches, and the loss of a batch.

pipeline/pretrain.py trains on them; `alma inspect tokens` and `alma verify parallel` read the same rows.
"""

import numpy as np

from pipeline.core import distributed
from pipeline.core.output import Output
from pipeline.data.tokens import fim
from pipeline.data.tokens.row_sampler import RowSampler
from pipeline.data.tokens.rows import positions_of


def sampler_of(config, store, tokenizer, output: Output | None = None) -> RowSampler:
    """The rows of a pretraining run with this config. With an `output` the main process writes the tables of best_fit
    and all processes map them; without one they are in memory. Collective. Raises UserError for what the tokens lack.
    """

    def on_main_process(write_tables) -> None:
        if output is None or output.is_main:
            write_tables()
        distributed.from_main(None)

    options = {"packing": config.packing}
    options["changes"] = [(change.tokens, change.mixture) for change in config.mixture_changes]
    options["fim"] = fim.cutter(config.fim, tokenizer, store.sources, config.seed) if config.fim else None
    if output:
        options["work"] = output.path / "work" / "tables"
        options["once"] = on_main_process
    return RowSampler(store, config.sequence_length, config.mixture, config.seed, **options)


def loss_of(sources: list[str], z_loss: float = 0.0):
    """The loss function of pretraining: cross-entropy and z-loss, and for the metrics nats and tokens of each source
    and the bytes of text that the labels spell."""
    import torch

    from pipeline.train.loss import IGNORE, Tally, next_token

    def loss_fn(outputs, batch):
        loss, nll_BT, sums = next_token(outputs, batch["labels"], z_loss)
        num_labels = (batch["labels"] != IGNORE).sum(dim=1)
        per_row = torch.stack([nll_BT.sum(dim=1), num_labels.to(nll_BT.dtype)])
        per_source = per_row.new_zeros(2, len(sources)).index_add_(1, batch["source"], per_row)
        for source, nats, tokens in zip(sources, *per_source, strict=True):
            sums[Tally("nats", source)] = nats
            sums[Tally("tokens", source)] = tokens
        if "row" in batch:  # loss of each row, for train/spike_report.py
            nats_per_row = per_row.new_zeros(batch["rows"]).index_add_(0, batch["row"], per_row[0])
            for number, nats in enumerate(nats_per_row):
                sums[Tally("nats", number)] = nats
        sums[Tally("bytes")] = batch["bytes"].sum()
        return loss, sums

    return loss_fn


def to_batch(rows: list, store, document_mask: bool) -> dict:
    """Rows of T+1 tokens as inputs [B, T] and labels [B, T], shifted by one; -100 where a label does not count.
    `source` [B] is the index in the store's names, `bytes` [B] those of the labels."""
    import torch

    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    inputs = {"input_ids": tokens[:, :-1].contiguous()}
    if document_mask:  # transformers derives the borders of documents from the positions
        inputs["position_ids"] = torch.from_numpy(np.stack([positions_of(row) for row in rows]))
    labels = tokens[:, 1:].contiguous()
    label_bytes = torch.from_numpy(store.token_bytes[labels.numpy()])
    if any(row.label_mask is not None for row in rows):
        ignored = torch.from_numpy(np.stack([~row.label_mask for row in rows]))
        labels = labels.masked_fill(ignored, -100)
        label_bytes = label_bytes.masked_fill(ignored, 0)
    return {
        "inputs": inputs,
        "labels": labels,
        "weight": float((labels != -100).sum()),
        "source": torch.tensor([store.sources.index(row.source) for row in rows]),
        "bytes": label_bytes.sum(dim=1),
    }


def heldout_batches(rows: list, store, config, engine) -> list[dict]:
    """This data rank's share of the fixed rows, in micro-batches of one shape, as a pipeline needs them: the last one
    is filled with rows that do not count. Documents are kept apart if training keeps them apart."""
    own_rows = rows[engine.data_rank :: engine.data_world]
    most_rows = -(-len(rows) // engine.data_world)
    micro = min(config.micro_batch or config.batch_size // engine.data_world, most_rows)
    batches = []
    for start in range(0, len(own_rows), micro):
        part = own_rows[start : start + micro]
        batch = to_batch(part + part[:1] * (micro - len(part)), store, config.document_mask)
        batch["labels"][len(part) :] = -100
        batch["weight"] = float(len(part) * config.sequence_length)
        batches.append(batch)
    return batches
