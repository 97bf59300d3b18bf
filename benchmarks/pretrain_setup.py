"""Model, tokens and batches of benchmarks/pretrain.py, the same for all that it compares."""

import json
from pathlib import Path

THREADS = 2
LR = 3e-4


def sizes(quick: bool) -> dict:
    """Model, batch and windows."""
    if quick:
        return {
            "layers": 2,
            "width": 128,
            "inner": 344,
            "heads": 4,
            "vocabulary": 2048,
            "rows": 4,
            "length": 128,
            "window": 6,
            "rounds": 2,
        }
    return {
        "layers": 6,
        "width": 384,
        "inner": 1024,
        "heads": 6,
        "vocabulary": 8192,
        "rows": 8,
        "length": 512,
        "window": 10,
        "rounds": 8,
    }


def model_block(size: dict) -> dict:
    return {
        "family": "llama",
        "hidden_size": size["width"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"],
    }


def write_tokens(folder: Path, size: dict) -> None:
    """Random tokens in the layout of stage pack: speed does not depend on what is read."""
    import numpy as np

    draw = np.random.Generator(np.random.PCG64(0))
    splits: dict = {}
    for split, rows in (("train", 4000), ("heldout", 8)):
        tokens = draw.integers(3, size["vocabulary"], rows * size["length"] + 1).astype(np.uint16)
        ends = np.append(np.arange(999, len(tokens) - 1, 1000), len(tokens) - 1) + 1
        tokens[ends - 1] = 1
        (folder / split).mkdir(parents=True)
        np.save(folder / split / "a.tokens.npy", tokens)
        np.save(folder / split / "a.documents.npy", np.stack([ends, 4 * np.diff(ends, prepend=0)], 1).astype(np.int64))
        np.save(folder / split / "a.ids.npy", np.full(len(ends), 48, np.uint8))
        np.save(folder / split / "a.id_ends.npy", np.arange(1, len(ends) + 1))
        splits[split] = {
            "a": [
                {
                    "file": f"{split}/a",
                    "tokens": len(tokens),
                    "documents": len(ends),
                    "bytes": 4 * len(tokens),
                    "id_bytes": len(ends),
                }
            ]
        }
    np.save(folder / "token_bytes.npy", np.full(size["vocabulary"], 4, np.int32))
    (folder / "index.json").write_text(
        json.dumps({"vocab_size": size["vocabulary"], "eos_id": 1, "dtype": "uint16", "splits": splits})
    )


class Vocabulary:
    """What a model's configuration asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size


def new_model(size: dict):
    import torch

    from pipeline.models import build

    torch.set_num_threads(THREADS)
    return build.new(model_block(size), Vocabulary(size["vocabulary"]), size["length"], seed=0)


def sampler_of(folder: Path, size: dict):
    from pipeline.data.tokens.row_sampler import RowSampler
    from pipeline.data.tokens.store import TokenStore

    store = TokenStore(folder / "tokens")
    return store, RowSampler(store, size["length"], None, 0)
