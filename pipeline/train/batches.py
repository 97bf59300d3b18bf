"""Packed rows as pretraining reads them: which rows a run has, their batches, and the loss over a batch.

pipeline/pretrain.py trains on them; `alma inspect tokens` and `alma verify parallel` read the same ones.
"""

import numpy as np

from pipeline.core.output import Output
from pipeline.data.tokens import fim
from pipeline.data.tokens.row_sampler import RowSampler
from pipeline.data.tokens.rows import positions_of
from pipeline.train import distributed


def sampler_of(config, store, tokenizer, output: Output | None = None):
    """The rows of a run of stage `pretrain` with this config. With an `output` the tables of best_fit are made by the
    main process and mapped by all, else they are in memory. Collective. Raises UserError for what the tokens do not
    have."""

    def once(make) -> None:
        if output is None or output.is_main:
            make()
        distributed.from_main(None)

    cutter = fim.cutter(config.fim, tokenizer, store.sources, config.seed) if config.fim else None
    changes = [(change.tokens, change.mixture) for change in config.mixture_changes]
    options = {"changes": changes, "packing": config.packing, "fim": cutter}
    return RowSampler(
        store,
        config.sequence_length,
        config.mixture,
        config.seed,
        **options,
        **({"work": output.path / "work" / "tables", "once": once} if output else {}),
    )


def loss_of(sources: list[str], z_loss: float = 0.0):
    """Cross-entropy, beside it the z-loss, and for the meters the nats and tokens of each source and the bytes of
    text that the labels stand for."""
    import torch

    from pipeline.train.loss import IGNORE, Tally, next_token

    def loss_fn(outputs, batch):
        loss, nll, sums = next_token(outputs, batch["labels"], z_loss)
        counts = (batch["labels"] != IGNORE).sum(dim=1)
        of_row = torch.stack([nll.sum(dim=1), counts.to(nll.dtype)])
        of_source = of_row.new_zeros(2, len(sources)).index_add_(1, batch["source"], of_row)
        for source, nats, tokens in zip(sources, *of_source, strict=True):
            sums[Tally("nats", source)] = nats
            sums[Tally("tokens", source)] = tokens
        if "row" in batch:  # each row's own, for train/spike_report.py
            nats_of_row = of_row.new_zeros(batch["rows"]).index_add_(0, batch["row"], of_row[0])
            for number, nats in enumerate(nats_of_row):
                sums[Tally("nats", number)] = nats
        sums[Tally("bytes")] = batch["bytes"].sum()
        return loss, sums

    return loss_fn


def to_batch(rows: list, store, document_mask: bool) -> dict:
    """Rows of T+1 tokens as inputs [B, T] and labels [B, T], shifted by one; -100 where a label does not count.
    `source` [B] is the place in the store's names, `bytes` [B] of the labels."""
    import torch

    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    inputs = {"input_ids": tokens[:, :-1].contiguous()}
    if document_mask:  # transformers reads the borders of documents off the positions
        inputs["position_ids"] = torch.from_numpy(np.stack([positions_of(row) for row in rows]))
    labels = tokens[:, 1:].contiguous()
    size = torch.from_numpy(store.token_bytes[labels.numpy()])
    if any(row.label_mask is not None for row in rows):
        not_counted = torch.from_numpy(np.stack([~row.label_mask for row in rows]))
        labels, size = labels.masked_fill(not_counted, -100), size.masked_fill(not_counted, 0)
    return {
        "inputs": inputs,
        "labels": labels,
        "weight": float((labels != -100).sum()),
        "source": torch.tensor([store.sources.index(row.source) for row in rows]),
        "bytes": size.sum(dim=1),
    }


def heldout_batches(rows: list, store, config, trainer) -> list[dict]:
    """This data rank's share of the fixed rows, in micro-batches of one shape (a pipeline wants that), the last one
    filled up with rows that do not count. Documents are kept apart where training keeps them apart."""
    mine = rows[trainer.data_rank :: trainer.data_world]
    micro = min(config.micro_batch or config.batch_size // trainer.data_world, -(-len(rows) // trainer.data_world))
    batches = []
    for start in range(0, len(mine), micro):
        part = mine[start : start + micro]
        batch = to_batch(part + part[:1] * (micro - len(part)), store, config.document_mask)
        batch["labels"][len(part) :] = -100
        batches.append({**batch, "weight": float(len(part) * config.sequence_length)})
    return batches
