"""Packed conversations do not see each other, and families that cannot keep them apart are refused."""

import numpy as np
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.train.conversation_data import check_packing, conversation_batch, conversation_losses
from pipeline.train.finetune_data import Ragged


def tiny(family, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    keys = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    keys |= {"intermediate_size": 64, "num_key_value_heads": 2} if family in ("llama", "qwen3") else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys, **changes), dtype=torch.float32).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_packed_conversations_do_not_see_each_other(family, attention):
    model = tiny(family, attn_implementation=attention)
    source = np.random.default_rng(0)
    rows = [source.integers(1, 97, size).tolist() for size in (9, 5, 14, 3, 7)]
    trained = [[True] * len(row) for row in rows]
    arrays = {"train.ids": Ragged.of(rows, np.int32), "train.trained": Ragged.of(trained, np.bool_)}
    made = conversation_batch(arrays, 0, "train", [[0, 1, 2], [3, 4]])
    assert made["weight"] == sum(len(row) - 1 for row in rows)
    with torch.no_grad():
        packed = model(**made["inputs"]).logits
        at = {0: (0, 0), 1: (0, 9), 2: (0, 14), 3: (1, 0), 4: (1, 3)}
        for index, (row, start) in at.items():
            alone = model(input_ids=torch.tensor([rows[index]])).logits[0]
            torch.testing.assert_close(packed[row, start : start + len(rows[index])], alone, atol=1e-5, rtol=1e-5)
            labels = made["labels"][row, start : start + len(rows[index])].tolist()
            assert labels == [*rows[index][1:], -100]
        # the trap: a mask of ones beside the positions
        leaking = model(**made["inputs"], attention_mask=torch.ones_like(made["inputs"]["input_ids"])).logits
        assert not torch.allclose(leaking[0, 9:14], packed[0, 9:14], atol=1e-3)


def test_losses_of_conversations():
    """Each alone by transformers, which averages over the answer's tokens; also where a record gives weights."""
    model = tiny("llama")
    source = np.random.default_rng(0)
    rows = [source.integers(1, 97, size).tolist() for size in (9, 5, 14, 3)]
    trained = [[False, *(source.random(len(row) - 1) < 0.6)] for row in rows]
    trained[3] = [False, False, False]
    arrays = {"heldout.ids": Ragged.of(rows, np.int32), "heldout.trained": Ragged.of(trained, np.bool_)}
    packed = [[2, 0], [3, 1]]
    for weights in (None, [[value * 0.5 for value in row] for row in trained]):
        if weights:
            arrays["heldout.weights"] = Ragged.of(weights, np.float32)
        batch = conversation_batch(arrays, 0, "heldout", packed)
        with torch.no_grad():
            numbers = conversation_losses(model(**batch["inputs"]).logits, batch)
        for conversation, (total, weight) in zip([2, 0, 3, 1], numbers.tolist(), strict=True):
            labels = [token if kept else -100 for token, kept in zip(rows[conversation], trained[conversation])]
            scale, count = (0.5 if weights else 1), sum(trained[conversation])
            assert weight == scale * count
            if count:
                loss = model(input_ids=torch.tensor([rows[conversation]]), labels=torch.tensor([labels])).loss
                assert total == pytest.approx(loss.item() * weight, rel=1e-5)
        assert float(numbers[:, 1].sum()) == batch["weight"]


def test_families_that_cannot_pack_are_refused():
    for family in ("llama", "gpt2"):
        check_packing(tiny(family), 5)
    with pytest.raises(UserError, match="bloom cannot keep conversations in one row apart; set packing: false"):
        check_packing(tiny("bloom"), 5)
