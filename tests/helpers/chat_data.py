"""Sources of conversations for tests."""

import json
import random

from pipeline.data.chat.chat_sources import ChatSource, PreferenceSource
from pipeline.data.chat.conversations import load_conversations


def source_of(path, records, kind=ChatSource, **keys):
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records),
        encoding="utf-8",
    )
    return {"s": kind(path=str(path), **keys)}


def filler(count=40, seed=0, length=12):
    """Distinct rows that are near duplicates of nothing, so that both splits have some."""
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefghijklmnop", k=6)) for _ in range(400)]
    return [
        {"instruction": " ".join(source.choices(words, k=length)), "output": " ".join(source.choices(words, k=length))}
        for _ in range(count)
    ]


def loaded(path, records, load=load_conversations, kind=ChatSource, **keys):
    """(rows by place, ledger) of records that are put after rows that do no harm."""
    extra = [{**row, "chosen": "yes", "rejected": "no"} for row in filler()] if kind is PreferenceSource else filler()
    train, heldout, ledger = load(source_of(path, [*records, *extra], kind, **keys), 0.3)
    return {int(row.place.rpartition(":")[2]): row for row in train + heldout}, ledger
