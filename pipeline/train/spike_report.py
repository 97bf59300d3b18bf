"""The rows of a step that was not applied: which documents, what text, and which rows the loss came from."""

from collections.abc import Callable

import torch

from pipeline.core import distributed
from pipeline.data.tokens.rows import documents_of
from pipeline.train import phases
from pipeline.train.loss import Tally

LONGEST_TEXT = 4000  # characters of a row's text that are written


def describer(
    engine, batches: Callable[[int], list[dict]], store, sampler, tokenizer, config
) -> Callable[[int], list[dict]]:
    """describe(batch) -> every row of the global batch, in order; empty on all but the main process. Collective.

    A row has: row (global index), source, epoch, window (which row of the source), loss (mean nats per label under the
    current weights, dropout off), documents (see documents_of in data/tokens/rows.py) and the decoded text. Rows are a
    function of their index, so the main process reads those of all data ranks itself; the losses come from one forward
    pass.
    """

    def nats_per_row(batch: int) -> list[float]:
        first = engine.data_rank * (config.batch_size // engine.data_world)
        numbered = []
        for micro_batch in batches(batch):
            count = len(micro_batch["labels"])
            rows = torch.arange(first, first + count)
            numbered.append(micro_batch | {"row": rows, "rows": config.batch_size})
            first += count
        means = engine.evaluate(numbered)
        return [means[Tally("nats", number)] * means["weight"] for number in range(config.batch_size)]

    def describe(batch: int) -> list[dict]:
        phases.enter("evaluate")
        nats = nats_per_row(batch)
        if not distributed.is_main():
            return []
        descriptions = []
        for number in range(config.batch_size):
            index = batch * config.batch_size + number
            row = sampler.row(index)
            num_labels = config.sequence_length if row.label_mask is None else int(row.label_mask.sum())
            text = tokenizer.decode(row.tokens.tolist(), skip_special_tokens=False)
            descriptions.append(
                {
                    "row": index,
                    "source": row.source,
                    "epoch": row.epoch,
                    "window": row.index,
                    "loss": nats[number] / max(num_labels, 1),
                    "documents": documents_of(row, store),
                    "text": text[:LONGEST_TEXT],
                }
            )
        return descriptions

    return describe
