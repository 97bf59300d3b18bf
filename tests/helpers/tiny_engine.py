"""A tiny model, its batches, and a training stage's config for tests of the engines."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.core.output import Output
from pipeline.models.initial_values import initialise
from pipeline.train.chunked_loss import TokenLosses
from pipeline.train.config import TrainConfig
from pipeline.train.loss import cross_entropy_sum

VOCABULARY, LENGTH, ROWS = 61, 12, 8


def tiny(**changes):
    keys = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    keys |= {"max_position_embeddings": 64, **changes}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **keys))
    initialise(model, seed=0)
    return model


def config(**changes) -> TrainConfig:
    keys = {
        "kind": "pretrain",
        "steps": 6,
        "batch_size": ROWS,
        "sequence_length": LENGTH,
        "precision": "fp32",
        "seed": 0,
        "optimizer": {"lr": 3e-3, "max_grad_norm": 0.5},
        "save": {"every_steps": 2},
    }
    return TrainConfig(**{**keys, **changes})


def rows(step: int):
    """Random rows of which the first tokens carry no loss, more in each row, so that micro-batches differ in weight."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    labels = tokens[:, 1:].clone()
    for row in range(ROWS):
        labels[row, : (row + step) % LENGTH] = -100
    return tokens[:, :-1], labels


def batch_of(step: int, part) -> dict:
    ids, labels = (tensor[part.start % ROWS : part.start % ROWS + len(part)] for tensor in rows(step))
    return {"inputs": {"input_ids": ids}, "labels": labels, "weight": float((labels >= 0).sum())}


def loss_fn(logits, batch):
    if isinstance(logits, TokenLosses):
        return logits.total, {}
    right = ((logits.argmax(-1) == batch["labels"]) & (batch["labels"] >= 0)).sum()
    return cross_entropy_sum(logits, batch["labels"]), {"accuracy": right}


INFINITE = "infinite loss, finite gradient"


def spoiled(logits, batch):
    """The loss with the harm that the batch names."""
    loss, sums = loss_fn(logits, batch)
    if batch.get("spoil") == "nan loss":
        loss = loss * float("nan")
    elif batch.get("spoil") == INFINITE:
        loss = loss + float("inf")
    elif batch.get("spoil") == "nan gradient":
        (logits.total if isinstance(logits, TokenLosses) else logits).register_hook(
            lambda gradient: gradient * float("nan")
        )
    return loss, sums


def output_in(folder) -> Output:
    return Output(folder / "run", "pretrain", "pretrain", {"a": 1}).open(config={}, parents={})


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
