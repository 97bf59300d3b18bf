"""Batches and fresh models of every supported family."""

import families
import torch

from pipeline.models import build
from pipeline.train.loss import cross_entropy_sum

VOCABULARY, LENGTH, ROWS = 260, 16, 4


def loss_fn(logits, batch):
    return cross_entropy_sum(logits, batch["labels"]), {}


def batch_of(rows: range, seed: int = 0) -> dict:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))[
        rows.start : rows.stop
    ]
    return {"inputs": {"input_ids": ids[:, :-1]}, "labels": ids[:, 1:], "weight": float(len(ids) * LENGTH)}


MUP = " mu-P"


def fresh(name: str, seed: int = 1, **options):
    """The tiny copy of a recipe's model; of `llama-7b mu-P` at four times the base width."""
    block = families.shrunken(name.removesuffix(MUP)) | ({"mup": {"base_width": 8}} if name.endswith(MUP) else {})
    return build.new(block, families.Sized(VOCABULARY), LENGTH, seed, **options)
