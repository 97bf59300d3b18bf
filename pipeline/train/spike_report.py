"""The rows of a step that should not have been: which documents, what text, and which of them the loss came from."""

from collections.abc import Callable

import torch

from pipeline.data.tokens.rows import documents_of
from pipeline.train import distributed, phases
from pipeline.train.loss import Tally

LONGEST = 4000  # characters of a row's text that are written


def describer(
    trainer, batches: Callable[[int], list[dict]], store, sampler, tokenizer, config
) -> Callable[[int], list[dict]]:
    """describe(batch) -> every row of the global batch, in order; empty on all but the main process. Collective.

    A row has: row (global index), source, epoch, window (which of the source), loss (mean nats a label under the
    weights of now, dropout off), documents (id, first and number of tokens in the row, tokens of the document before
    them; see Span in data/tokens/rows.py) and the decoded text. Rows are a function of their index, so the main process
    reads those of all data ranks itself; the losses come from one forward pass.
    """

    def losses(batch: int) -> list[float]:
        at = trainer.data_rank * (config.batch_size // trainer.data_world)
        mine = []
        for micro in batches(batch):
            count = len(micro["labels"])
            mine.append({**micro, "row": torch.arange(at, at + count), "rows": config.batch_size})
            at += count
        found = trainer.evaluate(mine)
        return [found[Tally("nats", number)] * found["weight"] for number in range(config.batch_size)]

    def describe(batch: int) -> list[dict]:
        phases.enter("evaluate")
        nats = losses(batch)
        rows = []
        for number in range(config.batch_size if distributed.is_main() else 0):
            index = batch * config.batch_size + number
            row = sampler.row(index)
            documents = documents_of(row, store)
            labels = config.sequence_length if row.label_mask is None else int(row.label_mask.sum())
            text = tokenizer.decode(row.tokens.tolist(), skip_special_tokens=False)
            rows.append(
                {
                    "row": index,
                    "source": row.source,
                    "epoch": row.epoch,
                    "window": row.index,
                    "loss": nats[number] / max(labels, 1),
                    "documents": documents,
                    "text": text[:LONGEST],
                }
            )
        return rows

    return describe
